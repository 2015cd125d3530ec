"""Grad-CAM and attention of a small DeiT, against the formulas by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from planted import recorded

from experiments.figures import maps
from multimax.models.vision import build_vision_transformer
from multimax.tasks.image_classification import ImageClassification
from multimax.training.config import read_config


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    attention, output = {"name": "multimax"}, {"name": "softmax"}
    sizes = {"patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_channels": 1}
    model = build_vision_transformer(
        "deit_tiny_patch16_224", attention=attention, output=output, num_classes=5,
        image_size=28, **sizes, **options,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # away from an attention that is almost uniform
            parameter.mul_(3)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def by_hand(model, images, inside):
    """What a module of the last block gives, with its gradients, and the scores."""
    kept = []
    handle = inside.register_forward_hook(lambda module, args, out: kept.append(out))
    scores = model(images)
    handle.remove()
    return kept[0], scores


@pytest.mark.parametrize("class_token", [False, True])
def test_attention_is_the_mean_over_heads_and_queries(images, class_token):
    model = model_of(class_token=class_token)
    found = maps.attention_map(model, images)
    p, _ = by_hand(model, images, model.blocks[-1].attn.normalizer)
    first = int(class_token)
    expected = p.sum((1, 2))[:, first:] / (2 * (16 + first))
    assert found.shape == (3, 4, 4)
    torch.testing.assert_close(found.flatten(1), expected.detach())
    assert not model.blocks[-1].attn.normalizer._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("class_token", [False, True])
def test_grad_cam_is_the_weighted_sum_of_what_is_positive(images, class_token):
    pytest.importorskip("pytorch_grad_cam", reason="pip install '.[figures]'")
    model = model_of(class_token=class_token)
    labels = torch.tensor([4, 0, 2])
    found = maps.grad_cam(model, images, labels)
    tokens, scores = by_hand(model, images, model.blocks[-1].norm1)
    (gradient,) = torch.autograd.grad(scores[torch.arange(3), labels].sum(), tokens)
    first = int(class_token)
    weights = gradient[:, first:].mean(1, keepdim=True)
    cam = (weights * tokens[:, first:]).sum(-1).relu().detach().view(3, 1, 4, 4)
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    assert (high > 0).all()
    large = F.interpolate((cam - low) / (high - low), (28, 28), mode="bilinear")[:, 0]
    # The package scales once more after it has enlarged the map.
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, (large - low) / (high - low), atol=1e-4, rtol=0)


def test_without_the_package_it_says_what_to_type(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[figures\]'"):
        maps.grad_cam(model_of(), images, torch.zeros(3, dtype=torch.int64))


class Batches(ImageClassification):
    """Two batches of images that are their own number."""

    def __init__(self):
        labels = [torch.tensor([2, 0, 2]), torch.tensor([0, 1, 2])]
        numbers = torch.arange(6.0).view(2, 3, 1, 1, 1)
        self.splits = {"valid": 0, "test": 6}
        self.eval_loaders = {"test": list(zip(numbers, labels, strict=True)), "valid": []}


def test_the_images_are_not_picked():
    images, labels = maps.first_of_each_class(Batches())
    assert labels.tolist() == [0, 1, 2]
    assert images.flatten().tolist() == [1.0, 4.0, 0.0]


def run_folder(runs, name, cell, seed=0, finished=True, others=()):
    folder = runs / name
    folder.mkdir(parents=True)
    config = recorded("table2", cell, *others) | {"seed": seed}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if finished:
        (folder / "result.json").write_text("{}")


@pytest.mark.slow
def test_runs_are_found_by_their_configuration(tmp_path):
    run_folder(tmp_path, "a", "softmax", seed=2)
    run_folder(tmp_path, "b", "multimax2-both", seed=2)
    run_folder(tmp_path, "c", "multimax2-attention", seed=2, finished=False)
    run_folder(tmp_path, "d", "multimax2-attention", seed=2, others=("model.depth=3",))
    pair = maps.find_pair(tmp_path)
    assert (pair.softmax, pair.multimax) == (tmp_path / "a", tmp_path / "b")
    (tmp_path / "c" / "result.json").write_text("{}")
    assert maps.find_pair(tmp_path).multimax == tmp_path / "c"


def test_missing_runs_and_damaged_configurations_are_said(tmp_path):
    run_folder(tmp_path, "a", "softmax")
    with pytest.raises(FileNotFoundError, match=r"train\.py -m study=table2 cells=softmax"):
        maps.find_pair(tmp_path)
    (tmp_path / "a" / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        maps.find_pair(tmp_path)


@pytest.mark.slow
def test_the_figure_has_a_row_for_each_map(tmp_path, monkeypatch):
    models = {"one": model_of(), "other": model_of(seed=1)}
    config = read_config(recorded("table2", "softmax"))

    def load_task(folder):
        task = object.__new__(ImageClassification)
        task.model = models[folder.name]
        task.data = type("Data", (), {"class_names": list("abcde")})
        labels = torch.arange(5).flip(0)
        task.eval_loaders = {"test": [(torch.randn(5, 1, 28, 28), labels)]}
        task.splits = {"test": 5}
        return config, task

    pair = maps.Pair("multimax2-attention", 0, Path("one"), Path("other"))
    drawn = []
    monkeypatch.setattr(maps, "load_task", load_task)
    monkeypatch.setattr(maps, "find_pair", lambda runs: pair)
    monkeypatch.setattr(maps, "grad_cam", lambda model, images, labels: images.mean(1))
    monkeypatch.setattr(maps, "save", lambda figure, *_: drawn.append(figure) or [])
    maps.draw(tmp_path)
    axes = np.array(drawn[0].axes).reshape(5, 5)
    assert [axis.get_title() for axis in axes[0]] == list("abcde")
    assert [axis.get_ylabel() for axis in axes[:, 0]] == [
        "image", "Grad-CAM\nSoftMax", "Grad-CAM\nMultiMax", "attention\nSoftMax",
        "attention\nMultiMax",
    ]  # fmt: skip
    shown = [axis.images[-1].get_array() for axis in axes[3:].flat]
    assert all(image.shape == (4, 4) for image in shown)
    assert not np.allclose(shown[0], shown[5])  # of two models
