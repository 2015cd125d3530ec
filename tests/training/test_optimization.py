import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny import ROOT, schedule
from torch import nn

from multimax import MultiMax, SoftMax
from multimax.models.vision import build_vision_transformer
from multimax.options import validate
from multimax.parameters import GradientClipping
from multimax.training.config import read_config
from multimax.training.optimization import (
    LearningRate,
    build_optimizer,
    normalizer_parameters,
)
from multimax.training.sections import OptimizerSection


def paper_config():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return read_config(compose("config", overrides=["experiment=deit_multimax", "scale=paper"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention", [{"name": "multimax", "affine": True}, {"name": "softmax", "learned": True}]
)
def test_deit_rule_of_weight_decay(attention):
    model = build_vision_transformer(
        attention=attention,
        output={"name": "entmax", "learned": True},
        num_classes=5,
        image_size=32,
        class_token=True,
        qkv_bias=True,
        depth=1,
    )
    optimizer = build_optimizer(model, paper_config().optimizer)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    got = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    matrices = {
        "patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight",
    }  # fmt: skip
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} < set(got)
    assert got == {name: 0.05 if name in matrices else 0.0 for name in got}


def optimizer_of(model, **options):
    given = {"name": "adamw", "lr": 0.125, "weight_decay": 0.25} | options
    return build_optimizer(model, validate(OptimizerSection, given))


def decays(model, **options):
    """The weight decay of each parameter, which must be in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer_of(model, **options).param_groups
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lookahead_adamw"])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("decay_scalars", [None, True, False])
def test_scalars_can_have_a_weight_decay_of_their_own(name, every, decay_scalars):
    model = nn.Sequential(nn.Linear(3, 4), MultiMax(affine=True), SoftMax(learned=True))
    got = decays(model, name=name, filter_bias_and_bn=not every, decay_scalars=decay_scalars)
    scalars = {"1.ts", "1.ranges", "1.scale", "1.shift", "2.log_temperature"}
    wanted = every if decay_scalars is None else decay_scalars
    expected = {"0.weight": 0.25, "0.bias": 0.25 * every} | dict.fromkeys(scalars, 0.25 * wanted)
    assert got == expected


@pytest.mark.parametrize("decay_scalars", [True, False])
def test_a_decayed_scalar_moves_by_its_share(decay_scalars):
    """Without a gradient, AdamW takes lr x weight_decay of a value, 1 / 32, and nothing else."""
    model = nn.Sequential(nn.Linear(3, 4), MultiMax()).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(model, decay_scalars=decay_scalars).step()
    left = {"0.weight": 31 / 32, "0.bias": 1, "1.ts": 31 / 32, "1.ranges": 31 / 32}
    for name, parameter in model.named_parameters():
        share = left[name] if decay_scalars or "1" not in name else 1
        assert torch.equal(parameter, before[name] * share), name


def test_a_group_of_scalars_has_the_other_settings_and_follows_the_schedule():
    model = nn.Sequential(nn.Linear(3, 4), MultiMax())
    optimizer = optimizer_of(model, betas=[0.5, 0.75], eps=1e-3, decay_scalars=True)
    options = {"name": "cosine", "warmup": 2, "warmup_lr": 0, "min_lr": 0, "per_epoch": False}
    LearningRate(optimizer, schedule(options), 10, 1).set(1)
    assert len(optimizer.param_groups) == 3
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.125 / 2, (0.5, 0.75), 1e-3)
    without = optimizer_of(nn.Linear(3, 4), decay_scalars=True)
    assert len(without.param_groups) == 2


@pytest.mark.parametrize("name", ["cosine", "inverse_sqrt"])
@pytest.mark.parametrize("decay", [{}, {"filter_bias_and_bn": False}, {"decay_scalars": True}])
def test_scalars_can_have_a_rate_of_their_own(name, decay):
    model = nn.Sequential(nn.Linear(3, 4), MultiMax(), SoftMax(learned=True))
    optimizer = optimizer_of(model, scalars_lr_scale=4.0, **decay)
    options = {"name": name, "warmup": 2, "warmup_lr": 0, "min_lr": 0, "per_epoch": False}
    LearningRate(optimizer, schedule(options), 10, 1).set(1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    scalars = {"1.ts", "1.ranges", "2.log_temperature"}
    assert rates == {name: 0.25 if name in scalars else 0.0625 for name in names.values()}
    assert decays(model, scalars_lr_scale=4.0, **decay) == decays(model, **decay)


def test_optimizer_gets_its_options():
    optimizer = build_optimizer(nn.Linear(2, 2), paper_config().optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["eps"], group["betas"]) == (1e-3, 1e-8, (0.9, 0.999))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_betas_are_a_tuple_as_by_default(name):
    options = {"name": name, "lr": 0.1, "weight_decay": 0, "betas": [0.5, 0.75]}
    section = validate(OptimizerSection, options)
    (group, *_) = build_optimizer(nn.Linear(2, 2), section).param_groups
    assert group["betas"] == (0.5, 0.75)


def rates(options, length, updates_per_unit, peak):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    rate = LearningRate(optimizer, schedule(options), length, updates_per_unit)
    got = []
    for update in range(length * updates_per_unit):
        rate.set(update)
        got.append(optimizer.param_groups[0]["lr"])
    return got


def deit_rate(t, length, warmup, start, peak, end):
    if t < warmup:
        return start + (peak - start) * t / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * t / length)) / 2


def test_rate_of_the_paper_is_stepped_by_epoch():
    options = paper_config().schedule
    expected = [deit_rate(epoch, 300, 5, 1e-6, 1e-3, 1e-5) for epoch in range(300)]
    got = rates(options, 300, 4, 1e-3)
    assert got[::4] == pytest.approx(expected, rel=1e-12)
    assert all(got[i] == got[i - i % 4] for i in range(1200))


def test_rate_by_update():
    options = {"name": "cosine", "warmup": 2, "warmup_lr": 1e-6, "min_lr": 1e-5, "per_epoch": False}
    expected = [deit_rate(update, 40, 8, 1e-6, 2e-3, 1e-5) for update in range(40)]
    assert rates(options, 10, 4, 2e-3) == pytest.approx(expected, rel=1e-12)


def test_rate_does_not_depend_on_what_was_set_before():
    options = {"name": "cosine", "warmup": 2, "warmup_lr": 1e-6, "min_lr": 1e-5, "per_epoch": True}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    LearningRate(optimizer, schedule(options), 10, 3).set(17)
    assert optimizer.param_groups[0]["lr"] == rates(options, 10, 3, 1e-3)[17]


def model_with_gradients(weights, scalars):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), MultiMax(), nn.Linear(4, 2), MultiMax(affine=True))
    ids = {id(parameter) for parameter in normalizer_parameters(model)}
    for parameter in model.parameters():
        size = scalars if id(parameter) in ids else weights
        parameter.grad = size * torch.randn_like(parameter)
    return model, ids


def clipped(weights, scalars, max_norm):
    model, ids = model_with_gradients(weights, scalars)
    clipping = GradientClipping(model, max_norm)
    norms = clipping.norms()
    clipping.clip(norms)
    parts = [[p.grad for p in model.parameters() if (id(p) in ids) == own] for own in (False, True)]
    return [torch.cat([g.flatten() for g in part]) for part in parts], norms


def test_normalizer_parameters_are_the_scalars_of_all_normalizers():
    model, _ = model_with_gradients(1, 1)
    scalars = {id(parameter) for parameter in normalizer_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in scalars}
    assert names == {"1.ts", "1.ranges", "3.ts", "3.ranges", "3.scale", "3.shift"}


def test_shared_scalars_count_once():
    """In the norm of the gradients, in what is clipped, and in the groups of the optimizer."""
    model = nn.Sequential(nn.Linear(3, 4), MultiMax(), MultiMax())
    for name, parameter in model[1].named_parameters():
        setattr(model[2], name, parameter)
    assert [id(p) for p in normalizer_parameters(model)] == [id(p) for p in model[1].parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    clipping = GradientClipping(model, 1.0)
    _, norm = clipping.norms()
    assert norm.item() == pytest.approx(3 * math.sqrt(8))
    clipping.clip([torch.tensor(1.0), norm])
    assert model[1].ts.grad.tolist() == pytest.approx([1 / math.sqrt(8)] * 4, rel=1e-5)
    assert decays(model, decay_scalars=True)["1.ts"] == 0.25


@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_scalars_and_weights_are_clipped_apart(max_norm):
    (weights, scalars), norms = clipped(1, 1, max_norm)
    (same_weights, cut_scalars), _ = clipped(1, 1e6, max_norm)
    (cut_weights, same_scalars), _ = clipped(1e6, 1, max_norm)
    assert torch.equal(same_weights, weights)
    assert torch.equal(same_scalars, scalars)
    for cut in (cut_weights, cut_scalars):
        assert cut.norm().item() == pytest.approx(max_norm, rel=1e-5)
    for gradient, norm in zip((weights, scalars), norms, strict=True):
        assert norm > 1  # so that it is cut at 1 and left alone at 100
        assert gradient.norm().item() == pytest.approx(min(norm.item(), max_norm), rel=1e-5)


def test_null_does_not_clip():
    (weights, scalars), norms = clipped(1e6, 1e6, None)
    for gradient, norm in zip((weights, scalars), norms, strict=True):
        assert gradient.norm().item() == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 1e5
