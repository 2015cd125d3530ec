import argparse

import pytest
import torch
import torch.nn.functional as F

from multimax.integrations.official import load_official_checkpoint
from multimax.models.official_names import to_official_state_dict
from multimax.models.vision import build_vision_transformer

DEPTH, DIM, HEADS, PATCH, SIZE, CLASSES = 3, 24, 4, 8, 32, 6
MULTIMAX, SOFTMAX = {"name": "multimax"}, {"name": "softmax"}


def build(attention=MULTIMAX, output=MULTIMAX, num_classes=CLASSES, **options):
    return build_vision_transformer(
        attention=attention,
        output=output,
        num_classes=num_classes,
        image_size=SIZE,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        **options,
    )


def official_state_dict():
    """Random weights under the names of the official code; the scalars are far from identity."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, scale=0.3):
        return scale * torch.randn(shape, generator=generator)

    state = {
        "ts": draw(4, scale=0.5),
        "ranges": draw(4, scale=1.0),
        "pos_embed": draw(1, (SIZE // PATCH) ** 2, DIM),
        "patch_embed.proj.weight": draw(DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(DIM),
        "norm.weight": 1 + draw(DIM),
        "norm.bias": draw(DIM),
        "head.weight": draw(CLASSES, DIM),
        "head.bias": draw(CLASSES),
    }
    for i in range(DEPTH):
        block = {
            "norm1.weight": 1 + draw(DIM),
            "norm1.bias": draw(DIM),
            "attn.ts": draw(4, scale=0.5),
            "attn.ranges": draw(4, scale=1.0),
            "attn.qkv.weight": draw(3 * DIM, DIM),
            "attn.proj.weight": draw(DIM, DIM),
            "attn.proj.bias": draw(DIM),
            "norm2.weight": 1 + draw(DIM),
            "norm2.bias": draw(DIM),
            "mlp.fc1.weight": draw(4 * DIM, DIM),
            "mlp.fc1.bias": draw(4 * DIM),
            "mlp.fc2.weight": draw(DIM, 4 * DIM),
            "mlp.fc2.bias": draw(DIM),
        }
        state |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    return state


def official_forward(state, images):
    """The forward pass of the official code written anew, from its formulas."""

    def modulate(x, prefix):
        ts, r = state[f"{prefix}ts"], state[f"{prefix}ranges"]
        first = x + ts[0] * F.relu(r[0] - x) + ts[1] * F.relu(x - r[1])
        return first + ts[2] * F.relu(r[2] - x) ** 2 + ts[3] * F.relu(x - r[3]) ** 2

    def norm(x, prefix):
        return F.layer_norm(x, (DIM,), state[f"{prefix}weight"], state[f"{prefix}bias"], 1e-6)

    def linear(x, prefix):
        return x @ state[f"{prefix}weight"].T + state[f"{prefix}bias"]

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    batch, tokens, _ = x.shape
    for i in range(DEPTH):
        at = f"blocks.{i}."
        qkv = norm(x, at + "norm1.") @ state[at + "attn.qkv.weight"].T
        q, k, v = qkv.view(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        attn = q @ k.transpose(-2, -1) * (DIM // HEADS) ** -0.5
        attn = modulate(attn, at + "attn.").softmax(-1)
        x = x + linear((attn @ v).transpose(1, 2).reshape(batch, tokens, DIM), at + "attn.proj.")
        hidden = F.gelu(linear(norm(x, at + "norm2."), at + "mlp.fc1."))
        x = x + linear(hidden, at + "mlp.fc2.")
    logits = linear(norm(x, "norm.").mean(1), "head.")
    return modulate(logits, "")


def images():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4)).double()


def test_official_weights_give_the_official_logits():
    state = {key: value.double() for key, value in official_state_dict().items()}
    model = build().double()
    keys = list(state)
    model.load_state_dict(state, strict=True)
    assert list(state) == keys, "the caller's dict was changed"
    got = model.output.modulate(model(images()))
    torch.testing.assert_close(got, official_forward(state, images()), rtol=1e-10, atol=1e-10)
    # All scalars take part: without any one of them the logits are others.
    for key in [key for key in keys if key.endswith(("ts", "ranges"))]:
        for index in range(4):
            changed = {**state, key: state[key].index_fill(0, torch.tensor(index), 0.0)}
            model.load_state_dict(changed, strict=True)
            assert not torch.allclose(model.output.modulate(model(images())), got)


def test_official_weights_load_below_a_prefix():
    wrapped = torch.nn.ModuleDict({"vision": build()})
    state = {f"vision.{key}": value for key, value in official_state_dict().items()}
    wrapped.load_state_dict(state, strict=True)
    assert torch.equal(wrapped["vision"].output.ts, state["vision.ts"])


def test_round_trip():
    state = official_state_dict()
    model = build()
    model.load_state_dict(state)
    written = to_official_state_dict(model)
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(written[key], value)


def test_softmax_has_nothing_to_rename_and_affine_has_no_official_name():
    model = build(SOFTMAX, SOFTMAX)
    assert to_official_state_dict(model).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"no place for output\.scale"):
        to_official_state_dict(build(SOFTMAX, {"name": "multimax", "affine": True}))
    with pytest.raises(ValueError, match=r"no place for blocks\.0\.attn\.\w+\.log_temperature"):
        to_official_state_dict(build({"name": "softmax", "learned": True}))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_files_of_the_official_code_load(tmp_path, prefix, wrapped):
    state = official_state_dict()
    content = {prefix + key: value for key, value in state.items()}
    if wrapped:
        arguments = argparse.Namespace(lr=1e-3, model="deit_small")
        content = {"model": content, "args": arguments, "epoch": 299}
    torch.save(content, tmp_path / "best.pth")
    model = build()
    load_official_checkpoint(model, tmp_path / "best.pth")
    assert torch.equal(model.blocks[2].attn.normalizer.ranges, state["blocks.2.attn.ranges"])
    assert torch.equal(model.output.ts, state["ts"])
    assert torch.equal(model.head.weight, state["head.weight"])


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.pth"):
        load_official_checkpoint(build(), tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read"):
        load_official_checkpoint(build(), tmp_path / "text.pth")
    torch.save({"weights": [1, 2]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_official_checkpoint(build(), tmp_path / "other.pth")
    torch.save({"model": official_state_dict(), "x": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful\.pth cannot be read"):
        load_official_checkpoint(build(), tmp_path / "harmful.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_classes=7), r"it has 6 classes, the model 7 \(num_classes\)"),
        (dict(class_token=True), r"the model has a class token, it has none \(class_token=False\)"),
        (dict(qkv_bias=True), r"\(qkv_bias=False\)"),
        (dict(norm="pool_then_norm"), r"\(norm='norm_then_pool'\)"),
        (dict(attention=SOFTMAX), "its attention is MultiMax, the model's is not"),
        (dict(output=SOFTMAX), "its output is MultiMax, the model's is not"),
        (dict(output={"name": "multimax", "order": 1}), r"output.ts is \(4,\) there and \(2,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_which_option_to_change(tmp_path, options, message):
    torch.save(official_state_dict(), tmp_path / "best.pth")
    model = build(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(model, tmp_path / "best.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_token=True), r"it has a class token, the model none \(class_token=True\)"),
        (dict(qkv_bias=True), r"\(qkv_bias=True\)"),
        (dict(norm="pool_then_norm"), r"\(norm='pool_then_norm'\)"),
        (dict(attention=SOFTMAX), r"its is not \(attention=\{'name': 'softmax'\}\)"),
        (dict(output=SOFTMAX), r"its is not \(output=\{'name': 'softmax'\}\)"),
    ],
)
def test_the_other_way_round(tmp_path, options, message):
    torch.save(to_official_state_dict(build(**options)), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(build(), tmp_path / "other.pth")
