"""The attention function that transformers calls in the place of its own."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimax.attention import attention
from multimax.functional import eager_attention, repeat_heads
from multimax.normalizers import Normalizer, SoftMax
from multimax.replacement.additive import split_additive
from multimax.replacement.multi_head import unit_values

# Arguments of attention functions that change what is normalized, and what each is.
REFUSED = {
    "s_aux": "SoftMax has a learned sink beside the keys",
    "sinks": "SoftMax has a learned sink beside the keys",
    "indices": "the keys of a query are chosen by an index that only its own attention reads",
    "block_indices": "the keys of a query are chosen by an index that only its own attention reads",
    "head_mask": "heads are masked after SoftMax",
}


@dataclass(frozen=True)
class Capped:
    """A normalizer of scores that are capped before: `cap * tanh(scores / cap)`."""

    normalizer: Normalizer
    cap: float

    def __call__(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.normalizer(self.cap * torch.tanh(scores / self.cap), mask=mask)

    def biased(self, scores: Tensor, *rest: Any) -> Tensor:
        """As `Normalizer.biased`: the bias is not capped."""
        return self.normalizer.biased(self.cap * torch.tanh(scores / self.cap), *rest)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the normalizer of a module, as transformers calls it.

    Args:
        module: that calls it.
        query: (batch, heads, queries, head_dim).
        key: (batch, key_heads, keys, head_dim).
        value: (batch, key_heads, keys, value_dim).
        attention_mask: (batch, 1 or heads, queries, keys); None is all keys, or the causal ones.
        dropout: of the probabilities.
        scaling: of the scores.
        is_causal: whether no mask means the causal one; None is as the module says.
        position_bias: added to the scores.
        softcap: caps the scores by tanh, before the modulation.
        options: what else a model passes.

    Returns:
        (batch, queries, heads, value_dim), and the probabilities if attentions are asked for.

    Raises:
        RuntimeError: the module has no normalizer.
        ValueError: an option changes what is normalized.
    """
    for name, reason in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__}: {reason} ({name}), no normalizer knows that"
            )
    mask, bias = split_additive(attention_mask)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.size(2)
    causal = queries > 1 and attention_mask is None and bool(is_causal)
    if causal and key.size(2) > queries:  # an empty cache of fixed size: the rest is not filled
        key, value = key[:, :, :queries], value[:, :, :queries]
        bias = bias if bias is None else bias[..., :queries]

    def with_value(value: Tensor) -> Tensor:
        normalizer, place = _normalizer(module), getattr(module, "bias_place", "after")
        if softcap is None:
            return attention(
                query,
                key,
                value,
                normalizer,
                mask=mask,
                causal=causal,
                dropout=dropout,
                scale=scaling,
                bias=bias,
                bias_place=place,
            )
        scale = query.size(-1) ** -0.5 if scaling is None else scaling
        capped, keys_values = Capped(normalizer, softcap), repeat_heads(query, key, value)
        return eager_attention(
            query, *keys_values, capped, mask, causal, dropout, scale, bias, place
        )

    if not (options.get("output_attentions") or _recorded()):
        return with_value(value).transpose(1, 2).contiguous(), None
    probabilities = with_value(unit_values(key, value))
    value = value.repeat_interleave(query.size(1) // value.size(1), dim=1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _normalizer(module: nn.Module) -> Normalizer:
    normalizer = getattr(module, "normalizer", None)
    if isinstance(normalizer, Normalizer):
        return normalizer
    if getattr(module, "keeps_softmax", False):
        return SoftMax()
    raise RuntimeError(
        f"{type(module).__name__} has no normalizer: if its model was saved with one, load it by "
        "multimax.load_pretrained(model_class, folder); replace_softmax takes whole models, since "
        "all parts share a configuration"
    )


def _recorded() -> bool:
    """Whether transformers collects attention probabilities from what modules return."""
    if torch.compiler.is_compiling():
        return False
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    wanted = collector.get() if collector is not None else None
    return any("attentions" in name for name in wanted or ())
