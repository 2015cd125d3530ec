"""Whether this machine can have the C kernels."""

import warnings

import pytest
import torch

from multimax.kernels import c_library

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    UNAVAILABLE = c_library.unavailable(torch.float32) or c_library.unavailable(torch.float64)
needs_kernels = pytest.mark.skipif(
    UNAVAILABLE is not None,
    reason=f"tests the C kernels, which this machine cannot have: {UNAVAILABLE}",
)
