"""What timm and torch do with a model beside running it: pickle, devices, dtypes, fx, tracing."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_modules

from multimax.models.vision import (
    NormalizedAttention,
    build_vision_transformer,
    normalized_attention,
)

ATTENTION = {"name": "softmax", "temperature": 0.5, "learned": True}
SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=5)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(attention=ATTENTION):
    torch.manual_seed(0)
    return build_vision_transformer(
        attention=attention, output={"name": "multimax"}, num_classes=5, image_size=32,
        patch_size=8, embed_dim=32, depth=1, num_heads=4,
    ).eval()  # fmt: skip


def saved(module):
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model(how):
    ours = model()
    twin = COPIES[how](ours)
    attention = twin.blocks[0].attn
    assert torch.equal(twin(IMAGES), ours(IMAGES))
    assert isinstance(attention, NormalizedAttention)
    assert attention.normalizer_options == ATTENTION
    assert type(attention).__name__ == "NormalizedAttention[softmax]"
    assert attention.normalizer is not ours.blocks[0].attn.normalizer
    with torch.no_grad():
        attention.normalizer.log_temperature.add_(1)
    assert not torch.equal(twin(IMAGES), ours(IMAGES))


class Named(normalized_attention("multimax")):
    """A subclass with a name to be found by."""


def test_a_subclass_is_pickled_by_its_name():
    layer = pickle.loads(pickle.dumps(Named(16, num_heads=2)))
    assert type(layer) is Named
    assert pickle.loads(pickle.dumps(Named)) is Named


@pytest.mark.parametrize("name", ["multimax", "entmax", "softmax"])
def test_device_and_dtype_are_those_of_the_scalars_too(name):
    options = {"softmax": {"learned": True}, "entmax": {"learned": True}}.get(name, {})
    layer = normalized_attention(name, **options)
    build = dict(attn_layer=layer, **SIZES)
    found = timm.create_model("vit_small_patch16_224", device="meta", **build)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    found = timm.create_model("vit_small_patch16_224", dtype=torch.bfloat16, **build)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert found(IMAGES.bfloat16()).isfinite().all()


def test_heads_need_not_share_the_width_evenly():
    layer = normalized_attention("softmax")(50, num_heads=3, attn_head_dim=20).double()
    stock = timm.layers.attention.Attention(50, num_heads=3, attn_head_dim=20).double()
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 50, dtype=torch.float64)
    torch.testing.assert_close(layer(x), stock(x))
    with pytest.raises(ValueError, match="num_heads=3 does not divide embed_dim=50"):
        normalized_attention("softmax")(50, num_heads=3)


def test_features_by_fx():
    ours = model()
    assert NormalizedAttention in get_notrace_modules()
    features = create_feature_extractor(ours, {"norm": "normed", "head": "scores"})(IMAGES)
    torch.testing.assert_close(features["normed"], ours.forward_features(IMAGES))
    torch.testing.assert_close(features["scores"], ours(IMAGES))


def test_a_traced_model():
    ours = model({"name": "multimax"})
    with pytest.warns():
        traced = torch.jit.trace(ours, IMAGES)
    torch.testing.assert_close(traced(IMAGES), ours(IMAGES))


@pytest.mark.slow
def test_an_additive_mask_in_a_graph():
    torch._dynamo.reset()
    layer, x = normalized_attention("multimax")(16, num_heads=2), torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, attn_mask=mask), layer(x, is_causal=True))
