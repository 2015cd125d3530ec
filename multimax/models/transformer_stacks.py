"""Encoder and decoder of the Transformer, and what they hand over: encoded source and cache."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimax.functional import values_known
from multimax.models.adaptive import AdaptiveInput, AdaptiveOutput
from multimax.models.output import Output
from multimax.models.positions import Relative, SinusoidalPositions, relative_positions
from multimax.models.transformer_layers import KeysValues, TransformerLayer


@dataclass(frozen=True)
class EncodedSource:
    """What the encoder knows of the source sentences.

    Attributes:
        features: (sentences, tokens, dim).
        mask: (sentences, tokens) bool, False for padding.
    """

    features: Tensor
    mask: Tensor


class Cache:
    """Keys and values of all decoder layers, which incremental decoding extends token by token.

    A row is one sequence that is being decoded. In translation, the rows of a sentence (its
    hypotheses) are consecutive and share the keys and values of their source, which are computed
    once.

    Args:
        depth: number of decoder layers.
        source_keys_values: keys and values of the source for each layer, each (sentences, heads,
            tokens, head_dim).
        source_mask: (sentences, tokens) bool, False for padding of the source.
    """

    def __init__(
        self,
        depth: int,
        source_keys_values: Iterable[KeysValues] = (),
        source_mask: Tensor | None = None,
    ) -> None:
        self.past: list[KeysValues | None] = [None] * depth
        self.token_mask: Tensor | None = None
        self.source_keys_values: list[KeysValues] = list(source_keys_values)
        self.source_mask = source_mask

    def extend(self, layer: int, new: KeysValues) -> KeysValues:
        """All keys and values of a layer, with those of the `new` tokens at the end."""
        past = self.past[layer]
        if past is not None:
            new = torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)
        self.past[layer] = new
        return new

    def extend_mask(self, token_mask: Tensor) -> Tensor:
        """(rows, tokens) bool of all tokens so far, with those of the new tokens at the end."""
        if self.token_mask is not None:
            token_mask = torch.cat([self.token_mask, token_mask], dim=1)
        self.token_mask = token_mask
        return token_mask

    def reorder(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Continue with other rows: `rows[i]` becomes row i; a row may be taken many or no times.

        Args:
            rows: int64, indices of the present rows; consecutive for each sentence, equally many.
            sentences: int64, indices of the sentences that remain; None for all.
        """
        self.past = [past and (past[0][rows], past[1][rows]) for past in self.past]
        self.token_mask = None if self.token_mask is None else self.token_mask[rows]
        if sentences is not None:
            self.source_keys_values = [
                (keys[sentences], values[sentences]) for keys, values in self.source_keys_values
            ]
            if self.source_mask is not None:
                self.source_mask = self.source_mask[sentences]


class Stack(nn.Module):
    """What encoder and decoder share: embeddings, positions, layers and the last norm."""

    version: Tensor

    def __init__(
        self,
        embed_tokens: nn.Embedding | AdaptiveInput,
        vocabulary_size: int,
        padding_index: int,
        depth: int,
        final_norm: bool,
        layer: Mapping[str, Any],
        positions: str = "sinusoidal",
    ) -> None:
        super().__init__()
        self.positions = positions
        self.vocabulary_size = vocabulary_size
        self.padding_index = padding_index
        self.embed_dim: int = layer["embed_dim"]
        self.dropout: float = layer["dropout"]
        self.register_buffer("version", torch.tensor([3.0]))  # of fairseq's checkpoints
        self.embed_tokens = embed_tokens
        self.embed_positions: SinusoidalPositions | None = None
        if positions == "sinusoidal":
            self.embed_positions = SinusoidalPositions(self.embed_dim, padding_index)
        layers = [TransformerLayer(**layer) for _ in range(depth)]
        self.layers: nn.ModuleList = nn.ModuleList(layers)
        self.layer_norm: nn.LayerNorm | None = nn.LayerNorm(self.embed_dim) if final_norm else None

    def embed(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(rows, tokens, dim) scaled embeddings, plus positions that are not relative.

        Args:
            tokens: (rows, tokens).
            token_mask: (rows, all tokens) bool, False for padding; with those that came before.
        """
        self._check(tokens)
        x = math.sqrt(self.embed_dim) * self.embed_tokens(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(token_mask, tokens.size(1)).to(x.dtype)
        return F.dropout(x, self.dropout, self.training)

    def relative_positions(self, x: Tensor, total: int) -> Relative:
        """Those of embeddings `x` (rows, tokens, dim), the last of `total` tokens."""
        num_heads = cast(TransformerLayer, self.layers[0]).self_attn.num_heads
        head_dim = self.embed_dim // num_heads
        return relative_positions(self.positions, num_heads, head_dim, x.size(1), total, x)

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 of shape (batch, tokens), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        if values_known(tokens):
            wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary_size)]
            if wrong.numel():
                raise ValueError(
                    f"token {wrong[0].item()} is outside the vocabulary of {self.vocabulary_size}"
                )


class Encoder(Stack):
    """Self-attention of the source in both directions."""

    def forward(self, source: Tensor) -> EncodedSource:
        """What is known of source sentences (batch, tokens)."""
        token_mask = source != self.padding_index
        x = self.embed(source, token_mask)
        for layer in self.layers:
            x = layer(x, token_mask)
        return EncodedSource(x if self.layer_norm is None else self.layer_norm(x), token_mask)


class Decoder(Stack):
    """Causal self-attention, cross-attention to a source if there is one, and the output layer."""

    def __init__(
        self,
        embed_tokens: nn.Embedding | AdaptiveInput,
        output: Mapping[str, Any],
        tie_embeddings: bool = True,
        adaptive_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(embed_tokens, **options)
        self.adaptive_softmax: AdaptiveOutput | None = None
        self.output_projection: Output | None = None
        if isinstance(embed_tokens, AdaptiveInput):
            if not tie_embeddings:
                raise ValueError(
                    "the adaptive output ties its embeddings to the adaptive input: leave "
                    "tie_embeddings=True, or use adaptive_cutoffs=None"
                )
            self.adaptive_softmax = AdaptiveOutput(
                embed_tokens, self.embed_dim, adaptive_dropout, output, self.padding_index
            )
            return
        if adaptive_dropout:
            raise ValueError(f"adaptive_dropout={adaptive_dropout} needs adaptive_cutoffs")
        weight = cast(nn.Parameter, embed_tokens.weight)
        if tie_embeddings:
            self.register_load_state_dict_pre_hook(_check_tied)
        else:
            weight = nn.Parameter(torch.empty_like(weight))
            nn.init.normal_(weight, std=self.embed_dim**-0.5)
        self.output_projection = Output(weight, output, self.padding_index)

    def new_cache(self, source: EncodedSource | None = None) -> Cache:
        """An empty cache; the keys and values of the source are computed here, once."""
        if source is None:
            return Cache(len(self.layers))
        attentions = [layer.encoder_attn for layer in cast(Iterable, self.layers)]
        keys_values = [attention.keys_values(source.features) for attention in attentions]
        return Cache(len(self.layers), keys_values, source.mask)

    def forward(self, tokens: Tensor, cache: Cache, incremental: bool = False) -> Tensor:
        """Features (rows, tokens, dim) of tokens (rows, tokens) that continue those of the cache.

        The cache is extended in place; `incremental` is for `official_mismatch`.
        """
        token_mask = cache.extend_mask(tokens != self.padding_index)
        x = self.embed(tokens, token_mask)
        positions = self.relative_positions(x, token_mask.size(1))
        sources = cache.source_keys_values or [None] * len(self.layers)
        for index, (layer, source) in enumerate(zip(self.layers, sources, strict=True)):
            x = layer(
                x,
                token_mask,
                causal=True,
                incremental=incremental,
                extend=partial(cache.extend, index),
                source_keys_values=source,
                source_mask=cache.source_mask,
                positions=positions,
            )
        return x if self.layer_norm is None else self.layer_norm(x)

    @property
    def output(self) -> Output | AdaptiveOutput:
        """The output layer."""
        adaptive = self.adaptive_softmax
        return cast(Output, self.output_projection) if adaptive is None else adaptive


def _check_tied(decoder: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    # Both names are one tensor here: two different ones would silently overwrite each other.
    embedding = state.get(prefix + "embed_tokens.weight")
    projection = state.get(prefix + "output_projection.weight")
    if embedding is None or projection is None or embedding is projection:
        return
    if embedding.shape == projection.shape and not torch.equal(embedding, projection):
        raise ValueError(
            "the state dict has different input and output embeddings, but the model ties them: "
            "build it with tie_embeddings=False"
        )


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raise ValueError for heads that do not share the width evenly."""
    if embed_dim % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide embed_dim={embed_dim}: "
            f"use embed_dim={math.ceil(embed_dim / num_heads) * num_heads} or another num_heads"
        )


def check_vocabulary(size: int, padding_index: int) -> None:
    """Raise ValueError for a padding index that is not in the vocabulary."""
    if padding_index >= size:
        raise ValueError(f"padding_index={padding_index} must be less than {size}, the vocabulary")
