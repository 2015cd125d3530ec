"""MultiMax and its peers: normalizers, their losses and metrics, and attention over any of them.

This package level needs nothing but torch.
"""

from multimax.normalizers import *  # noqa: F403
from multimax.normalizers import __all__ as _normalizer_names

__version__ = "0.1.0"
__all__ = [*_normalizer_names]
