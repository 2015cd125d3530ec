"""Positions of the Transformer: added to the embeddings, or relative ones within attention."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 10000  # of the wavelengths, in radians


class SinusoidalPositions(nn.Module):
    """Sine and cosine position embeddings; padding has no position and a zero embedding.

    The first token of a row has position `padding_index + 1`, and there is no last position.

    Args:
        embed_dim: >= 4; the first half is sines, the second cosines.
        padding_index: the token that is skipped in counting.

    Source: fairseq's `SinusoidalPositionalEmbedding`, after tensor2tensor.
    """

    def __init__(self, embed_dim: int, padding_index: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.padding_index = padding_index
        # No buffer: its size would differ between processes, which DDP does not allow.
        self._table = torch.empty(0, embed_dim)
        self.register_load_state_dict_pre_hook(_drop_position_tables)

    def forward(self, token_mask: Tensor, new: int) -> Tensor:
        """Embeddings of the positions of the last `new` tokens.

        Args:
            token_mask: (rows, tokens) bool, False for padding.
            new: how many embeddings are wanted, at most `tokens`.

        Returns:
            (rows, new, embed_dim), fp32.
        """
        recent = slice(token_mask.size(1) - new, None)
        positions = (token_mask.cumsum(1) * token_mask)[:, recent] + self.padding_index
        if torch.compiler.is_compiling():  # a graph cannot keep a table that grows
            real = (positions != self.padding_index).unsqueeze(-1)
            return self._embed(positions).masked_fill(~real, 0.0)
        longest = self.padding_index + token_mask.size(1) + 1
        if self._table.size(0) < longest:
            # Doubled, so that decoding word by word does not compute it for every word.
            self._table = self._compute(2 * longest)
        self._table = self._table.to(token_mask.device)
        return F.embedding(positions, self._table)

    def _compute(self, length: int) -> Tensor:
        table = self._embed(torch.arange(length))
        table[self.padding_index] = 0
        return table

    def _embed(self, positions: Tensor) -> Tensor:
        half = self.embed_dim // 2
        step = math.log(BASE) / (half - 1)
        rates = torch.exp(torch.arange(half, dtype=torch.float32) * -step).to(positions.device)
        angles = positions.float().unsqueeze(-1) * rates
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.embed_dim % 2))


def _drop_position_tables(positions: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    for name in ("weights", "_float_tensor"):  # in checkpoints of other fairseq versions
        state.pop(prefix + name, None)


class Relative(NamedTuple):
    """What relative positions do to attention; nothing of both for no positions.

    Attributes:
        bias: (heads, queries, keys), added to the modulated scores.
        rotation: cosines and sines, each (tokens, head_dim / 2), of the new queries and keys.
    """

    bias: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def relative_positions(
    name: str, num_heads: int, head_dim: int, new: int, total: int, like: Tensor
) -> Relative:
    """The relative positions of the last `new` of `total` tokens.

    Places are counted with the padding, which changes no distance between two words unless it is
    between them.

    Args:
        name: as in `LanguageModel`.
        num_heads: of attention.
        head_dim: of a head.
        new: tokens that are computed.
        total: tokens with those that came before.
        like: a tensor with the dtype and device of attention.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    keys = torch.arange(total, device=like.device, dtype=dtype)
    queries = keys[total - new :]
    if name in ("alibi", "nape"):
        slopes = torch.tensor(bias_slopes(name, num_heads), device=like.device, dtype=dtype)
        return Relative(bias=slopes[:, None, None] * (keys - queries[:, None]))
    if name == "rotary":
        rates = torch.arange(head_dim // 2, device=like.device, dtype=dtype) * (-2 / head_dim)
        angles = queries[:, None] * BASE**rates
        return Relative(rotation=(angles.cos().to(like.dtype), angles.sin().to(like.dtype)))
    return Relative()


def bias_slopes(name: str, num_heads: int) -> list[float]:
    """What a step back costs in scores, for each head.

    - "alibi": 2^(-8 h / heads) for head h = 1, 2, ... (Press et al., Train Short, Test Long, 2022).
    - "nape": none for the first half of the heads, which have no positions, and 1 / h for the head
      h = 1, 2, ... of the other half (NoPE with ALiBi; Vasylenko et al., Long-Context
      Generalization with Sparse Attention, 2025, arXiv 2506.16640; the slopes are ours).
    """
    if name == "alibi":
        return [2 ** (-8 * head / num_heads) for head in range(1, num_heads + 1)]
    half = num_heads // 2
    return [0.0] * half + [1 / head for head in range(1, half + 1)]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """`x` (..., tokens, head_dim) with number i and i + head_dim / 2 turned in their plane.

    Source: Su et al., RoFormer, 2021, arXiv 2104.09864, with the pairs of GPT-NeoX.
    """
    if rotation is None:
        return x
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def check_positions(name: str, num_heads: int, embed_dim: int) -> None:
    """Raise ValueError for heads that cannot have the positions."""
    if name == "nape" and num_heads % 2:
        raise ValueError(f"positions=nape needs an even num_heads, got num_heads={num_heads}")
    if name == "rotary" and embed_dim // num_heads % 2:
        raise ValueError(
            "positions=rotary needs heads of an even width: choose embed_dim and num_heads so, not "
            f"embed_dim={embed_dim} and num_heads={num_heads}"
        )
