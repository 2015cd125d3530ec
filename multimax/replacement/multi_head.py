"""`torch.nn.functional.multi_head_attention_forward` over any normalizer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.attention import attention
from multimax.normalizers import Normalizer
from multimax.replacement.additive import split_additive


def multi_head_attention(
    normalizer: Normalizer,
    bias_place: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What torch's function of the same arguments computes, with a normalizer for SoftMax.

    Args:
        normalizer: takes the place of SoftMax.
        bias_place: of finite values in the masks, see `multimax.attention.attention`.
        query: (tokens, batch, embed_dim) or (tokens, embed_dim), and so on as in torch.

    Returns:
        The attention's output and its weights, None unless `need_weights`.

    Raises:
        ValueError: `static_k` or `static_v` is given.
    """
    if static_k is not None or static_v is not None:
        raise ValueError("static_k and static_v are not supported: pass None")
    batched = query.dim() == 3
    if not batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    inputs = zip((query, key, value), weights, biases, strict=True)
    q, k, v = (F.linear(tensor, weight, bias) for tensor, weight, bias in inputs)  # pyright: ignore
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, b.expand(1, *t.shape[1:])]) for t, b in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))
    mask, bias = _masks(attn_mask, key_padding_mask, num_heads, len(key), k.size(-2))
    dropout = dropout_p if training else 0.0
    options = {"mask": mask, "bias": bias, "bias_place": bias_place, "dropout": dropout}
    probabilities = None
    if need_weights:
        identity = torch.eye(k.size(-2), dtype=v.dtype, device=v.device).expand(
            *k.shape[:2], -1, -1
        )
        probabilities = attention(q, k, identity, normalizer, **options)
        heads = probabilities @ v
    else:
        heads = attention(q, k, v, normalizer, **options)
    out = F.linear(heads.permute(2, 0, 1, 3).flatten(-2), out_proj_weight, out_proj_bias)
    if probabilities is not None and average_attn_weights:
        probabilities = probabilities.mean(1)
    if batched:
        return out, probabilities
    return out.squeeze(1), None if probabilities is None else probabilities.squeeze(0)


def unit_values(key: Tensor, value: Tensor) -> Tensor:
    """(batch, heads, keys, keys): values of which attention makes its probabilities."""
    unit = torch.eye(key.size(-2), dtype=value.dtype, device=value.device)
    return unit.expand(*key.shape[:2], -1, -1)


def _masks(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, given: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the bias of torch's two masks, which are True or -inf where masked.

    Args:
        attn_mask: (queries, given) or (batch * heads, queries, given).
        padding: (batch, given), or (given,) unbatched.
        heads: number of heads.
        given: keys that the masks are for.
        keys: those and the ones appended, which everybody may attend to.
    """
    parts = []
    if attn_mask is not None:
        own = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads))
        parts.append(own)
    if padding is not None:
        parts.append(padding[..., None, None, :] if padding.dim() == 2 else padding)
    mask = bias = None
    for part in parts:
        part = ~part if part.dtype == torch.bool else part
        part = F.pad(part, (0, keys - given), value=part.dtype == torch.bool)
        allowed, finite = split_additive(part)
        if allowed is not None:
            mask = allowed if mask is None else mask & allowed
        if finite is not None:
            bias = finite if bias is None else bias + finite
    return mask, bias
