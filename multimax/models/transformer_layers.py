"""The parts of the Transformer: attention with a cache, and the layer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from multimax.attention import attention
from multimax.models.positions import Relative, rotate
from multimax.normalizers import Normalizer, SoftMax, build_for_attention

KeysValues = tuple[Tensor, Tensor]
NOWHERE = Relative()


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

    def keys_values(self, x: Tensor, positions: Relative = NOWHERE) -> KeysValues:
        """Keys and values of `x` (batch, tokens, dim), each (batch, heads, tokens, head_dim)."""
        keys = rotate(self._heads(self.k_proj(x)), positions.rotation)
        return keys, self._heads(self.v_proj(x))

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        key_mask: Tensor,
        causal: bool = False,
        incremental: bool = False,
        positions: Relative = NOWHERE,
    ) -> Tensor:
        """Attention of `x` to keys and values.

        Args:
            x: (rows, tokens, dim).
            keys_values: of (sentences, ...), where each sentence has rows / sentences rows of `x`.
            key_mask: (sentences, keys) bool, True where a key may be attended.
            causal: as in `attention`.
            incremental: whether decoding is token by token, for `official_mismatch`.
            positions: of the tokens, with which `keys_values` was called too.

        Returns:
            (rows, tokens, dim).
        """
        query = rotate(self._heads(self.q_proj(x)), positions.rotation)
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
            bias=positions.bias,
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
        positions: Relative = NOWHERE,
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
            positions: of self-attention.
        """

        def self_attention(y: Tensor) -> Tensor:
            new = self.self_attn.keys_values(y, positions)
            keys_values = new if extend is None else extend(new)
            return self.self_attn(y, keys_values, key_mask, causal, incremental, positions)

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
