"""Transformer language and translation models over any normalizer, with fairseq's names.

State dicts of fairseq's `transformer_lm`, `transformer_lm_wiki103` and `transformer_iwslt_de_en`
load with strict=True. Weights are drawn as fairseq draws them.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from multimax.models.adaptive import AdaptiveInput, AdaptiveOutput
from multimax.models.output import Output, word_embedding
from multimax.models.positions import check_positions
from multimax.models.sharing import share_scalars, take_shared
from multimax.models.transformer_stacks import (
    Cache,
    Decoder,
    EncodedSource,
    Encoder,
    check_heads,
    check_vocabulary,
)
from multimax.options import Count, Depth, Rate, Whole, Width, checked

Positions = Literal["sinusoidal", "none", "alibi", "nape", "rotary"]
EmbedDim = Annotated[int, Field(ge=4, le=2**17)]  # for sinusoidal positions

__all__ = ["Cache", "EncodedSource", "LanguageModel", "TranslationModel"]


class LanguageModel(nn.Module):
    """A decoder-only Transformer that predicts the next word.

    `model(tokens)` are features; `model.output` turns them into scores, probabilities or a loss.

    Args:
        vocabulary_size: number of words.
        padding_index: the word that stands for nothing.
        embed_dim: width, a multiple of `num_heads`.
        ffn_dim: width of the MLPs.
        depth: number of layers.
        num_heads: number of heads.
        attention: name and options of the attention normalizer, `{"name": "multimax"}`; each
            layer has its own scalars, with "shared": True all have the same.
        output: name and options of the output normalizer.
        pre_norm: normalize before each part of a layer, not after it.
        final_norm: with `pre_norm`, normalize the features.
        dropout: of the embeddings and of each part of a layer.
        attention_dropout: of the attention probabilities.
        activation_dropout: inside the MLPs.
        tie_embeddings: one table for input and output words.
        adaptive_cutoffs: ends of the bands of an adaptive input and output, without the last;
            None for full ones.
        adaptive_factor: how much narrower each band is than the one before.
        adaptive_dropout: of the adaptive output.
        official_mismatch: as the official fairseq code does, use plain SoftMax in the place of
            the attention normalizer in incremental decoding (`step`), which thus differs from
            training.
        positions: "sinusoidal" ones are added to the embeddings. Relative ones are within attention
            alone: "alibi" and "nape" a bias that falls with the distance, for all heads or the
            second half of them, "rotary" a rotation of queries and keys. "none" leaves them out.

    Raises:
        ValueError: an option is unknown, out of range, or does not go with another.

    Source: fairseq's `transformer_lm` (defaults) and `transformer_lm_wiki103`.
    """

    @checked
    def __init__(
        self,
        vocabulary_size: Count,
        padding_index: Whole,
        *,
        embed_dim: EmbedDim,
        ffn_dim: Width,
        depth: Depth,
        num_heads: Width,
        attention: Mapping[str, Any],
        output: Mapping[str, Any],
        pre_norm: bool = True,
        final_norm: bool = True,
        dropout: Rate = 0.0,
        attention_dropout: Rate = 0.0,
        activation_dropout: Rate = 0.0,
        tie_embeddings: bool = True,
        adaptive_cutoffs: Sequence[Count] | None = None,
        adaptive_factor: Count = 4,
        adaptive_dropout: Rate = 0.0,
        official_mismatch: bool = False,
        positions: Positions = "sinusoidal",
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_positions(positions, num_heads, embed_dim)
        check_vocabulary(vocabulary_size, padding_index)
        self.padding_index = padding_index
        normalizer, shared = take_shared(attention)
        if adaptive_cutoffs is None:
            embed_tokens = word_embedding(vocabulary_size, embed_dim, padding_index)
        else:
            embed_tokens = AdaptiveInput(
                vocabulary_size, adaptive_cutoffs, embed_dim, adaptive_factor, padding_index
            )
        self.decoder: Decoder = Decoder(
            embed_tokens,
            output,
            tie_embeddings,
            adaptive_dropout,
            vocabulary_size=vocabulary_size,
            padding_index=padding_index,
            depth=depth,
            final_norm=pre_norm and final_norm,
            positions=positions,
            layer=dict(
                embed_dim=embed_dim,
                ffn_dim=ffn_dim,
                self_attention=dict(
                    num_heads=num_heads,
                    normalizer=normalizer,
                    dropout=attention_dropout,
                    official_mismatch=official_mismatch,
                ),
                cross_attention=None,
                pre_norm=pre_norm,
                dropout=dropout,
                activation_dropout=activation_dropout,
            ),
        )
        if shared:
            share_scalars(self, (layer.self_attn for layer in self.decoder.layers))

    @property
    def output(self) -> Output | AdaptiveOutput:
        """The output layer."""
        return self.decoder.output

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (batch, tokens, dim) of tokens (batch, tokens); each sees the earlier ones.

        Raises:
            ValueError: a token is outside the vocabulary (checked on the CPU only, and not when
                compiled or exported), or `tokens` has a wrong shape or dtype.
        """
        return self.decoder(tokens, self.decoder.new_cache())

    def new_cache(self) -> Cache:
        """What `step` needs to begin."""
        return self.decoder.new_cache()

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Features (rows, tokens, dim) of further tokens (rows, tokens), usually one.

        They continue those of earlier calls with the same cache, which is extended in place.
        """
        return self.decoder(tokens, cache, incremental=True)


class TranslationModel(nn.Module):
    """An encoder-decoder Transformer that predicts the next target word from a source sentence.

    `model(source, target_in)` are features; `model.output` turns them into scores, probabilities
    or a loss. For incremental decoding, use `encode`, `new_cache` and `step`.

    Args:
        source_vocabulary_size: number of source words.
        target_vocabulary_size: number of target words.
        padding_index: the word that stands for nothing, in both vocabularies.
        embed_dim, ffn_dim, num_heads: as in `LanguageModel`, for encoder and decoder.
        encoder_depth: number of layers of the encoder.
        decoder_depth: number of layers of the decoder.
        attention: name and options of the attention normalizer; each layer has its own scalars,
            with "shared": True all have the same, but for those that the next three name.
        encoder_attention: normalizer of self-attention in the encoder, a name, or name and options;
            None is `attention`.
        decoder_attention: likewise, of self-attention in the decoder.
        cross_attention: likewise, of attention of the decoder to the source.
        output: name and options of the output normalizer.
        pre_norm: normalize before each part of a layer and at the end, not after each part.
        dropout, attention_dropout, activation_dropout, tie_embeddings: as in `LanguageModel`; the
            tied tables are those of the decoder.
        official_mismatch: as the official fairseq code does, use plain SoftMax in cross-attention,
            and in the decoder's self-attention in incremental decoding (`step`), which thus
            differs from training.

    Raises:
        ValueError: an option is unknown, out of range, or does not go with another.

    Source: fairseq's `transformer_iwslt_de_en` (defaults).
    """

    @checked
    def __init__(
        self,
        source_vocabulary_size: Count,
        target_vocabulary_size: Count,
        padding_index: Whole,
        *,
        embed_dim: EmbedDim,
        ffn_dim: Width,
        encoder_depth: Depth,
        decoder_depth: Depth,
        num_heads: Width,
        attention: Mapping[str, Any],
        output: Mapping[str, Any],
        encoder_attention: str | Mapping[str, Any] | None = None,
        decoder_attention: str | Mapping[str, Any] | None = None,
        cross_attention: str | Mapping[str, Any] | None = None,
        pre_norm: bool = False,
        dropout: Rate = 0.0,
        attention_dropout: Rate = 0.0,
        activation_dropout: Rate = 0.0,
        tie_embeddings: bool = True,
        official_mismatch: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_vocabulary(source_vocabulary_size, padding_index)
        check_vocabulary(target_vocabulary_size, padding_index)
        if official_mismatch:
            if cross_attention is not None:
                raise ValueError(
                    "official_mismatch=True makes cross-attention plain SoftMax: leave "
                    "cross_attention=None"
                )
            cross_attention = {"name": "softmax"}
        self.padding_index = padding_index
        normalizer, shared = take_shared(attention)

        def attend(own: str | Mapping[str, Any] | None, official_mismatch: bool = False) -> dict:
            named = {"name": own} if isinstance(own, str) else own
            return dict(
                num_heads=num_heads,
                normalizer=named or normalizer,
                dropout=attention_dropout,
                official_mismatch=official_mismatch,
            )

        layer = dict(
            embed_dim=embed_dim,
            ffn_dim=ffn_dim,
            pre_norm=pre_norm,
            dropout=dropout,
            activation_dropout=activation_dropout,
        )
        self.encoder: Encoder = Encoder(
            word_embedding(source_vocabulary_size, embed_dim, padding_index),
            source_vocabulary_size,
            padding_index,
            encoder_depth,
            pre_norm,
            layer | dict(self_attention=attend(encoder_attention), cross_attention=None),
        )
        self.decoder: Decoder = Decoder(
            word_embedding(target_vocabulary_size, embed_dim, padding_index),
            output,
            tie_embeddings,
            vocabulary_size=target_vocabulary_size,
            padding_index=padding_index,
            depth=decoder_depth,
            final_norm=pre_norm,
            layer=layer
            | dict(
                self_attention=attend(decoder_attention, official_mismatch),
                cross_attention=attend(cross_attention),
            ),
        )
        if shared:
            encoder, decoder = self.encoder.layers, self.decoder.layers
            layers = [
                *(layer.self_attn for layer in encoder if encoder_attention is None),
                *(layer.self_attn for layer in decoder if decoder_attention is None),
                *(layer.encoder_attn for layer in decoder if cross_attention is None),
            ]
            share_scalars(self, layers)

    @property
    def output(self) -> Output | AdaptiveOutput:
        """The output layer."""
        return self.decoder.output

    def encode(self, source: Tensor) -> EncodedSource:
        """What is known of source sentences (sentences, tokens)."""
        return self.encoder(source)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Features (sentences, target tokens, dim); each target token sees the earlier ones.

        Args:
            source: (sentences, source tokens).
            target_in: (sentences, target tokens), the target shifted to the right.

        Raises:
            ValueError: a token is outside its vocabulary (checked on the CPU only, and not when
                compiled or exported), or a tensor has a wrong shape or dtype.
        """
        return self.decoder(target_in, self.new_cache(self.encode(source)))

    def new_cache(self, encoded: EncodedSource) -> Cache:
        """What `step` needs to begin."""
        return self.decoder.new_cache(encoded)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Features (rows, tokens, dim) of further target tokens (rows, tokens), usually one.

        They continue those of earlier calls with the same cache, which is extended in place.
        """
        return self.decoder(tokens, cache, incremental=True)
