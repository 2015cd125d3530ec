"""MultiMax and its peers: normalizers, their losses and metrics, and attention over any of them.

This package level needs nothing but torch. `multimax.attention` is a module: its function of the
same name is imported from there.
"""

from multimax import normalizers
from multimax.kernels.backend import use_backend
from multimax.losses import (
    entmax15_loss,
    fenchel_young_loss,
    linear_output_loss,
    output_loss,
    sparsemax_loss,
)
from multimax.metrics import (
    entropy,
    mean_of_defined,
    modulator_health,
    multi_modality,
    row_mean,
    softmax_reference,
    sparsity,
    support_size,
    top_k_mass,
    uniform_reference,
)
from multimax.monitoring import monitor
from multimax.normalizers import *  # noqa: F403
from multimax.parameters import clip_gradients, parameter_groups
from multimax.recording import NormalizerRecorder
from multimax.replacement import (
    load_pretrained,
    replace_softmax,
    restore_softmax,
    verify_replacement,
)

__version__ = "0.1.0"
__all__ = [
    "NormalizerRecorder",
    "clip_gradients",
    "entmax15_loss",
    "entropy",
    "fenchel_young_loss",
    "linear_output_loss",
    "load_pretrained",
    "mean_of_defined",
    "modulator_health",
    "monitor",
    "multi_modality",
    "output_loss",
    "parameter_groups",
    "replace_softmax",
    "restore_softmax",
    "row_mean",
    "softmax_reference",
    "sparsemax_loss",
    "sparsity",
    "support_size",
    "top_k_mass",
    "uniform_reference",
    "use_backend",
    "verify_replacement",
]
__all__ += normalizers.__all__
