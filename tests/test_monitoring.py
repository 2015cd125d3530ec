"""The monitor: its values, when it measures, and that it leaves the model as it is."""

import math

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes, needs_fork

from multimax import EntMax, MultiMax, NormalizerRecorder, SoftMax, monitor
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


def left_behind(model):
    """Hooks that are on the modules of a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_third_training_pass_is_measured_and_the_hooks_go():
    model, sent, hooked = Model(), [], []
    model.linear.register_forward_hook(lambda *_: hooked.append(left_behind(model.normalizer)))
    with monitor(model, every=3, log=lambda values, step: sent.append((step, values))):
        state = torch.get_rng_state()
        for _ in range(7):
            model(inputs())
            assert not left_behind(model.normalizer)
            model.eval()(inputs())  # neither counts nor is seen
            model.train()
        assert torch.get_rng_state().equal(state)
    assert [index for index, hooks in enumerate(hooked) if hooks] == [4, 10]
    assert [step for step, _ in sent] == [3, 6]
    assert left_behind(model) == 1  # this test's own


def test_an_error_in_the_pass_leaves_no_hook():
    model, sent = Model(), []
    with monitor(model, every=2, log=lambda values, step: sent.append(step)) as handle:
        model(inputs())
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 3))
        assert not left_behind(model.normalizer)
        model(inputs())
        model(inputs())
        assert sent == [4]
        with pytest.raises(ZeroDivisionError), monitor(model, every=1, log=lambda *_: 1 / 0):
            model(inputs())
        assert not left_behind(model.normalizer)
        handle.remove()
        assert not left_behind(model)


def test_each_accumulated_pass_counts_by_itself():
    model, sent = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.randn(4, 2, 3, 5, 8)
    expected = entropy_of(model, batches[1])  # of the second part of the first update alone
    with monitor(model, every=2, log=lambda values, step: sent.append((step, values))):
        for number, batch in enumerate(batches, 1):
            model(batch).square().sum().backward()
            if number % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert [step for step, _ in sent] == [2, 4]
    first, second = (values for _, values in sent)
    assert first["normalizers/model/entropy"] == pytest.approx(expected, rel=1e-5)
    assert first["learned/model/t_b_1"] != second["learned/model/t_b_1"]


def entropy_of(model, batch):
    with NormalizerRecorder(model) as recorder, torch.no_grad():
        model(batch)
    (measures,) = recorder.summary().values()
    return measures["entropy"]


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


@pytest.mark.parametrize("repeat", [False, True], ids=["plain", "checkpointing"])
def test_a_measured_step_is_the_step_without(repeat):
    model, sent = Model(repeat=repeat), []
    gradients = []
    for every in (1, 2):
        model.zero_grad()
        with monitor(model, every=every, log=lambda values, step: sent.append(step)):
            model(inputs()).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert sent == [1]
    for measured, plain in zip(*gradients, strict=True):
        assert measured.equal(plain)


@pytest.mark.slow
def test_a_compiled_model_is_measured_uncompiled_and_compiled_once():
    model, sent, graphs, numbers = Model(), [], [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    with monitor(compiled, every=2, log=lambda values, step: sent.append((step, values))):
        for _ in range(5):
            compiled(inputs())
            numbers.append(len(graphs))
    assert [step for step, _ in sent] == [2, 4]
    assert sent[0][1]["normalizers/model/entropy"] == pytest.approx(entropy_of(model, inputs()))
    assert min(numbers) == max(numbers) > 0
    with monitor(model, every=1, log=lambda *_: 1 / 0):  # of which the passes are not seen
        compiled(inputs())


@needs_fork
def test_rank_0_logs_its_share():
    batch = torch.randn(4, 3, 5, 8)
    model = Model()

    def work():
        distributed.init_process_group("gloo")
        wrapped, sent = DistributedDataParallel(model), []
        share = batch.chunk(2)[distributed.get_rank()]
        with monitor(wrapped, every=2, log=lambda values, step: sent.append((step, values))):
            for _ in range(3):
                wrapped(share).sum().backward()
        return sent

    of_first, of_second = in_two_processes(work)
    sent = []
    with monitor(model, every=1, log=lambda values, _: sent.append((2, values))):
        model(batch[:2])
    assert of_first == sent
    assert of_second == []


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
