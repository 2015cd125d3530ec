import subprocess
import sys

import multimax

TRAINING_ONLY = {"accelerate", "hydra", "omegaconf", "timm", "tokenizers", "torchvision", "wandb"}
SCRIPT = """
import sys
import torch
before = set(sys.modules)
import multimax, multimax.attention, multimax.losses, multimax.metrics
print(*{name.partition(".")[0] for name in sys.modules if name not in before})
assert not set(%r) & set(sys.modules)
"""


def test_the_library_needs_only_torch():
    command = [sys.executable, "-c", SCRIPT % TRAINING_ONLY]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    third_party = set(result.stdout.split()) - set(sys.stdlib_module_names)
    assert third_party == {"multimax"}


def test_public_names():
    namespace = {}
    exec("from multimax import *", namespace)
    assert set(multimax.__all__) <= set(namespace)
    assert len(multimax.__all__) == len(set(multimax.__all__))
    for name in ("MultiMax", "output_loss", "NormalizerRecorder", "sparsity"):
        assert name in multimax.__all__
