"""Tiny models of diffusers with random weights, and what they are called with."""

from typing import Any

import torch
from torch import Tensor

from experiments.drop_in.stirring import stirred

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
LATENTS = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}
TEXT = {"caption_channels": 12, "cross_attention_dim": 8}
UNET = {
    **BLOCKS,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
PIXELS = {
    **BLOCKS,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
CODER = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4}
JOINT = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
SD3 = {**LATENTS, **HEADS, **JOINT, "num_layers": 2, "caption_projection_dim": 8}
SD3 |= {"pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
FLUX = {**JOINT, "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1}
FLUX |= {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
DIT = {**LATENTS, **HEADS, "num_layers": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 10}
PIXART = {**LATENTS, **HEADS, **TEXT, "num_layers": 2, "norm_num_groups": 4}
WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12}
WAN |= {"in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 16}
WAN |= {"num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32}
SANA = {**LATENTS, **HEADS, **TEXT, "patch_size": 1, "num_layers": 1}
SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4}
# Class, its options, and how many attention layers there are.
MODELS = {
    "UNet2DConditionModel": (UNET, 8),
    "UNet2DModel": (PIXELS, 4),
    "AutoencoderKL": (CODER, 2),
    "SD3Transformer2DModel": (SD3, 3),
    "FluxTransformer2DModel": (FLUX, 2),
    "DiTTransformer2DModel": (DIT, 2),
    "PixArtTransformer2DModel": ({**PIXART, "use_additional_conditions": False}, 4),
    "WanTransformer3DModel": (WAN, 4),
    "SanaTransformer2DModel": (SANA, 1),
}
REFUSED = {"WanTransformer3DModel, with images": {**WAN, "added_kv_proj_dim": 24, "image_dim": 6}}


def build(name: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A model in evaluation mode and the keyword arguments of a pass; `more` is for the model."""
    import diffusers

    torch.manual_seed(0)
    options = REFUSED[name] if name in REFUSED else MODELS[name][0]
    model = getattr(diffusers, name.partition(",")[0])(**{**options, **more})
    return stirred(model).eval(), inputs(name)


def inputs(name: str) -> dict[str, Any]:
    """Keyword arguments of a forward pass, with padding where there is any."""

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))

    latents, text, padding = numbers(2, 4, 8, 8), numbers(2, 5, 12), torch.ones(2, 5)
    padding[1, 3:] = 0
    times = torch.tensor([1, 2])
    if name == "UNet2DModel":
        return {"sample": numbers(2, 3, 8, 8), "timestep": times}
    if name == "AutoencoderKL":
        return {"sample": numbers(2, 3, 8, 8)}
    arguments = {"hidden_states": latents, "timestep": times, "encoder_hidden_states": text}
    if name == "UNet2DConditionModel":
        arguments["sample"] = arguments.pop("hidden_states")
    if name in ("UNet2DConditionModel", "PixArtTransformer2DModel", "SanaTransformer2DModel"):
        return {**arguments, "encoder_attention_mask": padding}
    if name == "DiTTransformer2DModel":
        return {"hidden_states": latents, "timestep": times, "class_labels": times}
    if name == "SD3Transformer2DModel":
        return {**arguments, "pooled_projections": numbers(2, 10)}
    if name == "FluxTransformer2DModel":
        places = {"img_ids": numbers(6, 3), "txt_ids": torch.zeros(5, 3)}
        arguments |= {"pooled_projections": numbers(2, 10), "timestep": times / 10}
        return {**arguments, **places, "hidden_states": numbers(2, 6, 4)}
    return {**arguments, "hidden_states": numbers(2, 4, 2, 8, 8)}
