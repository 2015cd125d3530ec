"""The synthetic tasks: their measures next to closed forms and to models that know the answer."""

import math
from itertools import islice

import pytest
import torch
from synthetic import FEW, build, evaluate
from torch import nn

from multimax import MultiMax, build_normalizer

K_MEAN = (*FEW, "data.test_lengths=[64,256]", "data.test_marked=[1,16]")
MAXIMUM = (*FEW, "data.test_lengths=[16,64]")


class Weighted(nn.Module):
    """Predicts the mean of the values, with weights that are a function of the relevance."""

    def __init__(self, weigh):
        super().__init__()
        self.weigh = weigh

    def forward(self, items):
        return (self.weigh(items[..., 0]).unsqueeze(-1) * items[..., 1:]).sum(1)


def marked_evenly(relevance):
    marked = (relevance > 0.5).double()
    return marked / marked.sum(1, keepdim=True)


WEIGHTS = {
    "zero": torch.zeros_like,
    "uniform": lambda relevance: torch.full_like(relevance, 1 / relevance.size(1)),
    "softmax": lambda relevance: (10 * relevance).softmax(1),
}


def test_one_kth_on_each_marked_item_has_no_error():
    found = evaluate(build("retrieval_softmax", *K_MEAN), Weighted(marked_evenly))
    assert list(found) == ["loss", "mse", "mse_n64", "mse_n256", "mse_k1", "mse_k16"]
    assert all(0 <= value < 1e-12 for value in found.values())


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_error_is_k_times_the_squared_distance_of_the_weights(name):
    """Up to what is left to chance: values are N(0, 1), and so errors of given weights normal."""
    task = build("retrieval_softmax", *K_MEAN)
    found = evaluate(task, Weighted(WEIGHTS[name]))
    variances = {}
    for batch in task.eval_loaders["test"]:
        relevance = batch.inputs[..., 0].double()
        distance = (WEIGHTS[name](relevance) - marked_evenly(relevance)).square().sum(1)
        variances.setdefault(batch.setting, []).append(batch.setting.relevant * distance)
    for end, setting in task.data.settings["test"].items():
        variance = torch.cat(variances[setting])
        assert len(variance) == 200
        expected, (length, marked) = variance.mean().item(), setting
        if name in ("zero", "uniform"):  # closed forms
            assert expected == pytest.approx(1 - (name == "uniform") * marked / length)
        deviation = math.sqrt(2 * variance.square().mean().item() / (200 * 8))
        assert abs(found[f"mse_{end}" if end else "mse"] - expected) < 5 * deviation
    assert found["loss"] == found["mse"] == found["mse_n64"]


def test_the_loss_is_the_monitored_error():
    task = build("retrieval_softmax", *K_MEAN)
    batch = next(task.train_loader.batches(0))
    predicted = 2 * task.model(batch.inputs)  # sqrt(4) marked items
    expected = sum(((predicted - batch.targets) ** 2).flatten().tolist()) / (64 * 8)
    assert task.loss(task.model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert task.weight(batch) == 64


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax", "multimax"])
@pytest.mark.parametrize("keys", ["linear", "mlp"])
def test_the_model_is_attention_of_one_query(normalizer, keys):
    task = build("retrieval_softmax", *K_MEAN, f"attention={normalizer}", f"model.keys={keys}")
    attn, items = task.model.attn, torch.randn(3, 5, 9, dtype=torch.float64)
    task.model.double()
    hidden = items
    if keys == "mlp":
        first, _, last = attn.k_proj
        hidden = nn.functional.gelu(items @ first.weight.T + first.bias)
    last = attn.k_proj if keys == "linear" else last
    scores = (hidden @ last.weight.T + last.bias) @ attn.query[0] / 4  # sqrt(16)
    values = items @ attn.v_proj.weight.T + attn.v_proj.bias
    expected = torch.stack([p @ v for p, v in zip(attn.normalizer(scores), values, strict=True)])
    torch.testing.assert_close(task.model(items), expected)
    order = torch.randperm(5)
    torch.testing.assert_close(task.model(items[:, order]), expected)


def test_the_loss_of_training_is_that_of_evaluation():
    task = build("max_retrieval_multimax", *FEW)
    batch = next(task.train_loader.batches(0))
    losses, _ = task.measures(task.model, batch)
    assert len(losses) == len(batch.targets)
    torch.testing.assert_close(task.loss(task.model, batch), losses.mean())


def test_weights_do_not_depend_on_the_normalizer():
    models = [build("retrieval_softmax", f"attention={n}").model for n in ("softmax", "multimax")]
    plain, modulated = (dict(model.named_parameters()) for model in models)
    assert set(modulated) - set(plain) == {"attn.normalizer.ts", "attn.normalizer.ranges"}
    assert all(torch.equal(modulated[name], tensor) for name, tensor in plain.items())


class Table(nn.Module):
    """A model that answers with given scores, set after set."""

    def __init__(self, scores, output):
        super().__init__()
        self.scores, self.output, self.seen = scores, output, 0

    def forward(self, items):
        self.seen += len(items)
        return self.scores[self.seen - len(items) : self.seen]


def test_accuracy_and_loss_of_max_retrieval():
    task = build("max_retrieval_softmax", *FEW)
    targets = torch.cat([batch.targets for batch in task.eval_loaders["valid"]])
    scores = torch.randn(300, 10)
    scores[torch.arange(300), targets] += 1
    task.model = Table(scores, build_normalizer("softmax"))
    found = evaluate(task, split="valid")
    right = sum(row.argmax() == target for row, target in zip(scores, targets, strict=True))
    assert found["accuracy"] == pytest.approx(100 * right.item() / 300)
    assert 20 < found["accuracy"] < 80
    chosen = [row.softmax(0)[target] for row, target in zip(scores, targets, strict=True)]
    expected = -sum(math.log(p) for p in chosen) / 300
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_classes_are_ranked_by_probability():
    """A modulator that falls for large scores gives the second largest most."""
    task = build("max_retrieval_softmax", *FEW)
    targets = torch.cat([batch.targets for batch in task.eval_loaders["valid"]])
    number, scores = torch.arange(300), torch.full((300, 10), -5.0)
    scores[number, targets] = 1.0
    scores[number, (targets + 1) % 10] = 3.0
    output = MultiMax()
    with torch.no_grad():
        output.ts.copy_(torch.tensor([0.0, -2.0, 0.0, 0.0]))
        output.ranges.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    for normalizer, accuracy in ((output, 100), (build_normalizer("softmax"), 0)):
        task.model = Table(scores, normalizer)
        assert evaluate(task, split="valid")["accuracy"] == accuracy


@pytest.mark.parametrize(
    ("experiment", "sizes"),
    [("retrieval_softmax", K_MEAN), ("max_retrieval_softmax", MAXIMUM)],
)
def test_processes_evaluate_shares_of_a_split(experiment, sizes):
    whole = evaluate(build(experiment, *sizes))
    tasks, shares = [build(experiment, *sizes, rank=rank, world_size=2) for rank in (0, 1)], []
    for task in tasks:
        with pytest.raises(RuntimeError, match="evaluated 100 of 200 test examples"):
            evaluate(task)
        task.evaluate(task.model, "test", lambda own: shares.append(own) or whole_of(own))
    task = tasks[0]
    with torch.inference_mode():
        found = task.evaluate(task.model, "test", lambda _: sum(shares))
    assert found == pytest.approx(whole, rel=1e-12)


def whole_of(totals):
    """Totals with the number of examples that is expected."""
    return totals.clone().index_fill_(1, torch.tensor([2]), 200.0)


READ = {
    "retrieval_multimax": ("k_mean", {"attn.normalizer": 200}),
    "max_retrieval_multimax": ("maximum", {"attn.normalizer": 200, "output": 200}),
}


@pytest.mark.parametrize("experiment", READ)
def test_what_a_reader_is_told(experiment):
    task = build(experiment, "output=softmax", *FEW)
    data, counts = READ[experiment]
    lines = task.describe()
    assert lines["data"].startswith(f"{data}: endless training examples; 300 valid, 200 test")
    assert "n4096" in lines["data"]
    assert lines["attention"] == "MultiMax(order=2, init='paper')"
    rows = task.inspect(task.model.eval())
    assert {name: row["entropy_count"] for name, row in rows.items()} == counts
    assert 0 < rows["attn.normalizer"]["entropy"] < math.log(64)


def test_settings_of_normalizers_reach_the_model():
    model = build("max_retrieval_softmax", "output=multimax", "output.order=3").model
    assert (str(model.attn.normalizer), model.output.order) == ("SoftMax(temperature=1)", 3)
    before = "attention.before_scale=true", "model.head_dim=25"
    normalizer = build("retrieval_multimax", *before).model.attn.normalizer
    assert normalizer.score_scale == pytest.approx(1 / 5)


def test_an_output_layer_that_is_not_there():
    for setting in ("output=multimax", "output.temperature=2"):
        with pytest.raises(ValueError, match=r"output\.name=.* is for nothing in task=retrieval"):
            build("retrieval_softmax", setting)


def test_divergence_is_said():
    task = build("retrieval_softmax", *K_MEAN)
    with torch.no_grad():
        task.model.attn.v_proj.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the test loss is nan: training has diverged"):
        evaluate(task)


@pytest.mark.slow
def test_sparsemax_learns_to_find_the_marked_items():
    task = build("retrieval_softmax", "attention=sparsemax", *K_MEAN)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-2)
    for batch in islice(task.train_loader.batches(0), 400):
        task.loss(task.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate(task)["mse_n256"] < 0.3
