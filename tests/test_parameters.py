"""Groups of parameters for optimizers, and gradients that are clipped by group."""

import pytest
import torch
from torch import nn

from multimax import MultiMax, clip_gradients, parameter_groups, replace_softmax
from multimax.parameters import normalizer_parameters


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.normalizer = MultiMax()


def encoder(**options):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    replace_softmax(model, **options)
    return model


def test_every_parameter_is_in_one_group():
    model = encoder()
    model.layers[1].linear1.weight = model.layers[0].linear1.weight  # tied
    model.layers[0].norm1.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, lr=0.5)
    assert [group["name"] for group in groups] == ["decayed", "not_decayed", "scalars"]
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    decayed, plain, scalars = groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert set(scalars["params"]) == set(normalizer_parameters(model))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.5]


def test_shared_scalars_are_in_their_group_once():
    model = encoder(shared=True)
    (scalars,) = (g for g in parameter_groups(model) if g["name"] == "scalars")
    assert len(scalars["params"]) == 2  # ts and ranges


def test_groups_without_parameters_are_left_out():
    model = encoder().requires_grad_(False)
    for scalar in normalizer_parameters(model):
        scalar.requires_grad_(True)
    assert [group["name"] for group in parameter_groups(model)] == ["scalars"]


def test_clip_gradients_clips_apart():
    model = Model()
    model.linear.weight.grad = torch.full((8, 8), 2.0)  # of norm 16
    model.normalizer.ts.grad = torch.full((4,), 0.25)  # of norm 0.5
    norms = clip_gradients(model, 1.0)
    assert [norm.item() for norm in norms] == [16.0, 0.5]
    assert model.linear.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert model.normalizer.ts.grad.equal(torch.full((4,), 0.25))
    with pytest.raises(ValueError, match="max_norm"):
        clip_gradients(model, 0.0)
