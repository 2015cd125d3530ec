import copy

import pytest
import timm
import torch
from torch import nn

from multimax.kernels.backend import use_backend
from multimax.models.vision import build_vision_transformer, normalized_attention
from multimax.normalizers import build_normalizer, registered_normalizers

TINY = dict(num_classes=5, image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
SOFTMAX = {"name": "softmax"}
MULTIMAX = {"name": "multimax"}


def tiny(attention=SOFTMAX, output=SOFTMAX, **options):
    torch.manual_seed(0)
    return build_vision_transformer(attention=attention, output=output, **{**TINY, **options})


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def images(batch=3, size=32, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_published_size_of_deit_small():
    model = build_vision_transformer(
        attention=SOFTMAX,
        output=SOFTMAX,
        num_classes=1000,
        image_size=224,
        class_token=True,
        qkv_bias=True,
    )
    assert parameters(model) == 22_050_664
    assert model.pos_embed.shape == (1, 197, 384)
    assert len(model.blocks) == 12
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6


@pytest.mark.slow
def test_the_paper_adds_eight_scalars_a_layer_and_eight_to_the_output():
    options = dict(num_classes=1000, image_size=224)
    paper = build_vision_transformer(attention=MULTIMAX, output=MULTIMAX, **options)
    plain = build_vision_transformer(attention=SOFTMAX, output=SOFTMAX, **options)
    # Without class token: 384 + 384 fewer (token and its position); without bias: 12 x 3 x 384.
    assert parameters(plain) == 22_050_664 - 768 - 13_824
    assert parameters(paper) == parameters(plain) + 12 * 8 + 8
    assert paper.pos_embed.shape == (1, 196, 384)
    assert isinstance(paper.norm, nn.LayerNorm)
    assert isinstance(paper.fc_norm, nn.Identity)


def test_each_layer_has_its_own_normalizer_drawn_as_the_paper_says():
    model = tiny(MULTIMAX, MULTIMAX, depth=12)
    normalizers = [block.attn.normalizer for block in model.blocks] + [model.output]
    scalars = torch.cat([torch.cat([n.ts, n.ranges]) for n in normalizers])
    assert len({id(n) for n in normalizers}) == 13
    assert scalars.unique().numel() == 13 * 8
    assert 0.01 < scalars.std() < 0.03


def test_weights_are_initialized_as_in_deit():
    model = tiny(class_token=True, qkv_bias=True, embed_dim=96)
    for weight in (model.pos_embed, model.cls_token, model.head.weight):
        assert 0.015 < weight.std() < 0.025
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < module.weight.std() < 0.025
            assert not module.bias.any()


def in_output(name):
    """A normalizer for the output layer: another one where weights do not sum to one."""
    return name if build_normalizer(name).sums_to_one else "multimax"


@pytest.mark.parametrize("name", registered_normalizers())
def test_a_seed_gives_the_same_backbone_whatever_the_normalizer(name):
    plain, other = tiny(), tiny({"name": name}, {"name": in_output(name)})
    state_after_other = torch.get_rng_state()
    assert plain.state_dict().keys() <= other.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0)
    tiny()
    assert torch.equal(torch.get_rng_state(), state_after_other)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("class_token", "qkv_bias", "norm"),
    [
        (True, True, "norm_then_pool"),
        (False, False, "norm_then_pool"),
        (False, True, "pool_then_norm"),
    ],
)
def test_softmax_equals_stock_timm(
    fused, checkpointing, dtype, tolerance, class_token, qkv_bias, norm
):
    switches = dict(class_token=class_token, qkv_bias=qkv_bias)
    ours = tiny(norm=norm, gradient_checkpointing=checkpointing, **switches).to(dtype)
    sizes = {key: TINY[key] for key in ("num_classes", "patch_size", "embed_dim", "depth")}
    stock = timm.create_model(
        "deit_small_patch16_224",
        img_size=32,
        num_heads=4,
        global_pool="token" if class_token else "avg",
        fc_norm=norm == "pool_then_norm",
        **sizes,
        **switches,
    ).to(dtype)
    for module in stock.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    state = {k: torch.randn_like(v) * 0.2 for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    stock.load_state_dict(state)
    x = images().to(dtype)
    got, expected = ours(x), stock(x)
    assert ours.grad_checkpointing == checkpointing
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, got.numel(), dtype=dtype).view_as(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: p.grad for key, p in stock.named_parameters()}
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", registered_normalizers())
def test_each_normalizer_trains_with_checkpointing_as_without(name):
    attention = {"name": name, **({"k": 5} if name == "topk" else {})}
    gradients = []
    for checkpointing in (False, True):
        model = tiny(attention, MULTIMAX, gradient_checkpointing=checkpointing).double()
        model.output(model(images().double())).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_attention_uses_the_normalizer_it_was_given():
    x = images()
    plain = tiny()
    hot, topk = tiny({"name": "softmax", "temperature": 100.0}), tiny({"name": "topk", "k": 1})
    assert hot.blocks[1].attn.normalizer.temperature == 100.0
    assert topk.blocks[1].attn.normalizer.k == 1
    assert not torch.allclose(plain(x), hot(x), atol=1e-6)
    assert not torch.allclose(plain(x), topk(x), atol=1e-6)


def test_the_model_returns_raw_scores():
    torch.manual_seed(0)
    plain, sparse = tiny(output=SOFTMAX), tiny(output={"name": "sparsemax"})
    torch.testing.assert_close(plain(images()), sparse(images()), rtol=0, atol=0)
    assert type(sparse.output) is type(build_normalizer("sparsemax"))


def test_attention_masks_bool_additive_and_causal_agree():
    layer = normalized_attention("multimax")(16, num_heads=2).double()
    stock = timm.layers.attention.Attention(16, num_heads=2).double()
    nn.init.zeros_(layer.normalizer.ts)
    stock.load_state_dict({k: v for k, v in layer.state_dict().items() if "normalizer" not in k})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~causal, -torch.inf)
    expected = stock(x, attn_mask=causal)
    assert not torch.allclose(expected, stock(x))
    for options in ({"attn_mask": causal}, {"attn_mask": additive}, {"is_causal": True}):
        torch.testing.assert_close(layer(x, **options), expected)
    with pytest.raises(ValueError, match="only 0 and -inf"):
        layer(x, attn_mask=additive.clamp_min(-1e4))
    with pytest.raises(ValueError, match="only 0 and -inf"):
        layer(x, attn_mask=additive.masked_fill(causal, torch.inf))


def test_attention_keeps_the_other_options_of_timm():
    options = dict(
        qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm
    )
    layer = normalized_attention("softmax")(16, num_heads=2, **options).double()
    stock = timm.layers.attention.Attention(16, num_heads=2, **options).double()
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), stock(x))


def test_dropout_acts_in_training_only():
    model = tiny(attention_dropout=0.5)
    x = images()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), tiny().eval()(x))


def test_options_reach_timm():
    model = tiny(drop_path=0.2, dropout=0.1, attention_dropout=0.3, mlp_ratio=2.0, in_channels=1)
    last = model.blocks[-1]
    assert last.drop_path1.drop_prob == pytest.approx(0.2)
    assert model.pos_drop.p == last.attn.proj_drop.p == last.mlp.drop1.p == 0.1
    assert last.attn.attn_drop.p == 0.3
    assert last.mlp.fc1.out_features == 64
    assert model.patch_embed.proj.weight.shape == (32, 1, 8, 8)
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()


def test_a_model_survives_deepcopy_and_a_state_dict_round_trip():
    model = tiny(MULTIMAX, MULTIMAX)
    twin = copy.deepcopy(model)
    fresh = build_vision_transformer(attention=MULTIMAX, output=MULTIMAX, **TINY)
    assert not torch.equal(fresh(images()), model(images()))
    fresh.load_state_dict(model.state_dict(), strict=True)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(images()), model(images()))
    assert torch.equal(twin.output.ts, fresh.output.ts)


# The kernels of rows are chosen in the normalizers, each of which is compiled alone with both.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "auto") for name in registered_normalizers()), ("multimax", "eager")],
)
def test_compile_to_one_graph(name, backend):
    torch._dynamo.reset()
    model = tiny({"name": name}, {"name": in_output(name)}, depth=1).eval()
    with use_backend(backend):
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(whole(images()), model(images()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=30), r"image_size=30 .* patch_size=8: use image_size=32"),
        (dict(num_heads=5), r"num_heads=5 does not divide embed_dim=32: use embed_dim=35"),
        (dict(class_token=True, norm="pool_then_norm"), "needs class_token=False"),
        (dict(norm="none"), "norm='none' must be norm_then_pool or pool_then_norm"),
        (dict(architecture="deit_smal_patch16_224"), "deit_small_patch16_224"),
        (dict(architecture="resnet50"), "not a plain vision transformer of timm"),
        (dict(architecture="deit_small_distilled_patch16_224"), "deit_small_patch16_224"),
        (dict(architecture="vit_small_patch16_18x2_224"), "use one with plain blocks"),
        (dict(depth=0), r"depth=0 must be a whole number in \[1, 1000\]"),
        (dict(num_classes=0), "num_classes=0 must be a whole number >= 1"),
        (dict(in_channels=1.5), "in_channels=1.5 must be a whole number >= 1"),
        (dict(mlp_ratio=0), r"mlp_ratio=0 must be a number in \(0, 1000\] or null"),
        (dict(drop_path=1.0), r"drop_path=1.0 must be a number in \[0, 1\)"),
        (dict(dropout=-0.1), "dropout=-0.1 must be"),
        (dict(attention_dropout=2), "attention_dropout=2 must be"),
        (dict(attention={"name": "softmin"}), "unknown normalizer 'softmin'"),
        (dict(output={"name": "multimax", "k": 3}), "no option k"),
    ],
)
def test_bad_options_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
