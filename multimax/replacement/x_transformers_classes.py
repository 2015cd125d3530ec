"""What is known of the modules of x-transformers that normalize.

Its `Attention` has the heads. The `Attend` in it adds a bias to the scores before its SoftMax; that
is taken from there, and given to the normalizer apart.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F

from multimax.replacement.classes import AttentionClass
from multimax.replacement.interception import derive, intercept, with_bias

# Options of `Attend` that change what is normalized.
REFUSED = {
    "inverted_attention": "its SoftMax is over the queries",
    "cog_signed": "it normalizes the sizes of scores and gives the weights their signs",
    "selective": "it lowers scores by those of other queries",
    "head_learned_sink": "SoftMax has a learned sink beside the keys",
    "flash_pack_seq": "flash_attn normalizes inside its kernel: use attn_flash_pack_seq=False",
}


def _attention(module: Any) -> AttentionClass:
    attend = module.attend
    normalizing = attend.attn_fn
    while isinstance(normalizing, partial):
        normalizing = normalizing.func
    if normalizing is not F.softmax:
        name = getattr(normalizing, "__name__", type(normalizing).__name__)
        return AttentionClass(refused=f"it normalizes by {name}, not by SoftMax")
    for option, reason in REFUSED.items():
        if getattr(attend, option, False):
            return AttentionClass(refused=f"{reason} ({option})")
    if getattr(attend.cope, "soft_onehot", False):
        return AttentionClass(refused="its positions have a SoftMax of their own (soft_onehot)")
    return AttentionClass(biased_scores=_keeps_bias(attend), intercept=_intercept)


def _keeps_bias(attend: Any) -> bool:
    """Whether it reads the biased scores before it normalizes them."""
    return attend.softclamp_logits or attend.cope is not None


def _layers(module: Any) -> AttentionClass:
    if module.residual_attn or module.cross_residual_attn:
        return AttentionClass(refused="it adds the scores of a layer to those of the next one")
    return AttentionClass(container=True)


def _intercept(attention: Any) -> None:
    intercept(attention)
    attention.attend.__class__ = derive(type(attention.attend), _attend_forward)


def _attend_forward(self: Any, *args: Any, attn_bias: Any = None, **kwargs: Any) -> Any:
    forward = type(self).replaced_class.forward
    fused = self.flash and kwargs.get("attn_delta") is None  # torch gets the bias apart
    if attn_bias is None or fused or _keeps_bias(self):
        return forward(self, *args, attn_bias=attn_bias, **kwargs)
    if self.add_zero_kv:
        attn_bias = F.pad(attn_bias, (1, 0))
    out, intermediates = with_bias(attn_bias, forward, self, *args, **kwargs)
    intermediates.pre_softmax_attn = intermediates.pre_softmax_attn + attn_bias
    return out, intermediates


LAYERS = "it weighs layers"
PREFIX = "x_transformers.x_transformers."
CLASSES = {
    PREFIX + "Attention": _attention,
    **{PREFIX + name: _layers for name in ("AttentionLayers", "PrefixDecoder", "TransformerBlock")},
    PREFIX + "TransformerWrapper": AttentionClass(container=True),
    "x_transformers.entropy_based_tokenizer.EntropyBasedTokenizer": AttentionClass(container=True),
    "x_transformers.xl_autoregressive_wrapper.TTTMetaLearningTargetKLLoss": AttentionClass(
        container=True
    ),
    "x_transformers.attend.Attend": AttentionClass(
        refused="it is in no Attention of x-transformers, which has the heads"
    ),
    PREFIX + "AttentionResidual": AttentionClass(not_attention=LAYERS),
    PREFIX + "DynamicLIMe": AttentionClass(not_attention=LAYERS),
    PREFIX + "SoLU": AttentionClass(not_attention="it is an activation"),
    PREFIX + "CoPE": AttentionClass(not_attention="it weighs positions"),
}
