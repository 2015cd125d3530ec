"""Masks that are added to scores."""

import torch
from torch import Tensor

from multimax.functional import MASK_FLOOR, values_known


def split_additive(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask and the additive bias that `attn_mask` of torch's attention stands for.

    Args:
        mask: bool with True where a key may be attended, or real: added to the scores, where
            entries of at most `functional.MASK_FLOOR` mask.

    Returns:
        The mask and the bias, each None if there is none.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    if values_known(mask) and not mask.requires_grad:
        allowed = ~(mask <= MASK_FLOOR)  # not that of NaN
        if not mask.masked_fill(~allowed, 0).any():  # it only masks, for which there are kernels
            return allowed, None
    return None, mask
