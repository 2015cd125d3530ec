"""Tasks of sequences: their measures next to loops, and to models that know the answer."""

import pytest
import torch
import torch.nn.functional as F
from synthetic import FEW, build, evaluate
from torch import nn

SMALL = (*FEW, "model.embed_dim=16", "model.depth=1")
OWN = {
    "recall_multimax": ("data.vocabulary_size=64", "data.settings=[[32,2],[48,3]]"),
    "mqmtar_multimax": ("data.test_lengths=[64,80]", "data.alphabet=8"),
    "reverse_multimax": ("data.test_lengths=[16,20]", "data.alphabet=24"),
    "sort_multimax": ("data.test_lengths=[16,20]", "data.alphabet=24"),
}
NAMES = {"recall_multimax": ("n32", "n48"), "mqmtar_multimax": ("n64", "n80")}
ANSWER = {"recall_multimax": 3, "mqmtar_multimax": 8}  # tokens; as many as there are else
every_task = pytest.mark.parametrize("experiment", OWN)


def small(experiment, *overrides):
    return build(experiment, *SMALL, *OWN[experiment], *overrides)


class Oracle(nn.Module):
    """Knows the answers, but for every seventh token of them, if it is to make `mistakes`.

    Its features are the scores of an output layer that leaves them as they are.
    """

    def __init__(self, task, mistakes):
        super().__init__()
        self.output = task.model.output
        size = task.data.vocabulary_size
        self.output.weight = nn.Parameter(torch.eye(size))
        self.mistakes, self.answers, self.size = mistakes, {}, size
        for split in ("valid", "test"):
            for batch in task.eval_loaders[split]:
                for tokens, targets in zip(batch.inputs, batch.targets, strict=True):
                    self.answers[tuple(tokens.tolist())] = targets

    def forward(self, inputs):
        targets = torch.stack([self.answers[tuple(tokens)] for tokens in inputs.tolist()])
        scores = F.one_hot(targets, self.size).float()
        if self.mistakes:
            place = torch.arange(targets.size(1))
            wrong = (place + inputs.sum(1, keepdim=True)) % 7 == 0
            scores[wrong] = scores[wrong].roll(1, dims=-1)
        return 9 * scores


@every_task
def test_an_oracle_is_right(experiment):
    task = small(experiment)
    found = evaluate(task, Oracle(task, mistakes=False))
    ends = NAMES.get(experiment, ("n16", "n20"))
    names = [f"{name}_{end}" for end in ends for name in ("accuracy", "exact_match")]
    assert list(found) == ["loss", "accuracy", "exact_match", *names]
    assert all(value == 100 for name, value in found.items() if name != "loss")
    assert 0 < found["loss"] < 0.1


@every_task
def test_accuracy_is_of_tokens_and_exact_match_of_sequences(experiment):
    task = small(experiment)
    oracle = Oracle(task, mistakes=True)
    found = evaluate(task, oracle, split="valid")
    tokens, sequences = [], []
    for batch in task.eval_loaders["valid"]:
        for tokens_in, wanted in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            counted = [place for place in range(len(wanted)) if wanted[place] != 0]
            assert len(counted) == ANSWER.get(experiment, 16)
            right = [(place + sum(tokens_in)) % 7 != 0 for place in counted]
            tokens += right
            sequences.append(all(right))
    assert len(sequences) == 300
    assert found["accuracy"] == pytest.approx(100 * sum(tokens) / len(tokens), rel=1e-6)
    assert found["exact_match"] == pytest.approx(100 * sum(sequences) / 300, rel=1e-6)
    assert 60 < found["accuracy"] < 95
    if ANSWER.get(experiment) == 3:
        assert 0 < found["exact_match"] < found["accuracy"]


@every_task
def test_the_loss_is_of_the_answer_alone(experiment):
    task = small(experiment)
    batch = next(task.train_loader.batches(0))
    with torch.no_grad():
        probabilities = task.model.output.probabilities(task.model(batch.inputs))
        losses = [
            -row[place, wanted[place]].log().item()
            for row, wanted in zip(probabilities, batch.targets, strict=True)
            for place in range(len(wanted))
            if wanted[place]
        ]
    expected = pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert task.loss(task.model, batch).item() == expected
    assert task.measures(task.model, batch)[0].mean().item() == expected


def test_processes_evaluate_shares_of_a_split():
    experiment, shares = "reverse_multimax", []
    whole = evaluate(small(experiment))

    def keep(own):
        shares.append(own)
        return own * torch.tensor([1.0, 1.0, 1.0, 2.0])  # with the number of all

    for rank in (0, 1):
        task = build(experiment, *SMALL, *OWN[experiment], rank=rank, world_size=2)
        with pytest.raises(RuntimeError, match="evaluated 100 of 200 test examples"):
            evaluate(task)
        with torch.inference_mode():
            task.evaluate(task.model, "test", keep)
    with torch.inference_mode():
        found = task.evaluate(task.model, "test", lambda _: sum(shares))
    assert found == pytest.approx(whole, rel=1e-12)


def test_what_a_reader_is_told():
    task = small("mqmtar_multimax")
    lines = task.describe()
    assert lines["data"].startswith("multi_token_recall: endless training examples; 300 valid,")
    assert lines["attention"] == "MultiMax(order=2, init='paper')"
    rows = task.inspect(task.model.eval())
    assert set(rows) == {
        "decoder.layers.0.self_attn.normalizer", "decoder.output_projection.normalizer",
    }  # fmt: skip
