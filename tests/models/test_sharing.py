"""Attention layers with one set of scalars, in the models of all tasks."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from tiny_transformers import PAD, SOURCE_WORDS, draw, language_model, translation_model
from torch import nn

from multimax.models.official_names import to_official_state_dict
from multimax.models.vision import build_vision_transformer

MULTIMAX = {"name": "multimax"}
SHARED = {"name": "multimax", "shared": True}
VISION = dict(num_classes=5, image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def vision(attention, output=MULTIMAX, **options):
    torch.manual_seed(0)
    model = build_vision_transformer(attention=attention, output=output, **VISION, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(30)  # so that attention is not uniform
    return model.double().eval()


def source():
    tokens = draw(words=SOURCE_WORDS)
    tokens[1, -2:] = PAD
    return tokens


# How to build a model, its inputs, and how many attention layers it has.
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple, int]] = {
    "vision": (vision, (IMAGES,), 3),
    "language": (language_model, (draw(),), 2),
    "translation": (translation_model, (source(), draw(length=4)), 6),
}
each_model = pytest.mark.parametrize("name", MODELS)


def pair(name):
    """A model whose layers share, and one whose layers do not but have the same scalars."""
    build, inputs, layers = MODELS[name]
    shared, apart = build(SHARED, MULTIMAX), build(MULTIMAX, MULTIMAX)
    with torch.no_grad():
        for parameter_name, parameter in shared.named_parameters():
            if parameter_name.endswith((".ts", ".ranges")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    apart.load_state_dict(shared.state_dict())
    return shared, apart, inputs, layers


def scalar_names(model, **options):
    named = model.named_parameters(**options)
    return [n for n, _ in named if n.endswith("normalizer.ts") and "output" not in n]


@each_model
def test_shared_scalars_are_counted_and_learned_once(name):
    """Their gradient is the sum of those of the layers."""
    shared, apart, inputs, layers = pair(name)
    first, *others = scalar_names(apart)
    assert len(others) == layers - 1
    assert scalar_names(shared) == [first]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    assert sizes[1] - sizes[0] == 8 * (layers - 1)
    outputs = [model(*inputs) for model in (shared, apart)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    gradients = dict(apart.named_parameters())
    for end in ("ts", "ranges"):
        names = [n.removesuffix("ts") + end for n in (first, *others)]
        total = sum(gradients[n].grad for n in names)
        torch.testing.assert_close(shared.get_parameter(names[0]).grad, total)


@each_model
def test_the_other_weights_are_drawn_as_without(name):
    build, *_ = MODELS[name]
    shared, apart = build(SHARED, MULTIMAX).state_dict(), build(MULTIMAX, MULTIMAX).state_dict()
    assert list(shared) == list(apart)
    others = [n.removesuffix(".ts") for n in scalar_names(build(MULTIMAX, MULTIMAX))[1:]]
    for key, value in apart.items():
        if not key.startswith(tuple(others)):
            torch.testing.assert_close(shared[key], value, rtol=0, atol=0, msg=key)


@each_model
def test_a_state_dict_goes_round_and_one_that_differs_is_refused(name):
    shared, apart, inputs, _ = pair(name)
    fresh = MODELS[name][0](SHARED, MULTIMAX)
    fresh.load_state_dict(shared.state_dict(), strict=True)
    torch.testing.assert_close(fresh(*inputs), shared(*inputs), rtol=0, atol=0)
    state = {key: value.clone() for key, value in apart.state_dict().items()}
    fresh.load_state_dict(state, strict=True)  # of layers that happen to be equal
    last = scalar_names(apart)[-1]
    state[last][0] += 1
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=rf"other scalars in {last} .*shared=False"):
        fresh.load_state_dict(state)
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)
    apart.load_state_dict(state)


@each_model
def test_a_copy_shares_too(name):
    model = MODELS[name][0](SHARED, MULTIMAX)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies += [torch.load(stream, weights_only=False), model.float()]
    for twin in copies:
        names = scalar_names(twin, remove_duplicate=False)
        assert len(names) == MODELS[name][2]
        assert len({id(twin.get_parameter(n)) for n in names}) == 1


def test_official_checkpoints_of_a_model_that_shares():
    shared, apart, inputs, layers = pair("vision")
    official = to_official_state_dict(shared)
    assert {f"blocks.{i}.attn.ts" for i in range(layers)} < set(official)
    for model in (apart, vision(SHARED)):
        model.load_state_dict(official)
        torch.testing.assert_close(model(*inputs), shared(*inputs), rtol=0, atol=0)
    official = {key: value.clone() for key, value in official.items()}
    official["blocks.1.attn.ranges"][0] += 1
    with pytest.raises(ValueError, match=r"other scalars in blocks\.1\.attn\.normalizer\.ranges"):
        shared.load_state_dict(official)


def test_layers_with_a_normalizer_of_their_own_do_not_share():
    own = translation_model(SHARED, cross_attention=MULTIMAX)
    assert scalar_names(own) == [
        "encoder.layers.0.self_attn.normalizer.ts",
        *(f"decoder.layers.{i}.encoder_attn.normalizer.ts" for i in (0, 1)),
    ]
    official = translation_model(SHARED, official_mismatch=True)
    assert scalar_names(official) == ["encoder.layers.0.self_attn.normalizer.ts"]
    every = dict.fromkeys(("encoder_attention", "decoder_attention", "cross_attention"), "topk")
    assert not scalar_names(translation_model(SHARED, **every))


def test_any_learned_scalar_is_shared():
    for options in ({"name": "softmax", "learned": True}, {"name": "entmax", "learned": True}):
        model = language_model(options | {"shared": True})
        normalizers = [layer.self_attn.normalizer for layer in model.decoder.layers]
        assert len({id(p) for n in normalizers for p in n.parameters()}) == 1
    with pytest.raises(ValueError, match=r"shared needs learned scalars, of which SparseMax"):
        language_model({"name": "sparsemax", "shared": True})


@pytest.mark.parametrize("shared", [False, True])
def test_recomputed_blocks_give_the_same_gradients(shared):
    gradients = []
    for checkpointing in (False, True):
        attention = MULTIMAX | {"shared": shared, "before_scale": True}
        model = vision(attention, gradient_checkpointing=checkpointing).train()
        model.output(model(IMAGES)).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@each_model
def test_before_scale_is_another_scale_of_the_scalars(name):
    """Heads of 8 (images) or 4: sigma(q k) / sqrt(d), from scalars in units of the scores."""
    build, inputs, _ = MODELS[name]
    before, after = build(MULTIMAX | {"before_scale": True}), build(MULTIMAX)
    scale = {"vision": 8}.get(name, 4) ** -0.5
    with torch.no_grad():
        for key, value in before.named_parameters():
            if "output" not in key and key.endswith((".ts", ".ranges")):
                value.add_(0.3 * torch.randn_like(value))
                powers = torch.tensor([1, 1, 1 / scale, 1 / scale], dtype=torch.float64)
                factor = powers if key.endswith("ts") else scale
                after.get_parameter(key).copy_(factor * value)
    torch.testing.assert_close(before(*inputs), after(*inputs), rtol=1e-10, atol=1e-12)
    plain = build(MULTIMAX)
    plain.load_state_dict(before.state_dict())
    assert (plain(*inputs) - before(*inputs)).abs().max() > 1e-5


@pytest.mark.slow
@each_model
def test_one_graph(name):
    torch._dynamo.reset()
    build, inputs, _ = MODELS[name]
    model = build(SHARED | {"before_scale": True}, MULTIMAX)
    parameters = [p for n, p in model.named_parameters() if "output" not in n and "head" not in n]

    def run(function):
        out = function(*inputs)
        return out, *torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)

    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager")), run(model))
    program = torch.export.export(model, inputs)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))
