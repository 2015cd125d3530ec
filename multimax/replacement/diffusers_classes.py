"""What is known of the modules of diffusers that normalize.

Most of them leave that to a processor, an object that can be exchanged. Those of diffusers call
torch's attention or `get_attention_scores` once, except for the ones below.
"""

import re
import sys
from typing import Any

from torch import Tensor

from multimax.replacement.classes import NORMALIZES, AttentionClass, names_used, qualified_name
from multimax.replacement.interception import derive, intercepted_forward, with_bias

KERNEL = "it normalizes inside a kernel: use model.set_default_attn_processor()"
# Processors by their names, and why they are refused.
REFUSED = {
    "Sliced": "it normalizes slice by slice: use model.set_attention_slice(None)",
    "XFormers": "it normalizes inside a kernel: use "
    "model.disable_xformers_memory_efficient_attention()",
    "XLA|NPU": KERNEL,
    "IPAdapter": "text and images have a SoftMax each: use pipeline.unload_ip_adapter()",
    "PAG(CFG)?Joint": "guided and perturbed samples have a SoftMax each",
    "Flux2KV": "text and references have a SoftMax each",
    "Cosmos3": "understanding and generation have a SoftMax each",
    "QwenImage21AttnProcessor": "it normalizes segment by segment",
    "QwenImage21Flex|WanAnimate2AttnProcessor": "flex_attention normalizes inside its kernel",
}
LINEAR = "Linear|SanaMultiscale"
# They attend to images too where there is a projection for them.
IMAGES = "Wan|SkyReelsV2|CosmosAttnProcessor2_5"
# Backends of `dispatch_attention_fn` that call torch's attention.
BACKENDS = {"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"}


def with_processor(module: Any) -> AttentionClass | None:
    """What is known of a module of diffusers that has a processor; None if it is no such module."""
    processor = getattr(module, "processor", None)
    ours = any(base.__module__.startswith("diffusers.") for base in type(module).__mro__)
    if processor is None or not ours:
        return None
    name = type(processor).__name__
    if re.search(LINEAR, name):
        return AttentionClass(not_attention="it is linear, without a SoftMax")
    return AttentionClass(refused=_obstacle(module, processor), intercept=_intercept)


def _obstacle(module: Any, processor: Any) -> str | None:
    """Why no other normalizer can take the place of SoftMax in a processor; None if one can."""
    name = type(processor).__name__
    used = names_used(type(processor), "__call__", type(module)) & NORMALIZES
    if not type(processor).__module__.startswith("diffusers.") or not used:
        return (
            f"its processor {qualified_name(type(processor))} is not known: name it in also= if "
            "one call normalizes exactly once, scores over keys"
        )
    for pattern, reason in REFUSED.items():
        if re.search(pattern, name):
            return f"{name}: {reason}"
    images = getattr(module, "add_k_proj", None) or getattr(module, "k_img", None)
    if re.search(IMAGES, name) and images is not None:
        return f"{name}: text and images have a SoftMax each"
    if getattr(module, "use_differential", False):
        return f"{name}: it mixes two SoftMax distributions"
    backend = _backend(processor)
    if "dispatch_attention_fn" in used and backend not in BACKENDS:
        return (
            f"the attention backend {backend} normalizes inside its kernel: use "
            'model.set_attention_backend("native")'
        )
    return None


def _backend(processor: Any) -> str:
    """The name of the attention backend that a processor uses."""
    dispatch: Any = sys.modules["diffusers.models.attention_dispatch"]
    own = getattr(processor, "_attention_backend", None)
    return str((own or dispatch._AttentionBackendRegistry.get_active_backend()[0]).value)


def _intercept(module: Any) -> None:
    others = {"processor_class": type(module.processor)}
    if hasattr(module, "get_attention_scores"):
        others["get_attention_scores"] = _get_attention_scores
    module.__class__ = derive(type(module), _processed_forward, **others)


def _processed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if type(self.processor) is not type(self).processor_class:  # it was exchanged
        obstacle = _obstacle(self, self.processor)
        if obstacle:
            raise RuntimeError(f"{type(self).__name__} has another normalizer, but {obstacle}")
    return intercepted_forward(self, *args, **kwargs)


def _get_attention_scores(
    self: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    scores = type(self).replaced_class.get_attention_scores
    return with_bias(attention_mask, scores, self, query, key)


MODELS = "diffusers.models."
# Without a processor: one SoftMax of scores over keys.
PLAIN = """
autoencoders.autoencoder_kl_hunyuanimage.HunyuanImageAttentionBlock
autoencoders.autoencoder_kl_hunyuanimage_refiner.HunyuanImageRefinerAttnBlock
autoencoders.autoencoder_kl_hunyuanvideo15.HunyuanVideo15AttnBlock
autoencoders.autoencoder_kl_ltx2_audio.LTX2AudioAttnBlock
autoencoders.autoencoder_kl_qwenimage.QwenImageAttentionBlock
autoencoders.autoencoder_kl_qwenimage21.QwenImage21AttentionBlock
autoencoders.autoencoder_kl_wan.WanAttentionBlock
autoencoders.autoencoder_vidtok.VidTokAttnBlock
embeddings.AttentionPooling
embeddings.HunyuanDiTAttentionPool
embeddings.IPAdapterTimeImageProjectionBlock
embeddings.MochiAttentionPool
transformers.consisid_transformer_3d.PerceiverAttention
transformers.consisid_transformer_3d.PerceiverCrossAttention
transformers.transformer_sana_wm.SanaWMSoftmaxAttention
transformers.transformer_sana_wm.SanaWMSoftmaxCamAttention
unets.unet_1d_blocks.SelfAttention1d
"""
EXPERTS = "it chooses experts"
NOT_ATTENTION = {
    "condition_embedders.condition_embedder_minimax_music3.MiniMaxMusic3ConditionEncoder": "it "
    "weighs layers",
    "transformers.transformer_hidream_image.MoEGate": EXPERTS,
    "transformers.transformer_nucleusmoe_image.NucleusMoELayer": EXPERTS,
}
CLASSES = {
    **{MODELS + name: AttentionClass() for name in PLAIN.split()},
    **{MODELS + name: AttentionClass(not_attention=use) for name, use in NOT_ATTENTION.items()},
}
