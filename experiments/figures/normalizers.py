"""What each normalizer makes of the same ten scores."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.figures.saving import save
from multimax import entmax15, evsoftmax, multimax, softmax, sparsemax, topk

# Three relevant entries side by side and seven irrelevant ones.
SCORES = torch.tensor([3.0, 2.8, 2.5, 0.6, 0.4, 0.2, 0.0, -0.2, -0.5, -0.8])
T_B, T_D, B, D = 4.0, 0.2, 1.0, 2.0  # first order, chosen for the picture


def columns() -> dict[str, Tensor]:
    """Probabilities by title."""
    ts, ranges = torch.tensor([1 - T_B, T_D - 1]), torch.tensor([B, D])
    return {
        "SoftMax": softmax(SCORES),
        "SoftMax, t = 0.5": softmax(SCORES, temperature=0.5),
        "SoftMax, t = 2": softmax(SCORES, temperature=2.0),
        "top-k, k = 3": topk(SCORES, 3),
        "evidential SoftMax": evsoftmax(SCORES),
        "1.5-entmax": entmax15(SCORES),
        "sparsemax": sparsemax(SCORES),
        f"MultiMax\n$t_b$={T_B:g}, $t_d$={T_D:g}, b={B:g}, d={D:g}": multimax(SCORES, ts, ranges),
    }


def spread(relevant: Tensor) -> float:
    """What the third largest probability lacks to the largest: 0 is most multi-modal."""
    return float(relevant[0] - relevant[2])


def draw(folder: Path) -> list[Path]:
    """Write `normalizers.png`."""
    drawn = columns()
    figure, axes = plt.subplots(2, 4, figsize=(11, 4.6), sharex=True, sharey=True)
    for axis, (title, probabilities) in zip(axes.flat, drawn.items(), strict=True):
        relevant, rest = probabilities[:3], probabilities[3:]
        color = "tab:red" if "MultiMax" in title else "tab:blue"
        axis.bar(range(3), relevant.tolist(), color=color)
        axis.bar(range(3, 10), rest.tolist(), color="0.7")
        axis.set_title(title, fontsize=10)
        facts = (f"left for the rest: {rest.sum():.3f}", f"largest - third: {spread(relevant):.3f}")
        place = {"ha": "right", "va": "top", "transform": axis.transAxes}
        axis.text(0.98, 0.95, "\n".join(facts), fontsize=8, **place)
        axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("probability")
    figure.supxlabel("entries, by score: three relevant (coloured), seven irrelevant (grey)")
    figure.tight_layout()
    return save(figure, folder, "normalizers", [".png"])
