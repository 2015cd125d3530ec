"""The image task: its loss and its metrics next to what is computed by other means."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

from multimax import MultiMax, build_normalizer
from multimax.tasks import build_task, image_classification
from multimax.training.config import read_config

ROOT = Path(__file__).parents[2]
TINY = (
    "experiment=deit_softmax", "model.depth=1", "model.embed_dim=16", "model.num_heads=2",
    "data.crop_padding=0", "data.horizontal_flip=0", "data.random_erasing=0",
    "trainer.batch_size=20", "trainer.eval_batch_size=300",
)  # fmt: skip


def build(*overrides, rank=0, world_size=1):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = read_config(compose("config", [*TINY, *overrides]))
    torch.manual_seed(0)
    return build_task(config, rank, world_size, torch.device("cpu"))


class Table(nn.Module):
    """A model that answers with given scores, image after image, in evaluation mode alone."""

    def __init__(self, scores, output):
        super().__init__()
        self.scores, self.output, self.seen = scores, output, 0

    def forward(self, images):
        assert not self.training
        self.seen += len(images)
        return self.scores[self.seen - len(images) : self.seen]


def evaluate(task, model, split="valid"):
    with torch.inference_mode():
        return task.evaluate(model.eval(), split, lambda totals: totals)


def labels(task, split):
    return torch.cat([targets for _, targets in task.eval_loaders[split]])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["valid", "test"])
def test_top1_top5_and_loss(split):
    task = build()
    target = labels(task, split)
    scores = torch.randn(len(target), 10)
    scores[torch.arange(len(target)), target] += 1.5
    found = evaluate(task, Table(scores, build_normalizer("softmax")), split)
    place = (np.argsort(-scores.numpy(), axis=1) == target.numpy()[:, None]).argmax(1)
    assert found["top1"] == pytest.approx(100 * (place == 0).mean(), abs=1e-9)
    assert found["top5"] == pytest.approx(100 * (place < 5).mean(), abs=1e-9)
    assert 30 < found["top1"] < found["top5"] - 10 < 89
    batches = zip(scores.split(300), target.split(300), strict=True)
    loss = sum(F.cross_entropy(*batch, reduction="none").sum().item() for batch in batches)
    assert found["loss"] == pytest.approx(loss / len(target), rel=1e-12)  # summed in fp64


@pytest.mark.slow
def test_classes_are_ranked_by_probability():
    """A modulator that falls for large scores gives the second largest most."""
    task = build()
    target = labels(task, "valid")
    output = MultiMax()
    with torch.no_grad():
        output.ts.copy_(torch.tensor([0.0, -2.0, 0.0, 0.0]))
        output.ranges.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    row = torch.tensor([3.0, 1.0, 0.0])
    probabilities = output(row).tolist()
    assert probabilities == pytest.approx([0.0900, 0.6652, 0.2447], abs=1e-4)
    scores = torch.full((len(target), 10), -5.0)
    number = torch.arange(len(target))
    scores[number, (target + 1) % 10] = 3.0
    scores[number, target] = 1.0
    assert evaluate(task, Table(scores, output))["top1"] == 100
    assert evaluate(build(), Table(scores, build_normalizer("softmax")))["top1"] == 0


@pytest.mark.slow
def test_classes_without_probability_keep_the_order_of_their_scores():
    task = build()
    target = labels(task, "valid")
    scores = torch.randn(len(target), 10)
    output = build_normalizer("sparsemax")
    positive = (output(10 * scores) > 0).sum(-1)
    assert (positive < 5).all()
    found = evaluate(task, Table(10 * scores, output))
    dense = evaluate(build(), Table(10 * scores, build_normalizer("softmax")))
    assert [found[key] for key in ("top1", "top5")] == [dense[key] for key in ("top1", "top5")]
    assert 35 < found["top5"] < 65  # of random scores


def test_a_loss_that_is_not_finite_is_no_figure():
    task = build()
    scores = torch.randn(len(labels(task, "valid")), 10)
    scores[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="the valid loss is nan: training has diverged"):
        evaluate(task, Table(scores, build_normalizer("softmax")))


@pytest.mark.slow
def test_label_smoothing_is_of_training_alone():
    task = build("loss.label_smoothing=0.3")
    images, targets = next(task.train_loader.batches(0))
    scores = task.model(images)
    expected = F.cross_entropy(scores, targets, label_smoothing=0.3)
    torch.testing.assert_close(task.loss(task.model, (images, targets)), expected)
    assert not torch.allclose(expected, F.cross_entropy(scores, targets))


def test_mixup_has_smoothed_targets_that_sum_to_one(monkeypatch):
    task = build("loss.label_smoothing=0.2", "loss.mixup=0.8", "loss.cutmix=1.0")
    images, targets = next(task.train_loader.batches(0))
    seen = {}

    def spy(normalizer, scores, soft, **options):
        seen.update(soft=soft, options=options)
        return scores.sum()

    monkeypatch.setattr("multimax.tasks.image_classification.output_loss", spy)
    before = images.clone()
    task.loss(task.model, (images, targets))
    soft = seen["soft"]
    assert torch.equal(images, before)
    assert seen["options"] == {}
    torch.testing.assert_close(soft.sum(1), torch.ones(20))
    assert soft.min().item() == pytest.approx(0.2 / 10)
    top = soft.topk(2, dim=1).values.sum(1)
    assert ((top - (1 - 8 * 0.02)).abs() < 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cut"),
    [
        (("loss.mixup=1000", "loss.cutmix=0"), False),
        (("loss.mixup=0", "loss.cutmix=1000"), True),
        (("loss.mixup=1000", "loss.cutmix=1000", "loss.mixup_switch_prob=0"), False),
        (("loss.mixup=1000", "loss.cutmix=1000", "loss.mixup_switch_prob=1"), True),
    ],
)
def test_images_and_targets_are_mixed_alike(monkeypatch, options, cut):
    """In halves, as Beta(1000, 1000) draws them; a piece that is cut may end at the border."""
    task, seen = build("loss.label_smoothing=0", *options), {}
    monkeypatch.setattr(
        "multimax.tasks.image_classification.output_loss",
        lambda _, scores, soft: seen.update(images=scores, soft=soft),
    )
    np.random.seed(0)
    images, targets = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    task.loss(lambda mixed: mixed, (images, targets))
    share = seen["soft"][0, 0].item()
    assert 0.4 < share < (0.9 if cut else 0.6)
    partners = F.one_hot(targets.flip(0), 10)
    expected = share * F.one_hot(targets, 10) + (1 - share) * partners
    torch.testing.assert_close(seen["soft"], expected)
    if cut:
        taken = seen["images"] != images
        assert torch.equal(seen["images"], torch.where(taken, images.flip(0), images))
        assert taken.double().mean().item() == pytest.approx(1 - share, abs=1e-6)
    else:
        blend = share * images + (1 - share) * images.flip(0)
        torch.testing.assert_close(seen["images"], blend)


@pytest.mark.slow
def test_every_rank_evaluates_its_share():
    whole = build()
    parts = [build(rank=rank, world_size=2) for rank in range(2)]
    assert sum(len(labels(part, "test")) for part in parts) == len(labels(whole, "test")) == 2000
    scores = torch.zeros(2000, 10)
    with pytest.raises(RuntimeError, match=r"evaluated 1000 of 2000 test images"):
        evaluate(parts[0], Table(scores, build_normalizer("softmax")), "test")


@pytest.mark.slow
def test_what_a_reader_is_told():
    task = build("attention=multimax", "output=entmax15")
    lines = task.describe()
    assert lines["data"] == (
        "fashion_mnist_subset: 7,000 train, 1,000 valid, 2,000 test images of 28 x 28"
    )
    assert lines["attention"].startswith("MultiMax")
    assert lines["output"] == "EntMax15(alpha=1.5)"
    assert lines["model"].startswith("VisionTransformer, ")
    rows = task.inspect(task.model.eval())
    assert list(rows) == ["blocks.0.attn.normalizer", "output"]
    assert rows["output"]["entropy_count"] == 2000  # the test split


def test_only_so_many_images_are_inspected(monkeypatch):
    task = build()
    monkeypatch.setattr(image_classification, "INSPECTED_IMAGES", 70)
    sizes = []
    task.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    rows = task.inspect(task.model.eval())
    assert rows["output"]["entropy_count"] == 70
    assert sizes == [50, 20]  # few at once: scores of long sequences would not fit into memory
