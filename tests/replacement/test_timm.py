"""Models of timm and torchvision with another normalizer, and the table of their modules."""

import copy
import importlib
import inspect
import pkgutil

import pytest
import timm
import torch
from torch import nn

from experiments.drop_in.stirring import stirred
from multimax import MultiMax, replace_softmax, restore_softmax, verify_replacement
from multimax.replacement.classes import (
    defining_class,
    known_classes,
    normalizes,
    qualified_name,
)

SMALL = {"img_size": 32, "num_classes": 10}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {**SMALL, "img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2)}
# Model, its options, images, attention layers.
MODELS = {
    "plain": ("vit_tiny_patch16_224", VIT, 32, 2),
    "pooled by attention": ("vit_tiny_patch16_224", {**VIT, "global_pool": "map"}, 32, 3),
    "BEiT": ("beit_base_patch16_224", VIT, 32, 2),
    "EVA": ("eva02_tiny_patch14_224", VIT, 32, 2),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 56, 4),
    "CaiT": ("cait_xxs24_224", {**VIT, "init_values": 1.0}, 32, 4),
    "MaxViT": ("test_maxvit", {**SMALL, "img_size": 64}, 64, 8),
    "XCiT": ("xcit_nano_12_p16_224", {**VIT, "patch_size": 16, "eta": 1.0}, 32, 4),
    "SAM": (
        "samvit_base_patch16",
        {**VIT, "patch_size": 4, "window_size": 2, "global_attn_indexes": (1,)},
        32,
        2,
    ),
    "behind a ResNet": ("vit_tiny_r_s16_p8_224", {**SMALL, "img_size": 64, "depth": 2}, 64, 2),
    "mobile": ("mobilevit_xxs", {"num_classes": 10}, 192, 9),
    "LeViT": ("levit_128s", {"num_classes": 10}, 224, 11),
}
REFUSED = {
    "convit_tiny": "mixes two SoftMax distributions",
    "efficientvit_m0": "once for each head",
    "swinv2_tiny_window8_256": "adding -100",
    "levit_128s": 'bias_place="before"',
    "coat_tiny": "weighs positions, without a query",
    "resnet18": "no attention layer",
}


def build(name, **changed):
    model, options, size, _ = MODELS[name]
    torch.manual_seed(0)
    model = stirred(timm.create_model(model, **{**options, **changed})).eval()
    return model, torch.randn(2, 3, size, size)


def move(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiMax):
                module.ts.copy_(torch.randn(module.ts.shape, generator=generator) / 2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_module_of_timm_that_normalizes_is_known():
    unknown = set()
    for package in (timm.models, timm.layers):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for kind in vars(importlib.import_module(found.name)).values():
                own = inspect.isclass(kind) and kind.__module__ == found.name
                if own and issubclass(kind, nn.Module) and normalizes(kind):
                    unknown.add(qualified_name(defining_class(kind)))
    assert len(unknown) > 70
    assert unknown <= set(known_classes())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_starts_as_itself_and_comes_back(name):
    model, images = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
    place = "before" if name == "LeViT" else "after"
    report = replace_softmax(model, bias_place=place)
    assert len(report.attention) == MODELS[name][-1]
    verification = verify_replacement(model, images)
    assert verification.evaluation < 3e-6
    assert (
        verification.training is None or verification.training < 1e-4
    )  # batches of two are normalized
    assert verification.called == verification.normalizers == MODELS[name][-1]
    assert all(gradient > 0 for gradient in verification.gradients.values())
    again = copy.deepcopy(model)
    move(model)
    with torch.no_grad():
        assert (model(images) - expected).abs().max() > 1e-4
        again.load_state_dict(model.state_dict())
        assert again(images).equal(model(images))
    restore_softmax(model)
    model.load_state_dict(state)
    with torch.no_grad():
        assert model(images).equal(expected)
    assert not [type(m) for m in model.modules() if hasattr(type(m), "replaced_class")]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_right_is_refused(name):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        replace_softmax(model)


def test_relative_positions_and_windows_are_added_after_the_modulation():
    model, images = build("Swin")
    replace_softmax(model)
    block = model.layers[0].blocks[1]  # of shifted windows
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs, scores=args[0])

    block.attn.normalizer.register_forward_pre_hook(look, with_kwargs=True)
    model(images)
    assert seen["bias"].unique().numel() > 2
    assert (seen["bias"] < -90).any()
    assert seen["scores"].min() > -50


def test_the_choice_of_a_fused_kernel_comes_back():
    model, images = build("Swin")
    assert not model.layers[0].blocks[0].attn.fused_attn
    with torch.no_grad():
        expected = model(images)
        replace_softmax(model)
        assert model.layers[0].blocks[0].attn.fused_attn
        restore_softmax(model)
        assert not model.layers[0].blocks[0].attn.fused_attn
        assert model(images).equal(expected)


@pytest.mark.slow
def test_checkpoints_autocast_and_one_graph():
    model, images = build("plain")
    replace_softmax(model)
    move(model)
    model.set_grad_checkpointing()
    model(images).square().sum().backward()
    own = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(False)
    expected = model(images)
    expected.square().sum().backward()
    for ours, parameter in zip(own, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, atol=0.05, rtol=0.05)


def test_pretrained_weights_from_a_file(tmp_path):
    model, images = build("plain")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    file = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    name, options, *_ = MODELS["plain"]
    torch.manual_seed(1)
    loaded = timm.create_model(name, **options, pretrained=True, pretrained_cfg_overlay=file)
    replace_softmax(loaded.eval())
    torch.testing.assert_close(loaded(images), model(images), atol=1e-6, rtol=1e-5)


def test_the_output_layer_of_a_classifier():
    model, images = build("plain")
    scores = model(images)
    report = replace_softmax(model, attention=False, output=True)
    assert [entry.name for entry in report.output] == ["head"]
    move(model)
    torch.testing.assert_close(model(images), model.head.normalizer.modulate(scores))
    with pytest.raises(ValueError, match="sparsemax is not SoftMax of other scores"):
        replace_softmax(build("plain")[0], "sparsemax", output=True)


@pytest.mark.slow
def test_models_of_torchvision():
    from torchvision.models import VisionTransformer, maxvit_t, swin_t

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight)
    report = replace_softmax(model, output=True)
    assert (len(report.attention), [entry.name for entry in report.output]) == (2, ["heads.head"])
    verification = verify_replacement(model, torch.randn(2, 3, 32, 32))
    assert verification.evaluation < 2e-6
    assert verification.called == verification.normalizers == 2
    assert len(verification.gradients) == 3
    with pytest.raises(ValueError, match="adding -100"):
        replace_softmax(swin_t())
    with pytest.raises(ValueError, match='bias_place="before"'):
        replace_softmax(maxvit_t(input_size=(224, 224)))
