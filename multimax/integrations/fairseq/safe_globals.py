"""What fairseq's checkpoints hold besides tensors, for torch.load without running their code."""

import argparse
from typing import Any

import numpy as np

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]

# The arguments of a translation model, and the meters of `--eval-bleu`; "numpy.core" is numpy 1.
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.int64)),
    type(np.dtype(np.float64)),
    _RECONSTRUCT,
    _SCALAR,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
]
