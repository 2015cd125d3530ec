"""Where a DeiT looks: Grad-CAM and attention, SoftMax beside MultiMax (the paper's Figure 2).

Of the first test image of each class, whatever it looks like. Grad-CAM is of the true class, at the
first normalization of the last block, whose output that block's attention receives. The attention
is that of the last block: the mean over its heads and queries, what each patch gives to the average
that the image is classified from. Each map is scaled to its own range.

Needs the package grad-cam (pip install '.[figures]'), and the run folders themselves: this figure
is of the models.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from timm.models.vision_transformer import VisionTransformer

from experiments.figures.pairs import CELL_TITLES, Pair, pairs_of_task
from experiments.figures.saving import save
from experiments.measure import load_task
from multimax.tasks.base import Task, inspected_split
from multimax.tasks.image_classification import ImageClassification

RUNS = Path("outputs/small/deit")


def draw(folder: Path, runs: Path = RUNS) -> list[Path]:
    """Write `maps_deit` as PNG, of the first pair of finished runs of table 2 below `runs`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: grad-cam is not installed, or a run folder is damaged.
    """
    pair = find_pair(runs)
    softmax, multimax = (load_task(run)[1] for run in (pair.softmax, pair.multimax))
    images, labels = first_of_each_class(softmax)
    names = cast(ImageClassification, softmax).data.class_names
    columns = {"image": images.mean(1)}
    for title, task in {"SoftMax": softmax, "MultiMax": multimax}.items():
        model = cast(VisionTransformer, task.model)
        columns[f"Grad-CAM\n{title}"] = grad_cam(model, images, labels)
        columns[f"attention\n{title}"] = attention_map(model, images)
    order = ("image", "Grad-CAM\nSoftMax", "Grad-CAM\nMultiMax", "attention\nSoftMax",
             "attention\nMultiMax")  # fmt: skip
    return _draw(folder, pair, {title: columns[title] for title in order}, labels, names)


def find_pair(runs: Path) -> Pair[Path]:
    """The finished runs with SoftMax and with MultiMax of the first seed that has both.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = [file.parent for file in sorted(runs.glob("*/result.json"))]
    configs: dict[str, tuple[dict[str, Any], Path]] = {
        str(folder): (cast(Any, OmegaConf.to_container(_config(folder))), folder)
        for folder in folders
    }
    pairs = pairs_of_task("deit", configs)
    if not pairs:
        raise FileNotFoundError(
            f"{runs} has no finished run with SoftMax and one with MultiMax of the same seed: "
            "python train.py -m study=table2 cells=softmax,multimax2-attention seed=0"
        )
    return pairs[0]


def _config(folder: Path) -> Any:
    file = folder / "config.yaml"
    try:
        return OmegaConf.load(file)
    except Exception as error:  # those of YAML have no class in common with the others
        raise ValueError(f"{file} cannot be read ({error}): copy the run folder again") from error


def first_of_each_class(task: Task) -> tuple[Tensor, Tensor]:
    """Images (classes, channels, height, width) and labels (classes,) of the test split."""
    found: dict[int, Tensor] = {}
    for images, labels in task.evaluation_batches(inspected_split(task.splits)):
        for image, label in zip(images, labels.tolist(), strict=True):
            found.setdefault(label, image)
    labels = sorted(found)
    return torch.stack([found[label] for label in labels]), torch.tensor(labels)


def grad_cam(model: VisionTransformer, images: Tensor, labels: Tensor) -> Tensor:
    """Grad-CAM of the labels, (images, height, width) in [0, 1].

    Source: Selvaraju et al., Grad-CAM, ICCV 2017; the package of Gildenblat et al.
    """
    try:
        package: Any = import_module("pytorch_grad_cam")  # not everyone has it
    except ImportError as error:
        raise ValueError(f"Grad-CAM ({error}): pip install '.[figures]'") from error
    block: Any = model.blocks[-1]
    patches = Patches(model)
    target = package.utils.model_targets.ClassifierOutputTarget
    targets = [target(label) for label in labels.tolist()]
    with package.GradCAM(model, [block.norm1], reshape_transform=patches.as_image) as cam:
        return torch.from_numpy(np.asarray(cam(images, targets)))


class Patches:
    """The patches of a vision transformer among its tokens.

    Args:
        model: the vision transformer.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.before = model.num_prefix_tokens
        self.rows, self.columns = model.patch_embed.grid_size

    def as_image(self, tokens: Tensor) -> Tensor:
        """(images, tokens, dim) as (images, dim, rows, columns), the class token left out."""
        patches = tokens[:, self.before :].transpose(1, 2)
        return patches.unflatten(2, (self.rows, self.columns))


@torch.no_grad()
def attention_map(model: VisionTransformer, images: Tensor) -> Tensor:
    """Mean attention to each patch in the last block, (images, rows, columns)."""
    block: Any = model.blocks[-1]
    seen: list[Tensor] = []

    def record(module: Any, args: Any, probabilities: Tensor) -> None:
        seen.append(probabilities)

    handle = block.attn.normalizer.register_forward_hook(record)
    try:
        model(images)
    finally:
        handle.remove()
    (probabilities,) = seen
    received = probabilities.mean((1, 2))  # over heads and queries
    return Patches(model).as_image(received[..., None])[:, 0]


def _draw(
    folder: Path, pair: Pair[Path], rows: dict[str, Tensor], labels: Tensor, names: list[str]
) -> list[Path]:
    image = rows["image"].cpu().numpy()
    extent = (0, image.shape[2], image.shape[1], 0)
    figure, grid = plt.subplots(
        len(rows), len(labels), figsize=(1.15 * len(labels) + 1, 1.2 * len(rows) + 0.9),
        layout="constrained",
    )  # fmt: skip
    for axes_row, (title, maps) in zip(grid, rows.items(), strict=True):
        for column, (axes, values) in enumerate(zip(axes_row, maps.cpu().numpy(), strict=True)):
            axes.imshow(image[column], cmap="gray", extent=extent)
            if title != "image":
                axes.imshow(values, cmap="inferno", alpha=0.65, extent=extent)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    for axes, label in zip(grid[0], labels.tolist(), strict=True):
        axes.set_title(names[label], fontsize=10)
    figure.suptitle(
        f"DeiT: first test image of each class; SoftMax and {CELL_TITLES[pair.cell]}, seed "
        f"{pair.seed}; bright is high, each map scaled to its own range",
        fontsize=11,
    )
    return save(figure, folder, "maps_deit", (".png",))
