"""fairseq's multi-head attention over any normalizer."""

from collections.abc import Mapping
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor

from multimax.functional import masked_softmax, to_compute_precision
from multimax.normalizers import Normalizer, build_normalizer, options_in_attention


def normalize_attention(
    attention: MultiheadAttention, normalizer: Mapping[str, Any], official_mismatch: bool = False
) -> None:
    """Give a module of fairseq another normalizer, in place; names of parameters stay.

    Args:
        attention: the module.
        normalizer: name and options, also "before_scale" of `build_for_attention`. Plain SoftMax
            leaves the module as it is.
        official_mismatch: plain SoftMax in incremental decoding, as in the official code.

    Raises:
        ValueError: the module uses xFormers, which does its own normalization.
    """
    if dict(normalizer) == {"name": "softmax"}:
        return
    if attention.use_xformers:
        raise ValueError("xFormers attention takes no normalizer: leave *_xformers_att_config out")
    attention.__class__ = NormalizedAttention
    options = options_in_attention(normalizer, attention.head_dim)
    attention.normalizer = build_normalizer(**options)
    attention.official_mismatch = official_mismatch
    # fairseq's switch for its own code instead of torch's fused attention, which has no hook.
    attention._set_skip_embed_dim_check()


class NormalizedAttention(MultiheadAttention):
    """Attention in the order: scale, modulate, mask, normalize, dropout.

    fairseq computes and masks the scores, in training and teacher forcing as in incremental
    decoding; what follows its SoftMax is done here with the same operations. Identity scalars thus
    give the very bits of fairseq.
    """

    normalizer: Normalizer
    official_mismatch: bool
    _plain = False

    def apply_sparse_mask(self, attn_weights: Tensor, *_: Any) -> Tensor:
        """The scores that are masked next; fairseq calls this between QK^T and the masks."""
        first = self.normalizer.modulates_first and not self._plain
        return self.normalizer.modulate(attn_weights) if first else attn_weights

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        need_weights: bool = True,
        need_head_weights: bool = False,
        incremental_state: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results are those of the stock module."""
        self._plain = self.official_mismatch and incremental_state is not None
        scores, values = super().forward(
            query,
            key,
            value,
            incremental_state=incremental_state,
            before_softmax=True,
            **options,
        )
        targets, rows, _ = query.shape
        probabilities = self._normalize(scores, rows)
        dropped = self.dropout_module(probabilities.type_as(values))
        heads = self._weighted_sum(dropped, values, rows)
        output = self.out_proj(heads.transpose(0, 1).contiguous().view(targets, rows, -1))
        if not (need_weights or need_head_weights):
            return output, None
        weights = probabilities.view(rows, self.num_heads, targets, -1).transpose(1, 0)
        return output, weights if need_head_weights else weights.mean(dim=0)

    def _normalize(self, scores: Tensor, rows: int) -> Tensor:
        """Probabilities, fp32 or wider, of masked scores (rows * heads, targets, sources)."""
        mask = scores != -torch.inf
        scores = to_compute_precision(scores)
        if self._plain:
            return masked_softmax(scores, -1, mask)
        by_head = (rows, self.num_heads, *scores.shape[1:])
        module = self.normalizer
        normalize = module.normalize_modulated if module.modulates_first else module
        probabilities = normalize(scores.view(by_head), mask=mask.view(by_head))
        return probabilities.view(scores.shape)

    def _weighted_sum(self, probabilities: Tensor, values: Tensor, rows: int) -> Tensor:
        """(rows * heads, targets, head_dim), also where hypotheses share the values of a source."""
        sentences = values.size(0) // self.num_heads
        if not self.encoder_decoder_attention or sentences == rows:
            return torch.bmm(probabilities, values)
        heads = torch.einsum(
            "bxhts,bhsd->bxhtd",
            probabilities.view(sentences, -1, self.num_heads, *probabilities.shape[1:]),
            values.view(sentences, self.num_heads, *values.shape[1:]),
        )
        return heads.reshape(-1, *heads.shape[-2:])
