"""The definitions on which everything stands: precision, masks, and SoftMax of modulated scores.

Plain torch operations; the normalizers are built of them and the kernels are compared with them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# Scores at or below it, such as fills of -1e4, -1e9 or finfo.min, count as masked where a modulator
# could lift them; -1e4 is this number in bf16.
MASK_FLOOR = -9984.0


def to_compute_precision(scores: Tensor) -> Tensor:
    """Half-precision scores as fp32 (fp16 squares overflow at 256), fp32 and fp64 as they are.

    Raises:
        ValueError: `scores` is of another dtype, such as an integer or float8, or nested.
    """
    check_not_nested(scores)
    if scores.dtype in (torch.float16, torch.bfloat16):
        return scores.float()
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"scores must be float16, bfloat16, float32 or float64, got {scores.dtype}: use "
            ".float()"
        )
    return scores


def function_transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def values_known(tensor: Tensor) -> bool:
    """Whether its values may be looked at: not where that waits, or is not possible in a graph."""
    known = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return known and not function_transforms_active()


def exporting() -> bool:
    """Whether `torch.export` is making a program.

    `torch.compiler.is_exporting` without what it says of torch 2.11: yes, inside torch.compile.
    """
    return torch.compiler._is_exporting_flag


def check_not_nested(*tensors: Tensor) -> None:
    """Raise ValueError for a nested tensor, whose rows have no common length."""
    for tensor in tensors:
        if tensor.is_nested:
            raise ValueError(
                "nested (jagged) tensors are not supported: pad them, torch.nested."
                "to_padded_tensor(x, 0.0), and pass a mask that is False in the padding"
            )


def check_mask(mask: Tensor | None, shape: Sequence[int] | None = None, name: str = "mask") -> None:
    """Raise ValueError for a mask that would be misread.

    Args:
        mask: must be boolean; an additive mask would be misread.
        shape: of the scores, which the mask must broadcast to: it must not broadcast them.
        name: what the error calls it.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be boolean (True = may receive mass), got {mask.dtype}: "
            "for an additive mask use `mask > -inf`, for 0/1 use `mask.bool()`"
        )
    if shape is not None and not broadcasts(mask.shape, shape):
        raise ValueError(
            f"{name} of shape {tuple(mask.shape)} must broadcast to the scores, of shape "
            f"{tuple(shape)}"
        )


def broadcasts(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of these sizes can be expanded to `shape`."""
    if len(sizes) > len(shape):
        return False
    for axis in range(-len(sizes), 0):  # every call comes here: all() takes three times as long
        if sizes[axis] != 1 and sizes[axis] != shape[axis]:
            return False
    return True


def check_bias(bias: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ValueError for an additive bias of another dtype, or one that does not fit the scores.

    Args:
        bias: real.
        shape: of the scores, which it must broadcast to.
    """
    if bias is None:
        return
    check_not_nested(bias)
    if bias.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            "bias must be float16, bfloat16, float32 or float64, as it is added to the scores, got "
            f"{bias.dtype}: pass a boolean mask as `mask`"
        )
    if not broadcasts(bias.shape, shape):
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} must broadcast to the scores, of shape "
            f"{tuple(shape)}"
        )


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor, given by its name, on another device than `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the others are on {like.device}: use "
                f".to({str(like.device)!r})"
            )


def masked_softmax(
    scores: Tensor, dim: int, mask: Tensor | None, sink: Tensor | None = None
) -> Tensor:
    """SoftMax over the entries where `mask` is True and the score is not -inf; exactly 0 elsewhere.

    The fill is finite so that an all-masked row (all zeros) stays free of NaN in both directions;
    the second `masked_fill` makes its zeros and its zero gradients exact.

    Args:
        scores: real, any shape, in compute precision.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, or None.
        sink: broadcastable to `scores` with size 1 along `dim`: the score of one more entry, which
            takes its share and is not returned; or None.
    """
    hidden = hidden_entries(scores, mask)
    filled = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(filled, dim)
    if sink is not None:
        probabilities = probabilities * torch.sigmoid(_log_sum(filled, dim) - sink)
    return probabilities.masked_fill(hidden, 0.0)


def masked_log_softmax(
    scores: Tensor, dim: int, mask: Tensor | None, sink: Tensor | None = None
) -> Tensor:
    """The logarithm of `masked_softmax`: -inf where that is masked."""
    hidden = hidden_entries(scores, mask)
    filled = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    logarithms = torch.log_softmax(filled, dim)
    if sink is not None:
        logarithms = logarithms + F.logsigmoid(_log_sum(filled, dim) - sink)
    return logarithms.masked_fill(hidden, -torch.inf)


def masked_logsumexp(scores: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`, without a gradient to scores of -inf; -inf where all are."""
    hidden = scores == -torch.inf
    total = _log_sum(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), dim)
    return total.masked_fill(hidden.all(dim, keepdim=True), -torch.inf).squeeze(dim)


def _log_sum(scores: Tensor, dim: int) -> Tensor:
    """log sum exp, of size 1 along `dim`; what it adds up to is the share that a sink leaves."""
    return torch.logsumexp(scores, dim, keepdim=True)


def soft_cap(scores: Tensor, cap: float, hidden: Tensor) -> Tensor:
    """`cap * tanh(scores / cap)`; -inf, without a gradient, where `hidden`, and NaN for inf.

    inf would count as an ordinary score.
    """
    spoilt = (scores == torch.inf) & ~hidden
    nothing = torch.where(spoilt, torch.nan, 0.0).to(scores.dtype)
    capped = cap * torch.tanh(scores / cap) + nothing
    return capped.masked_fill(hidden, -torch.inf)


def hidden_entries(scores: Tensor, mask: Tensor | None, floor: float = -torch.inf) -> Tensor:
    """bool, True for what is masked: by `mask`, or by a score of at most `floor` (NaN is not)."""
    hidden = scores <= floor
    return hidden if mask is None else hidden | ~mask


def modulate(scores: Tensor, ts: Tensor, ranges: Tensor) -> Tensor:
    """The modulator sigma of MultiMax, element by element.

        sigma(x) = x + sum_{n=1..N} [ (1 - t_bn) max(b_n - x, 0)^n + (t_dn - 1) max(x - d_n, 0)^n ]

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        ts: (2N,), `[1 - t_b1, t_d1 - 1, 1 - t_b2, t_d2 - 1, ...]`; all zeros is the identity.
        ranges: (2N,), `[b_1, d_1, b_2, d_2, ...]`, in units of the scores.

    Returns:
        Modulated scores of the shape of `scores`, in fp32 or wider; -inf, without a gradient, where
        the score is at most `MASK_FLOOR`, which the polynomial could lift above all others.

    Raises:
        ValueError: `ts` and `ranges` are not vectors of the same even length.

    Source: Zhou et al., MultiMax, ICML 2024, arXiv 2406.01189 (first and second order).
    """
    if ts.shape != ranges.shape or ts.dim() != 1 or ts.numel() % 2 or not ts.numel():
        raise ValueError(
            "ts and ranges must be vectors of one even length 2N (N = order), "
            f"got shapes {tuple(ts.shape)} and {tuple(ranges.shape)}"
        )
    x = to_compute_precision(scores)
    ts, ranges = ts.to(x.dtype), ranges.to(x.dtype)
    hidden = x <= MASK_FLOOR
    x = x.masked_fill(hidden, 0.0)
    modulated = x
    for n in range(1, ts.numel() // 2 + 1):
        low, high = 2 * n - 2, 2 * n - 1
        below = _power(torch.relu(ranges[low] - x), n)
        above = _power(torch.relu(x - ranges[high]), n)
        modulated = modulated + ts[low] * below + ts[high] * above
    return modulated.masked_fill(hidden, -torch.inf)


def modulate_derivative(scores: Tensor, ts: Tensor, ranges: Tensor) -> Tensor:
    """d sigma / d x at `scores`, in fp32 or wider. Where it is negative, the order of scores flips.

    Arguments, shapes and source are those of `modulate`; at a kink, the derivative of ReLU is 0.
    """
    x = to_compute_precision(scores)
    ts, ranges = ts.to(x.dtype), ranges.to(x.dtype)
    slope = torch.ones_like(x)
    for n in range(1, ts.numel() // 2 + 1):
        low, high = 2 * n - 2, 2 * n - 1
        below, above = ranges[low] - x, x - ranges[high]
        slope = slope - ts[low] * n * _power(below, n - 1) * (below > 0)
        slope = slope + ts[high] * n * _power(above, n - 1) * (above > 0)
    return slope


def _power(base: Tensor, exponent: int) -> Tensor:
    # Repeated multiplication: `**` is `pow`, which autocast moves to fp32 and which is slower.
    if exponent == 0:
        return torch.ones_like(base)
    result = base
    for _ in range(exponent - 1):
        result = result * base
    return result


def modulated_softmax(
    scores: Tensor, coefficients: Tensor, dim: int, mask: Tensor | None
) -> Tensor:
    """`masked_softmax` of `modulated_logits`: the definition of what the kernels of rows compute.

    Args:
        scores: real, any shape, in compute precision.
        coefficients: (2 + 4 N,), see `Normalizer.coefficients`.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, or None.
    """
    return masked_softmax(modulated_logits(scores, coefficients, mask), dim, None)


def modulated_logits(
    scores: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    factor_first: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """What SoftMax is taken of by the kernels; -inf where masked.

    Args:
        scores: real, any shape, in compute precision.
        coefficients: (2 + 4 N,), see `Normalizer.coefficients`.
        mask: bool, broadcastable to `scores`, or None.
        bias: finite, broadcastable to `scores`, is added at the end; or None.
        factor: > 0, broadcastable to `scores`; or None.
        factor_first: it multiplies the scores, not what is modulated and capped.
        softcap: c > 0 of c tanh(x / c) of the modulated scores; or None.
    """
    has_modulator = coefficients.numel() > 2
    has_floor = has_modulator or factor is not None or softcap is not None
    hidden = hidden_entries(scores, mask, MASK_FLOOR if has_floor else -torch.inf)
    if factor is not None and factor_first:
        scores = factor * scores.masked_fill(hidden, 0.0)
        if has_modulator or softcap is not None:
            hidden = hidden | (scores <= MASK_FLOOR)
    modulated = affine(scores, coefficients[0], coefficients[1], hidden)
    if has_modulator:
        modulated = modulate(modulated, *coefficients[2:].chunk(2))
    hidden = hidden | (modulated == -torch.inf)
    if softcap is not None:
        modulated = soft_cap(modulated, softcap, hidden)
    if factor is not None and not factor_first:
        modulated = factor * modulated.masked_fill(hidden, 0.0)
    modulated = modulated.masked_fill(hidden, -torch.inf)
    if bias is not None:
        modulated = modulated + bias.to(modulated.dtype)
        modulated = modulated if mask is None else modulated.masked_fill(~mask, -torch.inf)
    return modulated


def affine(scores: Tensor, scale: Tensor, shift: Tensor, hidden: Tensor) -> Tensor:
    """`scale * scores + shift`; without a gradient where `hidden`, and NaN for inf.

    inf would count as masked under a negative scale.
    """
    spoilt = (scores == torch.inf) & ~hidden
    nothing = torch.where(spoilt, torch.nan, 0.0).to(scores.dtype)
    # 0 in the place of -inf, whose product with a gradient of 0 is NaN.
    return scale * scores.masked_fill(hidden, 0.0) + (shift + nothing)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Any,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias: Tensor | None = None,
    bias_place: str = "after",
) -> Tensor:
    """The definition of `attention`, with its arguments; query and key have the same heads."""
    scores, mask, bias = masked_scores(query, key, mask, causal, scale, bias)
    if bias is None:
        probabilities = normalizer(scores, mask=mask)
    else:
        probabilities = normalizer.biased(scores, bias, mask, bias_place)
    return F.dropout(probabilities, dropout) @ value


def masked_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores of attention, with all that masks them in the mask, and a finite bias."""
    scores = (query * scale) @ key.transpose(-2, -1)
    if causal:
        triangular_mask = causal_mask(query.size(-2), key.size(-2), query.device)
        mask = triangular_mask if mask is None else mask & triangular_mask
    if bias is None:
        return scores, mask, None
    hidden = bias <= MASK_FLOOR
    mask = ~hidden if mask is None else mask & ~hidden
    return scores, mask, bias.masked_fill(hidden, 0)


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """(queries, keys) bool, True where query i may attend: keys up to i + keys - queries."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for every query head."""
    if query.dim() < 3 or key.dim() < 3 or key.size(-3) in (1, query.size(-3)):
        return key, value  # the same heads, or one for all of them
    check_heads(query, key, value)
    repeats = query.size(-3) // key.size(-3)
    return key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError for heads, the third dimension from the end, that cannot be grouped."""
    heads, of_key, of_value = query.size(-3), key.size(-3), value.size(-3)
    if of_key != of_value or (heads != of_key and (of_key == 0 or heads % of_key)):
        raise ValueError(
            f"query {tuple(query.shape)} has {heads} heads, key {tuple(key.shape)} has {of_key} "
            f"and value {tuple(value.shape)} has {of_value}: the heads of key and value must be "
            "the same number, which divides those of query"
        )
