"""The monitor: its values, when it measures, and that it leaves the model as it is."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from multimax import EntMax, MultiMax, SoftMax, monitor
from multimax.attention import attention


class Model(nn.Module):
    def __init__(self, normalizer=None, repeat=False):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.normalizer = normalizer or MultiMax()
        self.repeat = repeat

    def attend(self, x):
        q = self.linear(x)
        return attention(q, q, x, self.normalizer)

    def forward(self, x):
        return checkpoint(self.attend, x, use_reentrant=False) if self.repeat else self.attend(x)


def inputs():
    return torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))


def test_every_third_training_pass_is_measured_and_the_hooks_go():
    model, sent = Model(), []
    with monitor(model, every=3, log=lambda values, step: sent.append((step, values))):
        state = torch.get_rng_state()
        for step in range(1, 8):
            model(inputs())
            assert bool(model.normalizer._forward_hooks) == (step % 3 == 0)
            model.eval()(inputs())  # neither counts nor is seen
            assert not model.normalizer._forward_hooks
            model.train()
        assert torch.get_rng_state().equal(state)
    assert [step for step, _ in sent] == [3, 6]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_values_are_those_of_the_definitions():
    model, sent = Model(SoftMax(temperature=2.0)), {}
    with monitor(model, every=1, log=lambda values, _: sent.update(values)):
        model(inputs())
    q = model.linear(inputs()).double().detach()
    x = q @ q.transpose(-1, -2) / math.sqrt(8)
    p = (x / 2).softmax(-1)
    s, mean = x.softmax(-1).amin(-1), x.mean(-1)
    rows = list(zip(p.flatten(0, -2), x.flatten(0, -2), s.flatten(), mean.flatten(), strict=True))
    entropies = [-(a * a.log()).sum() for a, *_ in rows]
    sparse = [torch.exp(-a[b < m] / c).mean() for a, b, c, m in rows]
    kept = [(b > m) & (b < b.max()) for _, b, _, m in rows]
    modal = [1 - (a.max() - a[k]).mean() for (a, *_), k in zip(rows, kept, strict=True) if k.any()]
    for name, values in [("entropy", entropies), ("sparsity", sparse), ("multi_modality", modal)]:
        expected = torch.stack(values).mean().item()
        assert sent[f"normalizers/model/{name}"] == pytest.approx(expected, rel=1e-5)
    assert "learned/model/temperature" not in sent  # it is fixed


def test_learned_scalars():
    module, sent = MultiMax(affine=True), {}
    with torch.no_grad():
        module.ts.copy_(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    with monitor(Model(module), every=1, log=lambda values, _: sent.update(values)) as handle:
        handle.remove()
    model = Model(module)
    with monitor(model, every=1, log=lambda values, _: sent.update(values)):
        model(inputs())
    expected = {"t_b_1": 0.75, "t_d_1": 1.5, "t_b_2": 0.25, "t_d_2": 2.0}
    expected |= {"scale": 1.0, "shift": 0.0}
    assert {name: sent[f"learned/model/{name}"] for name in expected} == expected
    model = Model(EntMax(learned=True))
    with monitor(model, every=1, log=lambda values, _: sent.update(values)):
        model(inputs())
    assert sent["learned/model/alpha"] == pytest.approx(model.normalizer.alpha.item())


def test_masks_in_the_scores_are_no_scores():
    scores = torch.randn(3, 6)
    hidden = torch.arange(6) > 3
    found = []
    for masked in (scores[:, :4], scores.masked_fill(hidden, -1e9)):
        model = nn.Sequential(MultiMax(init="identity"))
        with monitor(model, every=1, log=lambda values, _: found.append(values)):
            model(masked)
    short, filled = found
    for name in ("entropy", "sparsity", "multi_modality"):
        key = f"normalizers/0/{name}"
        assert filled[key] == pytest.approx(short[key], rel=1e-5)


def test_gradient_checkpointing_takes_one_path():
    model, sent = Model(repeat=True), []
    with monitor(model, every=1, log=lambda values, step: sent.append(step)):
        model(inputs()).sum().backward()
    gradient = model.linear.weight.grad.clone()
    model.zero_grad()
    model(inputs()).sum().backward()
    torch.testing.assert_close(gradient, model.linear.weight.grad)
    assert sent == [1]


def test_loggers():
    class Writer(list):
        def add_scalar(self, name, value, step):
            self.append((name, step))

    class Run(list):
        def log(self, values, step):
            self.extend((name, step) for name in values)

    for log in (Writer(), Run()):
        model = Model()
        with monitor(model, every=1, log=log):
            model(inputs())
        assert ("normalizers/model/sparsity", 1) in log
    for every, log in ((0, print), (1, None)):
        with pytest.raises(ValueError, match="must be"):
            monitor(Model(), every, log)
    with pytest.raises(ValueError, match="no normalizer"):
        monitor(nn.Linear(1, 1), 1, print)


def test_an_error_of_the_logger_is_raised():
    def log(*_):
        raise OSError("full")

    model = Model()
    with monitor(model, every=1, log=log), pytest.raises(OSError, match="full"):
        model(inputs())
