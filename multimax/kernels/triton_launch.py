"""The launches of the Triton attention's kernels, as operations that torch.compile takes."""

from typing import Any

import torch
import triton
from torch import Tensor

from multimax.kernels.triton_arguments import (
    Blocks,
    block_sizes,
    expanded_mask,
    launch_options,
    programs_of,
    strided,
)
from multimax.kernels.triton_attention_backward import (
    attention_backward_key_value,
    attention_backward_query,
)
from multimax.kernels.triton_attention_bias import attention_backward_bias
from multimax.kernels.triton_attention_forward import attention_forward
from multimax.kernels.triton_modulation import compute_dtype, order_of


@torch.library.custom_op("multimax::triton_attention_forward", mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias_before: bool,
    factor_first: bool,
    softcap: float | None,
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; the logsumexp of each row, 0 or `with_logsumexp` inf for an empty one; and the
    coefficients with the scale, which `backward` needs.
    """
    scalars = _new_scalars(query, coefficients)
    scalars[:-1].copy_(coefficients)
    scalars[-1].fill_(scale)  # to assign a number would make the host wait
    options = (causal, dropout, bias_before, factor_first, softcap)
    common = _arguments(query, key, value, scalars, bias, factor, mask, seed, *options)
    output, logsumexp = _new_output(query), _new_statistics(query)
    common |= {"logsumexp": logsumexp, "with_logsumexp": with_logsumexp}
    blocks, _, _ = block_sizes(query.dtype, common["order"])
    with torch.cuda.device_of(query):
        attention_forward[programs_of(query, blocks.queries)](
            **common,
            **strided(output=output),
            **launch_options(query, blocks),
        )
    return output, logsumexp, scalars


@forward.register_fake
def _(query, key, value, coefficients, *_):
    return _new_output(query), _new_statistics(query), _new_scalars(query, coefficients)


@torch.library.custom_op("multimax::triton_attention_backward", mutates_args=())
def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias_before: bool,
    factor_first: bool,
    softcap: float | None,
    output: Tensor,
    logsumexp: Tensor,
    scalars: Tensor,
    gradient: Tensor,
    logsumexp_gradient: Tensor | None,
    learned: bool,
    of_bias: bool,
    of_factor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first six; not filled, or of no size, where not wanted."""
    options = (causal, dropout, bias_before, factor_first, softcap)
    common = _arguments(query, key, value, scalars, bias, factor, mask, seed, *options)
    common |= strided(output_gradient=gradient)
    common |= {"logsumexp": logsumexp, "delta": torch.empty_like(logsumexp)}
    _, of_query, of_key = block_sizes(query.dtype, common["order"])
    dq, dk, dv, d_coefficients, d_bias, d_factor = _new_gradients(
        query, key, value, coefficients, bias, factor, of_bias, of_factor
    )
    programs = programs_of(query, of_query.queries)
    parts = logsumexp.new_empty(*programs, coefficients.numel()) if learned else None
    of_rows = torch.empty_like(logsumexp) if of_factor else None
    if logsumexp_gradient is not None:
        logsumexp_gradient = logsumexp_gradient.contiguous()
    with torch.cuda.device_of(query):
        attention_backward_query[programs](
            **common,
            **strided(output=output, query_gradient=dq),
            logsumexp_gradient=logsumexp_gradient,
            coefficient_gradient=parts,
            factor_gradient=of_rows,
            **launch_options(query, of_query),
        )
        attention_backward_key_value[programs_of(key, of_key.keys)](
            **common,
            **strided(key_gradient=dk, value_gradient=dv),
            **launch_options(query, of_key),
        )
        if of_bias and bias is not None:
            _bias_gradient(d_bias.zero_(), common, query, of_query)
    # In fp64: there can be many, of both signs.
    if parts is not None:
        d_coefficients.copy_(parts.sum(0, dtype=torch.float64))
    if of_rows is not None:
        d_factor.copy_(of_rows.unsqueeze(-1).double().sum_to_size(d_factor.shape))
    return dq, dk, dv, d_coefficients, d_bias, d_factor


@backward.register_fake
def _(query, key, value, coefficients, bias, factor, *options):
    return _new_gradients(query, key, value, coefficients, bias, factor, *options[-2:])


def _new_output(query: Tensor) -> Tensor:
    """(B, H, queries, D) in the memory of (B, queries, H, D).

    Merging the heads is then a view, so that the output projection saves the same memory as this.
    """
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


def _new_statistics(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))


def _new_scalars(query: Tensor, coefficients: Tensor) -> Tensor:
    """For the coefficients and, after them, `scale`."""
    return query.new_empty(coefficients.numel() + 1, dtype=compute_dtype(query.dtype))


def _new_gradients(
    query, key, value, coefficients, bias, factor, of_bias, of_factor
) -> tuple[Tensor, ...]:
    """Not filled; those of bias and factor are of no size if they are not wanted."""
    like, nothing = torch.contiguous_format, query.new_empty(0)
    inputs = [query, key, value, coefficients]
    inputs += [bias if of_bias else nothing, factor if of_factor else nothing]
    return tuple(torch.empty_like(tensor, memory_format=like) for tensor in inputs)


def _arguments(
    query, key, value, scalars, bias, factor, mask, seed, causal, dropout, bias_before,
    factor_first, softcap,
) -> dict[str, Any]:  # fmt: skip
    """What all kernels are given."""
    if mask is not None:
        mask = expanded_mask(mask, query, key.size(2))
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.size(2))
    if factor is not None:
        factor = factor.to(scalars.dtype).expand(*query.shape[:3], 1)
    return {
        **strided(query=query, key=key, value=value, mask=mask, bias=bias, row_factor=factor),
        "coefficients": scalars,
        "heads": query.size(1),
        "group": query.size(1) // key.size(1),
        "queries": query.size(2),
        "keys": key.size(2),
        "seed": 0 if seed is None else int(seed),
        "dropout": dropout or None,
        "order": order_of(scalars[:-1], query.device),
        "causal": causal,
        "mask_by_query": mask is not None and mask.stride(2) != 0,
        "bias_before": bias_before,
        "factor_first": factor_first,
        "softcap": softcap,
    }


def _bias_gradient(gradient: Tensor, common: dict[str, Any], query: Tensor, blocks: Blocks) -> None:
    """Add to a gradient of the bias's shape: a sum over what it is broadcast over."""
    sizes = (*query.shape[:3], common["keys"])
    names = ("by_batch", "by_head", "by_query", "by_key")
    own = {name: n == whole for name, n, whole in zip(names, gradient.shape, sizes, strict=True)}
    programs = gradient.size(0) * gradient.size(1)
    programs *= triton.cdiv(common["queries"], blocks.queries) if own["by_query"] else 1
    programs *= triton.cdiv(common["keys"], blocks.keys) if own["by_key"] else 1
    if programs:
        attention_backward_bias[(programs,)](
            **common,
            **strided(bias_gradient=gradient),
            batches=query.size(0),
            of_heads=gradient.size(1),
            **own,
            **launch_options(query, blocks),
        )
