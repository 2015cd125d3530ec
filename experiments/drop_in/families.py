"""Models with random weights, one of each family, and what they are called with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.drop_in import diffusers_models, x_transformers_models
from experiments.drop_in.stirring import stirred
from experiments.drop_in.transformers_models import INTERCEPTED, MODELS, REFUSED, inputs
from experiments.drop_in.transformers_models import build as build_transformers

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Args:
        package: where it is from.
        name: of the model.
        build: the model in evaluation mode, and the arguments of a call.
        bias_place: of the replacement.
    """

    package: str
    name: str
    build: Callable[[], Built]
    bias_place: str = "after"


TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "vit_pe_spatial_tiny_patch16_512",
    "fastvit_mci0",
    "gcvit_xxtiny",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "iformer_t",
    "levit_128s",
    "lowformer_b0",
    "test_coatnet",
    "test_maxvit",
    "caformer_s18",
    "mobilenetv4_hybrid_medium_075",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mvitv2_tiny",
    "naflexvit_base_patch16_gap",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "shvit_s1",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "twins_svt_small",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
    "eca_botnext26ts_256",
    "halonet_h1",
    "resnet50_clip",
    "resnest14d",
    "skresnet18",
    "gcresnext26ts",
    "lambda_resnet26t",
]
# SoftMax gets scores with the bias in them.
BEFORE = {"efficientformer_l1", "efficientformerv2_s0", "gcvit_xxtiny", "levit_128s", "mvitv2_tiny"}
BEFORE |= {"eca_botnext26ts_256", "halonet_h1", "maxvit_t"}
BEFORE |= set(x_transformers_models.BEFORE)
TORCHVISION = ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")


def families() -> list[Family]:
    """All of them, by package."""
    found = [Family("timm", name, _timm(name), _place(name)) for name in TIMM]
    found += [Family("torchvision", name, _torchvision(name), _place(name)) for name in TORCHVISION]
    models = {**MODELS, **INTERCEPTED, **REFUSED}
    found += [
        Family("transformers", name, _transformers(name), _transformers_place(name))
        for name in models
    ]
    found += [
        Family("diffusers", name, _diffusers(name))
        for name in {**diffusers_models.MODELS, **diffusers_models.REFUSED}
    ]
    found += [
        Family("x-transformers", name, partial(x_transformers_models.build, name), _place(name))
        for name in x_transformers_models.MODELS
    ]
    found += [
        Family("torch", "TransformerEncoder", _encoder),
        Family("torch", "Transformer", _transformer),
    ]
    return found


def _place(name: str) -> str:
    return "before" if name in BEFORE else "after"


def _transformers_place(name: str) -> str:
    return INTERCEPTED[name][-1] if name in INTERCEPTED else "after"


def _transformers(name: str) -> Callable[[], Built]:
    def build() -> Built:
        model = stirred(build_transformers(name))
        return model, (), inputs(name, model)

    return build


def _diffusers(name: str) -> Callable[[], Built]:
    def build() -> Built:
        model, inputs = diffusers_models.build(name)
        return model, (), {**inputs, "return_dict": False}

    return build


def _timm(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        torch.manual_seed(0)
        model: Any = stirred(timm.create_model(name))
        images = torch.randn(2, *model.pretrained_cfg["input_size"])
        return _settled(model, images), (images,), {}

    return build


def _torchvision(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        torch.manual_seed(0)
        images = torch.randn(2, 3, 224, 224)
        model = _settled(stirred(torchvision.models.get_model(name)), images)
        return model, (images,), {}

    return build


def _settled(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The model in evaluation mode, with batch statistics of the images."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _encoder() -> Built:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
    padding = torch.arange(20) > torch.tensor([[19], [12]])
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    return model, (torch.randn(2, 20, 64),), {"src_key_padding_mask": padding}


def _transformer() -> Built:
    torch.manual_seed(0)
    model = nn.Transformer(64, 4, 2, 2, batch_first=True).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    return model, (torch.randn(2, 20, 64), torch.randn(2, 9, 64)), {"tgt_mask": causal}
