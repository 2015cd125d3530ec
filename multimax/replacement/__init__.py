"""Another normalizer in the place of SoftMax in a model of any library, in one line."""

from multimax.replacement.replace import replace_softmax, restore_softmax
from multimax.replacement.report import Replacement
from multimax.replacement.transformers_files import load_pretrained
from multimax.replacement.verify import verify_replacement

__all__ = [
    "Replacement",
    "load_pretrained",
    "replace_softmax",
    "restore_softmax",
    "verify_replacement",
]
