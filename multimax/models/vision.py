"""Vision transformers: timm's own, with any normalizer in attention and output."""

import copyreg
import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import AfterValidator, Field
from timm.layers.attention import Attention
from timm.models import register_notrace_module
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from multimax.attention import attention
from multimax.functional import function_transforms_active
from multimax.models.official_names import rename_official_keys
from multimax.models.sharing import share_scalars, take_shared
from multimax.normalizers import Normalizer, build_for_attention, build_for_output
from multimax.options import Count, Depth, Rate, Width, checked


class NormalizedAttention(Attention):
    """timm's self-attention with another normalizer in the place of SoftMax.

    Subclasses made by `normalized_attention` bind the normalizer. Each layer has its own, shared
    by the heads of the layer. `torch.compile` and `torch.export` make one graph of it; torch.fx
    takes it as a whole, as a leaf. `torch.jit.script`, which torch has deprecated, cannot compile
    the normalizers: use `torch.jit.trace` or `torch.export`.

    Args:
        dim: embedding dimension, a multiple of `num_heads` unless `attn_head_dim` is given.
        num_heads: number of heads.
        options: those of timm's `Attention`; its `device` and `dtype` hold for the normalizer too.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or an option of the normalizer is bad.
    """

    normalizer_options: Mapping[str, Any]
    normalizer: Normalizer

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        if options.get("attn_head_dim") is None and dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide embed_dim={dim}: "
                f"use embed_dim={math.ceil(dim / num_heads) * num_heads} or another num_heads"
            )
        super().__init__(dim, num_heads, **options)
        normalizer = build_for_attention(self.normalizer_options, num_heads, self.head_dim)
        self.normalizer = normalizer.to(options.get("device"), options.get("dtype"))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Self-attention.

        Args:
            x: (batch, tokens, dim).
            attn_mask: broadcastable to (batch, heads, tokens, tokens); bool with True where a
                token may be attended, or additive with 0 there and -inf elsewhere.
            is_causal: let each token attend to itself and earlier ones only.

        Returns:
            (batch, tokens, dim).

        Raises:
            ValueError: an additive mask has other finite values than 0 (not checked when compiled
                or exported).
        """
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        heads = attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            self.normalizer,
            mask=_boolean_mask(attn_mask),
            causal=is_causal,
            dropout=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
        )
        x = self.norm(heads.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


register_notrace_module(NormalizedAttention)


class _Bound(type):
    """The type of the classes made by `normalized_attention`, which pickle makes anew.

    They have no name to be found by; a model of timm holds its attention class, as its modules do.
    """


def _reduce_bound(kind: Any) -> str | tuple[Any, ...]:
    if "normalizer_options" not in vars(kind):  # a subclass, which has a name
        return kind.__qualname__
    return _bind, (dict(kind.normalizer_options),)


copyreg.pickle(_Bound, _reduce_bound)  # pyright: ignore[reportArgumentType]


def _boolean_mask(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    boolean = mask == 0
    in_graph = torch.compiler.is_compiling() or function_transforms_active()
    if not in_graph and not (boolean | (mask == -math.inf)).all():
        raise ValueError(
            "an additive attn_mask may hold only 0 and -inf: a finite bias is not defined for a "
            "general normalizer; pass a boolean mask"
        )
    return boolean


def normalized_attention(name: str, **options: Any) -> type[NormalizedAttention]:
    """An attention class for timm's `attn_layer=`, bound to a normalizer.

    Args:
        name: one of `registered_normalizers()`.
        options: arguments of the normalizer, and those of `build_for_attention`.
    """
    return _bind({"name": name, **options})


def _bind(options: Mapping[str, Any]) -> type[NormalizedAttention]:
    name = f"NormalizedAttention[{options['name']}]"
    return _Bound(name, (NormalizedAttention,), {"normalizer_options": options})


def _check_architecture(architecture: str) -> str:
    modules = ("deit", "vision_transformer")
    names = [name for module in modules for name in timm.list_models(module=module)]
    known = [name for name in names if "distilled" not in name]  # those have a second head
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known) or ["deit_small_patch16_224"]
        raise ValueError(
            f"architecture {architecture!r} is not a plain vision transformer of timm; "
            f"use one such as {', '.join(close)}"
        )
    return architecture


Architecture = Annotated[str, AfterValidator(_check_architecture)]
PatchSize = Annotated[int, Field(ge=1, le=1024)]
MlpRatio = Annotated[float, Field(gt=0, le=1000)]


@checked
def build_vision_transformer(
    architecture: Architecture = "deit_small_patch16_224",
    *,
    attention: Mapping[str, Any],
    output: Mapping[str, Any],
    num_classes: Count,
    image_size: Count,
    in_channels: Count = 3,
    class_token: bool = False,
    qkv_bias: bool = False,
    norm: Literal["norm_then_pool", "pool_then_norm"] = "norm_then_pool",
    gradient_checkpointing: bool = False,
    drop_path: Rate = 0.0,
    dropout: Rate = 0.0,
    attention_dropout: Rate = 0.0,
    patch_size: PatchSize | None = None,
    embed_dim: Width | None = None,
    depth: Depth | None = None,
    num_heads: Width | None = None,
    mlp_ratio: MlpRatio | None = None,
) -> VisionTransformer:
    """A timm vision transformer over any normalizer, with new weights (DeiT's initialization).

    `model(images)` are the raw scores of the classes; `model.output`, the normalizer of the output
    layer, turns them into probabilities and says which loss belongs to them. State dicts of the
    official MultiMax code load as they are.

    Args:
        architecture: a vision transformer of timm with plain blocks.
        attention: name and options of the attention normalizer, `{"name": "multimax"}`; each layer
            has its own scalars, with "shared": True all have the same.
        output: name and options of the output normalizer.
        num_classes: >= 1.
        image_size: height and width in pixels, a multiple of the patch size.
        in_channels: channels of the images.
        class_token: classify from a class token (the published DeiT); without, from the mean over
            the patches (the MultiMax paper).
        qkv_bias: biases in the query, key and value projection; the MultiMax paper has none.
        norm: "norm_then_pool" (the MultiMax paper) or "pool_then_norm" (timm's `fc_norm`).
        gradient_checkpointing: recompute each block in the backward pass, to save memory.
        drop_path: probability of skipping the last block; it grows from 0 linearly.
        dropout: of the embeddings, the attention projections and the MLPs.
        attention_dropout: of the attention probabilities.
        patch_size: pixels; None, here and below, is the architecture's.
        embed_dim: embedding dimension, a multiple of the number of heads.
        depth: number of blocks.
        num_heads: number of heads.
        mlp_ratio: width of the MLPs as a multiple of the embedding dimension.

    Raises:
        ValueError: an option is unknown, out of range, or does not go with another.

    Source: Touvron et al., DeiT, ICML 2021; Zhou et al., MultiMax, ICML 2024.
    """
    sizes = dict(
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
    )
    overrides: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if class_token and norm == "pool_then_norm":
        raise ValueError(
            "norm='pool_then_norm' needs class_token=False: with a class token nothing is pooled; "
            "use norm='norm_then_pool'"
        )
    normalizer, shared = take_shared(attention)
    model = timm.create_model(
        architecture,
        attn_layer=normalized_attention(**normalizer),
        num_classes=num_classes,
        img_size=image_size,
        in_chans=in_channels,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=norm == "pool_then_norm",
        qkv_bias=qkv_bias,
        drop_path_rate=drop_path,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=attention_dropout,
        **overrides,
    )
    model = _check_model(model, architecture, image_size)
    if isinstance(model.cls_token, nn.Parameter):
        nn.init.trunc_normal_(model.cls_token, std=0.02)  # timm has moved to 1e-6 since DeiT
    model.output = build_for_output(output)
    model.set_grad_checkpointing(gradient_checkpointing)
    model.register_load_state_dict_pre_hook(rename_official_keys)
    if shared:
        share_scalars(model, (block.attn for block in model.blocks))
    return model


def _check_model(model: nn.Module, architecture: str, image_size: int) -> VisionTransformer:
    """`model` itself; ValueError where timm silently did something else than was asked for."""
    if type(model) is not VisionTransformer or not all(
        isinstance(getattr(block, "attn", None), NormalizedAttention) for block in model.blocks
    ):
        raise ValueError(
            f"architecture {architecture!r} does not let its attention be replaced: "
            "use one with plain blocks, such as deit_small_patch16_224"
        )
    patch_size = model.patch_embed.patch_size[0]
    if image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(
            f"image_size={image_size} is not a multiple of patch_size={patch_size}: "
            f"use image_size={nearest} or another patch_size"
        )
    return model
