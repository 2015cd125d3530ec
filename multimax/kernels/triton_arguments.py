"""What a Triton attention may be given, and how its programs are launched."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from multimax.functional import check_bias, check_mask
from multimax.kernels.triton_modulation import check_device

LARGEST_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    """Raise ValueError for tensors that do not fit together, or that no kernel takes."""
    check_device("query", query)
    if query.dim() != 4 or not 1 <= query.size(3) <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"query must be (batch, heads, queries, head_dim) with head_dim in 1 ... "
            f"{LARGEST_HEAD_DIM}, got shape {tuple(query.shape)}: reshape it, or use "
            "multimax.attention.attention"
        )
    batch, heads, _, dim = query.shape
    if key.dim() != 4 or (key.size(0), key.size(3)) != (batch, dim):
        raise ValueError(
            f"key must be ({batch}, key heads, keys, {dim}) to fit query, got shape "
            f"{tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}: for "
            "another head_dim use multimax.attention.attention"
        )
    if key.size(1) == 0 or heads % key.size(1):
        raise ValueError(
            f"key must have a number of heads that divides the {heads} of query, got {key.size(1)}"
        )
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"query, key and value must have one real floating-point dtype, got {name} in "
                f"{tensor.dtype} and query in {query.dtype}: use .to(...)"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query, {query.device}, got {tensor.device}: use "
                f".to({str(query.device)!r})"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_attention_bias(bias: Tensor, query: Tensor, keys: int) -> None:
    """Raise ValueError for a bias that does not fit the scores."""
    if bias.dim() != 4 or bias.device != query.device:
        raise ValueError(
            f"bias must have four dimensions on {query.device}, got shape {tuple(bias.shape)} on "
            f"{bias.device}"
        )
    check_bias(bias, (*query.shape[:3], keys))


def check_attention_mask(mask: Tensor, query: Tensor, keys: int) -> None:
    """Raise ValueError for a mask that is elsewhere or does not fit the scores."""
    check_mask(mask, (*query.shape[:3], keys))
    if mask.device != query.device:
        raise ValueError(
            f"mask must be on the device of query, {query.device}, got {mask.device}: use "
            f".to({str(query.device)!r})"
        )


def check_attention_steps(factor: Tensor | None, softcap: float | None, query: Tensor) -> None:
    """Raise ValueError for a factor that does not fit the rows, or a cap out of range."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
    if factor is None:
        return
    rows = (*query.shape[:3], 1)
    sizes = zip(factor.shape, rows, strict=False)
    fits = factor.dim() == 4 and all(n in (1, size) for n, size in sizes)
    if not fits or not factor.is_floating_point() or factor.device != query.device:
        raise ValueError(
            f"factor must be floating-point of four dimensions that broadcast to {rows} on "
            f"{query.device}, got shape {tuple(factor.shape)} in {factor.dtype} on {factor.device}"
        )


def expanded_mask(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """The mask as integers of shape (B, H, queries, keys), broadcast by strides of 0."""
    shape = (*query.shape[:3], keys)
    mask = mask.expand(shape)
    mask = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())]
    # A tile of a mask is read 16 entries at a time, for which its rows must begin and end there.
    if min(mask.shape[2:]) > 1 and (keys % 16 or mask.stride(2) % 16 or mask.stride(3) != 1):
        mask = F.pad(mask, (0, -keys % 16))[..., :keys]
    # Triton 3.8 does not compile fp64 products with what depends on a load of narrower numbers.
    integers = mask.long() if query.dtype == torch.float64 else mask.view(torch.uint8)
    return integers.expand(shape)


class Blocks(NamedTuple):
    """The size of a tile, and the warps and pipeline stages of the program that computes it."""

    queries: int
    keys: int
    warps: int
    stages: int


def block_sizes(dtype: torch.dtype, order: int) -> tuple[Blocks, Blocks, Blocks]:
    """For the output, for the gradient of the query, and for those of key and value.

    In half precision the fastest of 84 candidates on an H200, with heads of 32, 64 and 128. More
    scores in a tile, or in a thread, and the modulation of order 2 runs out of registers. fp32 has
    no tensor cores unless TF32 is allowed; fp64 serves to check the others.
    """
    if dtype == torch.float64:
        blocks = Blocks(16, 16, warps=4, stages=1)
        return blocks, blocks, blocks
    if dtype == torch.float32:
        blocks = Blocks(32, 32, warps=8, stages=2)
        return blocks, blocks, blocks
    return (
        Blocks(64, 64 if order == 0 else 32, warps=4, stages=3),
        Blocks(64, 32 if order == 0 else 16, warps=4, stages=3),
        Blocks(32, 64, warps=4, stages=3),
    )


def tile_width(query: Tensor) -> int:
    """The head dimension of a tile: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(query.size(3)))


def launch_options(query: Tensor, blocks: Blocks) -> dict[str, Any]:
    """The constants that a kernel is compiled for."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "dim": query.size(3),
        "width": tile_width(query),
        "block_queries": blocks.queries,
        "block_keys": blocks.keys,
        "precision": "tf32" if tf32 and query.dtype == torch.float32 else "ieee",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def programs_of(tensor: Tensor, block: int) -> tuple[int]:
    """The grid: a program for each block of tokens of each head."""
    return (tensor.size(0) * tensor.size(1) * triton.cdiv(tensor.size(2), block),)


def strided(**tensors: Tensor | None) -> dict[str, Any]:
    """Tensors as the kernels take them, (tensor, *strides)."""
    return {name: t if t is None else (t, *t.stride()) for name, t in tensors.items()}
