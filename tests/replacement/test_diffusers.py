"""Models of diffusers with another normalizer, and the table of their processors."""

import ast
import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

from experiments.drop_in.stirring import stirred
from multimax import (
    MultiMax,
    load_pretrained,
    replace_softmax,
    restore_softmax,
    verify_replacement,
)
from multimax.replacement.classes import known_classes
from multimax.replacement.diffusers_classes import IMAGES, LINEAR, REFUSED

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_processor as processors  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402

from experiments.drop_in import diffusers_models  # noqa: E402
from experiments.drop_in.diffusers_models import MODELS, build  # noqa: E402

pytestmark = pytest.mark.slow


def move(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiMax):
                module.ts.copy_(torch.randn(module.ts.shape, generator=generator) / 2)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def unet(processor=None):
    model, inputs = build("UNet2DConditionModel")
    if processor is not None:
        model.set_attn_processor(processor)
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_a_model_starts_as_itself_and_comes_back(name):
    model, inputs = build(name)
    expected, config = output(model, inputs), dict(model.config)
    report = replace_softmax(model)
    assert len(report.attention) == MODELS[name][-1]
    verification = verify_replacement(model, **inputs, return_dict=False)
    assert max(verification.evaluation, verification.training) < 4e-6
    assert verification.called == verification.normalizers == MODELS[name][-1]
    assert all(gradient > 0 for gradient in verification.gradients.values())
    again = copy.deepcopy(model)
    move(model)
    assert (output(model, inputs) - expected).abs().max() > 1e-4
    again.load_state_dict(model.state_dict())
    assert output(again, inputs).equal(output(model, inputs))
    assert output(pickle.loads(pickle.dumps(model)), inputs).equal(output(model, inputs))
    assert restore_softmax(model) == MODELS[name][-1]
    assert output(model, inputs).equal(expected)
    assert dict(model.config) == config
    assert not [m for m in model.modules() if hasattr(type(m), "replaced_class")]


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("processor", [processors.AttnProcessor, processors.AttnProcessor2_0])
def test_masks_and_biases_are_apart_from_the_scores(processor, place):
    torch.manual_seed(0)
    sizes = {"query_dim": 8, "cross_attention_dim": 6, "heads": 2, "dim_head": 5}
    layer = stirred(Attention(**sizes, processor=processor()).double())
    x, context = torch.randn(2, 3, 8).double(), torch.randn(2, 7, 6).double()
    bias = torch.randn(2, 1, 7).double()
    bias[1, :, 4:] = -10000.0  # as models of diffusers mask
    with torch.no_grad():
        layer.to_q.weight.mul_(20)  # scores that a sum with -10000 does not mask
        expected = layer(x, context, bias)
        replace_softmax(layer, bias_place=place)
        torch.testing.assert_close(layer(x, context, bias), expected, atol=1e-11, rtol=1e-11)
    move(layer)
    query, key, value = (
        projection.unflatten(-1, (2, 5)).transpose(1, 2)
        for projection in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    scores = query @ key.mT / 5**0.5
    assert scores[1, :, :, 4:].max() > 16
    finite = bias.masked_fill(bias < -9000, 0)[:, None]
    scores = scores + finite if place == "before" else scores
    (b1, d1, b2, d2), (low1, high1, low2, high2) = layer.normalizer.ranges, layer.normalizer.ts
    modulated = scores + low1 * (b1 - scores).clamp(0) + high1 * (scores - d1).clamp(0)
    modulated = modulated + low2 * (b2 - scores).clamp(0) ** 2
    modulated = modulated + high2 * (scores - d2).clamp(0) ** 2
    modulated = modulated + finite if place == "after" else modulated
    weights = modulated.masked_fill(bias[:, None] < -9000, -torch.inf).softmax(-1)
    own = layer.to_out[0]((weights @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(layer(x, context, bias), own, atol=1e-11, rtol=1e-11)


class Own:
    """A processor that a user wrote."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return processors.AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)


def test_another_processor_goes_on_or_is_refused():
    model, inputs = unet()
    replace_softmax(model)
    move(model)
    expected = output(model, inputs)
    for fitting in (processors.AttnProcessor(), processors.AttnProcessor2_0()):
        model.set_attn_processor(fitting)
        torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=1e-5)
    model.fuse_qkv_projections()
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=1e-5)
    model.unfuse_qkv_projections()
    with pytest.raises(ValueError, match=r"slice by slice: use model.set_attention_slice\(None\)"):
        model.set_attention_slice(1)
    with pytest.raises(ValueError, match=r"Own is not known: name it in also="):
        model.set_attn_processor(Own())
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.processor = processors.SlicedAttnProcessor(1)
    with pytest.raises(RuntimeError, match="another processor, SlicedAttnProcessor"):
        output(model, inputs)
    model.set_attention_slice(None)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_processor_that_the_user_vouches_for():
    model, inputs = unet(Own())
    with pytest.raises(ValueError, match=r"its processor .*Own is not known"):
        replace_softmax(model)
    replace_softmax(model, also=[Own])
    verification = verify_replacement(model, **inputs, return_dict=False)
    assert verification.evaluation < 4e-6
    assert verification.called == verification.normalizers == 8


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (processors.SlicedAttnProcessor(1), r"set_attention_slice\(None\)"),
        (processors.XFormersAttnProcessor(), "disable_xformers"),
        (processors.IPAdapterAttnProcessor2_0(8, 8), "unload_ip_adapter"),
        (processors.PAGJointAttnProcessor2_0(), "a SoftMax each"),
    ],
)
def test_processors_that_normalize_otherwise_are_refused(processor, reason):
    layer = Attention(8, heads=2, dim_head=4, processor=processor)
    with pytest.raises(ValueError, match=reason):
        replace_softmax(layer)


def test_images_beside_the_text_and_linear_attention():
    images = diffusers_models.WAN | {"added_kv_proj_dim": 24, "image_dim": 6}
    with pytest.raises(ValueError, match="text and images have a SoftMax each"):
        replace_softmax(diffusers.WanTransformer3DModel(**images))
    model, _ = build("SanaTransformer2DModel")
    report = replace_softmax(model)
    assert [entry.note for entry in report.left] == ["it is linear, without a SoftMax"]
    assert [entry.name for entry in report.attention] == ["transformer_blocks.0.attn2"]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_backend_with_a_kernel_of_its_own_is_no_silent_softmax():
    model, inputs = build("FluxTransformer2DModel")
    model.set_attention_backend("flex")
    with pytest.raises(ValueError, match=r"backend flex .*set_attention_backend\(\"native\"\)"):
        replace_softmax(model)
    model.set_attention_backend("_native_math")
    replace_softmax(model)
    assert verify_replacement(model, **inputs, return_dict=False).called == 2
    model.set_attention_backend("flex")
    with pytest.raises(RuntimeError, match="flex_attention was called, which has SoftMax inside"):
        output(model, inputs)


def test_saved_models_keep_their_scalars(tmp_path, monkeypatch):
    model, inputs = unet()
    replace_softmax(model, skip="*.attn1")
    move(model)
    model.save_pretrained(tmp_path)
    for model_class in (diffusers.UNet2DConditionModel, diffusers.AutoModel):
        loaded = load_pretrained(model_class, tmp_path)
        assert type(loaded) is diffusers.UNet2DConditionModel
        assert output(loaded, inputs).equal(output(model, inputs))
    with pytest.raises(ValueError, match="is a UNet2DConditionModel, not a UNet2DModel"):
        load_pretrained(diffusers.UNet2DModel, tmp_path)
    warnings = []
    monkeypatch.setattr(
        diffusers.models.modeling_utils.logger, "warning", lambda text, *_: warnings.append(text)
    )
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert any("normalizer.ts" in text for text in warnings)
    restore_softmax(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved with another normalizer"):
        load_pretrained(diffusers.UNet2DConditionModel, tmp_path)


def test_checkpoints_and_autocast():
    model, inputs = build("PixArtTransformer2DModel", num_layers=1)
    model.set_attn_processor(processors.AttnProcessor())
    replace_softmax(model)
    move(model)
    model.train().enable_gradient_checkpointing()
    model(**inputs).sample.square().sum().backward()
    own = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.disable_gradient_checkpointing()
    expected = model(**inputs).sample
    expected.square().sum().backward()
    for ours, parameter in zip(own, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**inputs).sample.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("processor", [processors.AttnProcessor, processors.AttnProcessor2_0])
def test_a_layer_is_one_graph(processor):
    layer = Attention(8, heads=2, dim_head=4, processor=processor())
    x, bias = torch.randn(2, 5, 8), torch.randn(2, 1, 5)
    replace_softmax(layer)
    move(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    own, expected = (call(x, attention_mask=bias) for call in (compiled, layer))
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


CALLS = {
    "dispatch_attention_fn",
    "scaled_dot_product_attention",
    "get_attention_scores",
    "memory_efficient_attention",
    "multi_head_attention_forward",
    "softmax",
}
# They choose between two calls, or make the second one for a mask that only another kernel takes.
ONE_OF_TWO = "SAME|StableAudio3|Kandinsky"


def calls(node, functions, repeated=False):
    """How often the code below a node calls what normalizes; 2 for a call in a loop."""
    repeated = repeated or isinstance(node, ast.For | ast.While | ast.comprehension)
    count = sum(calls(child, functions, repeated) for child in ast.iter_child_nodes(node))
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        count += (1 + repeated) * (name in CALLS)
        count += calls(functions[name], {}, repeated) if name in functions else 0
    return count


def test_every_module_and_processor_that_normalizes_is_known():
    folder = Path(diffusers.__file__).parent / "models"
    known, found = known_classes(), 0
    for file in folder.rglob("*.py"):
        text = file.read_text()
        body = ast.parse(text).body if any(name in text for name in CALLS) else []
        functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        place = ".".join(["diffusers.models", *file.relative_to(folder).with_suffix("").parts])
        for cls in (node for node in body if isinstance(node, ast.ClassDef)):
            methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
            if "forward" in methods and calls(methods["forward"], functions):
                assert f"{place}.{cls.name}" in known
                found += 1
            if "__call__" in methods and calls(methods["__call__"], functions) > 1:
                assert re.search("|".join([*REFUSED, IMAGES, ONE_OF_TWO]), cls.name), cls.name
                found += 1
            if "__call__" in methods and "Linear" in cls.name:
                assert re.search(LINEAR, cls.name)
                assert not calls(methods["__call__"], functions)
    assert found > 20
