"""The parts of the Transformer: positions, attention with a cache, and the layer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimax.attention import attention
from multimax.normalizers import Normalizer, SoftMax, build_for_attention

KeysValues = tuple[Tensor, Tensor]


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
        step = math.log(10000) / (half - 1)
        rates = torch.exp(torch.arange(half, dtype=torch.float32) * -step).to(positions.device)
        angles = positions.float().unsqueeze(-1) * rates
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.embed_dim % 2))


def _drop_position_tables(positions: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    for name in ("weights", "_float_tensor"):  # in checkpoints of other fairseq versions
        state.pop(prefix + name, None)


class MultiheadAttention(nn.Module):
    """Projections around attention with any normalizer; parameter names are fairseq's.

    Args:
        embed_dim: a multiple of `num_heads`.
        num_heads: number of heads, which share the normalizer.
        normalizer: name and options of the normalizer.
        dropout: in [0, 1), of the probabilities.
        official_mismatch: plain SoftMax in incremental decoding, as in the official code.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        normalizer: Mapping[str, Any],
        dropout: float,
        official_mismatch: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj: nn.Linear = nn.Linear(embed_dim, embed_dim)
        self.k_proj: nn.Linear = nn.Linear(embed_dim, embed_dim)
        self.v_proj: nn.Linear = nn.Linear(embed_dim, embed_dim)
        self.out_proj: nn.Linear = nn.Linear(embed_dim, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        self.normalizer: Normalizer = build_for_attention(
            normalizer, num_heads, embed_dim // num_heads
        )
        self.official_mismatch = official_mismatch

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values of `x` (batch, tokens, dim), each (batch, heads, tokens, head_dim)."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        key_mask: Tensor,
        causal: bool = False,
        incremental: bool = False,
    ) -> Tensor:
        """Attention of `x` to keys and values.

        Args:
            x: (rows, tokens, dim).
            keys_values: of (sentences, ...), where each sentence has rows / sentences rows of `x`.
            key_mask: (sentences, keys) bool, True where a key may be attended.
            causal: as in `attention`.
            incremental: whether decoding is token by token, for `official_mismatch`.

        Returns:
            (rows, tokens, dim).
        """
        query = self._heads(self.q_proj(x))
        keys, values = keys_values
        folded = query.size(0) != keys.size(0)
        if folded:  # the hypotheses of a sentence are just more queries to its source
            query = query.unflatten(0, (keys.size(0), -1)).transpose(1, 2).flatten(2, 3)
        plain = incremental and self.official_mismatch
        heads = attention(
            query,
            keys,
            values,
            SoftMax() if plain else self.normalizer,
            mask=key_mask[:, None, None, :],
            causal=causal,
            dropout=self.dropout if self.training else 0.0,
        )
        if folded:
            heads = heads.unflatten(2, (-1, x.size(1))).transpose(1, 2).flatten(0, 1)
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention (in the decoder of a translation model) and the MLP.

    Args:
        embed_dim: width of the residual stream.
        ffn_dim: width of the MLP.
        self_attention: keyword arguments of the self-attention.
        cross_attention: those of the cross-attention; None for none.
        pre_norm: normalize before each part, not after the residual connection.
        dropout: in [0, 1), of each part.
        activation_dropout: in [0, 1), inside the MLP.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        self_attention: Mapping[str, Any],
        cross_attention: Mapping[str, Any] | None,
        pre_norm: bool,
        dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.self_attn: MultiheadAttention = MultiheadAttention(embed_dim, **self_attention)
        self.self_attn_layer_norm: nn.LayerNorm = nn.LayerNorm(embed_dim)
        self.encoder_attn: MultiheadAttention | None = None
        self.encoder_attn_layer_norm: nn.LayerNorm | None = None
        if cross_attention is not None:
            self.encoder_attn = MultiheadAttention(embed_dim, **cross_attention)
            self.encoder_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.fc1: nn.Linear = nn.Linear(embed_dim, ffn_dim)
        self.fc2: nn.Linear = nn.Linear(ffn_dim, embed_dim)
        self.final_layer_norm: nn.LayerNorm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor,
        causal: bool = False,
        incremental: bool = False,
        extend: Callable[[KeysValues], KeysValues] | None = None,
        source_keys_values: KeysValues | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """The layer's output, of the shape of `x`.

        Args:
            x: (rows, tokens, dim).
            key_mask: (rows, keys) bool, False for padding.
            causal: as in `attention`.
            incremental: as in `MultiheadAttention`.
            extend: puts the cached keys and values before those of `x`; None without a cache.
            source_keys_values: keys and values of the source.
            source_mask: (sentences, source tokens) bool, False for padding.
        """

        def self_attention(y: Tensor) -> Tensor:
            new = self.self_attn.keys_values(y)
            keys_values = new if extend is None else extend(new)
            return self.self_attn(y, keys_values, key_mask, causal, incremental)

        x = self._residual(x, self.self_attn_layer_norm, self_attention)
        if self.encoder_attn is not None:
            cross = self.encoder_attn
            x = self._residual(
                x, self.encoder_attn_layer_norm, lambda y: cross(y, source_keys_values, source_mask)
            )
        return self._residual(x, self.final_layer_norm, self._mlp)

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(self.fc1(x)), self.activation_dropout, self.training)
        return self.fc2(hidden)

    def _residual(self, x: Tensor, norm: Any, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + F.dropout(part(norm(x)), self.dropout, self.training)
        return norm(x + F.dropout(part(x), self.dropout, self.training))
