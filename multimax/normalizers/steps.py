"""The steps around a modulation, as the kernels of attention take them: factors of rows and a cap.

The sink needs no kernel: it takes a share of the result, which the logarithm of the sum says.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.functional import MASK_FLOOR, causal_mask
from multimax.normalizers.base import SHORTEST, Normalizer
from multimax.normalizers.modulated import ModulatedSoftMax


def kernel_steps(
    normalizer: Normalizer,
    query: Tensor,
    keys: int,
    mask: Tensor | None,
    causal: bool,
    bias: Tensor | None,
) -> dict[str, Any]:
    """Arguments `factor`, `factor_first`, `softcap` and `with_logsumexp` of a kernel, if not None.

    Args:
        normalizer: has a `length_scale`, a cap or a sink.
        query: (batch, heads, queries, head_dim).
        keys: how many there are.
        mask, causal, bias: as in `multimax.attention.attention`, to which the factor of a length
            scale counts what they allow. Scores that mask by themselves are counted, too: unlike
            the definition, a kernel has none before.
    """
    steps: dict[str, Any] = {}
    if normalizer.length_scale is not None:
        length = allowed_keys(query, keys, mask, causal, bias)
        dtype = torch.promote_types(query.dtype, torch.float32)
        factor = normalizer.length_factor(length.clamp_min(SHORTEST).to(dtype).log())
        steps["factor"] = factor
        steps["factor_first"] = normalizer.length_scale == "scores"
    if isinstance(normalizer, ModulatedSoftMax):
        if normalizer.softcap is not None:
            steps["softcap"] = normalizer.softcap
        if normalizer.sink is not None:
            steps["with_logsumexp"] = True
    return steps


def left_by_sink(normalizer: Normalizer, out: Tensor, logsumexp: Tensor) -> Tensor:
    """What a sink leaves of the result of attention without it.

    Args:
        normalizer: is a `ModulatedSoftMax` with a sink.
        out: (batch, heads, queries, value_dim).
        logsumexp: (batch, heads, queries), of the logits.
    """
    assert isinstance(normalizer, ModulatedSoftMax)
    total = logsumexp.unsqueeze(-1)
    sink = normalizer.sink_score(total)
    assert sink is not None
    return (out * torch.sigmoid(total - sink)).to(out.dtype)


def allowed_keys(
    query: Tensor, keys: int, mask: Tensor | None, causal: bool, bias: Tensor | None
) -> Tensor:
    """How many keys each query may attend to, broadcastable to (batch, heads, queries, 1).

    No tensor of queries x keys is made unless the mask or the bias is one.

    Args:
        query: (batch, heads, queries, head_dim).
        keys: how many there are.
        mask: bool, broadcastable to (batch, heads, queries, keys), or None.
        causal: query i sees keys up to i + keys - queries.
        bias: the same, real; masks where it is at most `functional.MASK_FLOOR`.
    """
    queries = query.size(2)
    allowed = None if mask is None else _of_four(mask)
    if bias is not None:
        shown = ~(_of_four(bias) <= MASK_FLOOR)
        allowed = shown if allowed is None else allowed & shown
    if not causal:
        if allowed is None:
            return torch.full((1, 1, 1, 1), keys, device=query.device)
        return allowed.expand(*allowed.shape[:3], keys).sum(-1, keepdim=True)
    if allowed is not None and allowed.size(2) > 1:
        return (allowed & causal_mask(queries, keys, query.device)).sum(-1, keepdim=True)
    seen = torch.arange(queries, device=query.device) + (keys - queries + 1)
    seen = seen.clamp(0, keys)
    if allowed is None:
        return seen[None, None, :, None]
    upto = F.pad(allowed.expand(*allowed.shape[:3], keys).cumsum(-1), (1, 0))
    return upto[..., seen].transpose(-2, -1)


def _of_four(tensor: Tensor) -> Tensor:
    """A tensor with four dimensions, of size 1 where it is expanded."""
    tensor = tensor[(None,) * (4 - tensor.dim())]
    return tensor[tuple(slice(1) if n == 0 else slice(None) for n in tensor.stride())]
