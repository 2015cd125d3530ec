"""The C kernels as a new process finds or compiles them."""

import torch

from multimax.kernels import c_build, c_library


def load(dtype=torch.float32):
    """The library or the reason why there is none, as in a new process."""
    c_build._folder_to_write.cache_clear()
    c_build._target.cache_clear()
    return c_library._load.__wrapped__(dtype)
