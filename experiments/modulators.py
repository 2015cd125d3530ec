"""Draw what a MultiMax run learned: the modulator of each layer, and the course of training.

python -m experiments.modulators                       # the newest small-scale deit_multimax run
python -m experiments.modulators outputs/small/lm_multimax/RUN
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from multimax import modulate

MAIN_METRICS = ("top1", "bleu", "perplexity", "smoothed_perplexity")


def main() -> None:
    """Draw the run that the command line names into its own folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", nargs="?", type=Path, help="a run folder with a result.json")
    folder = parser.parse_args().run
    try:
        print(draw(folder or newest_run(Path("outputs/small/deit_multimax"))))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def newest_run(parent: Path) -> Path:
    """The run folder below `parent` that finished last.

    Raises:
        FileNotFoundError: none has finished.
    """
    results = sorted(parent.glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    if not results:
        raise FileNotFoundError(
            f"no finished run below {parent}: python train.py experiment=deit_multimax"
        )
    return results[-1].parent


def draw(folder: Path) -> Path:
    """Draw `learned.png` into a run folder and return its path.

    Raises:
        FileNotFoundError: the folder has no result.json.
        ValueError: the run has no MultiMax layer.
    """
    file = folder / "result.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the run has not finished")
    result = json.loads(file.read_text())
    layers = modulators(result["learned_scalars"])
    if not layers:
        raise ValueError(f"{folder} has no MultiMax layer: use a run with attention=multimax")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw_modulators(left, layers)
    if result["config"]["attention"].get("before_scale"):
        left.set_xlabel("score x; in attention, before it is scaled")
    _draw_training(right, lines)
    figure.suptitle(_title(result))
    path = folder / "learned.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def modulators(scalars: dict[str, list[float]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`ts` and `ranges` of each MultiMax layer, from the learned scalars of a result."""
    return {
        name.removesuffix(".ts").removesuffix(".normalizer"): (
            torch.tensor(values),
            torch.tensor(scalars[name.removesuffix("ts") + "ranges"]),
        )
        for name, values in scalars.items()
        if name.endswith(".ts")
    }


def is_output(name: str) -> bool:
    """Whether a layer of `modulators` is the output layer."""
    return bool({"output", "output_projection"} & set(name.split(".")))


def colors_of(names: Collection[str]) -> dict[str, Any]:
    """A color for each layer: by depth in the attention, red for the output layer."""
    attention = [name for name in names if not is_output(name)]
    shades = plt.get_cmap("viridis")(torch.linspace(0, 0.85, len(attention)).numpy())
    return {name: "tab:red" for name in names} | dict(zip(attention, shades, strict=True))


def _draw_modulators(axes: Axes, layers: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    scores = torch.linspace(-4, 4, 401)
    axes.plot(scores, scores, color="0.6", linestyle="--", label="SoftMax (identity)")
    colors = colors_of(layers)
    for name, (ts, ranges) in layers.items():
        axes.plot(scores, modulate(scores, ts, ranges), color=colors[name], label=name)
    axes.set(xlabel="score x", ylabel="modulated score", title="learned modulators")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_training(axes: Axes, lines: list[dict[str, Any]]) -> None:
    train, valid = (
        [(line["update"], line[name]) for line in lines if line.get(name) is not None]
        for name in ("train/loss", "valid/loss")
    )
    if train:
        axes.plot(*zip(*train, strict=True), color="0.7", label="training loss")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="tab:blue", label="validation loss")
    axes.set(xlabel="update", ylabel="loss", title="training")
    if train or valid:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _title(result: dict[str, Any]) -> str:
    split = "test" if "test" in result["metrics"] else "valid"
    metrics = result["metrics"][split]
    name = next((name for name in MAIN_METRICS if name in metrics), "loss")
    return (
        f"{result['experiment']}, {result['scale']} scale, seed {result['seed']}: "
        f"{split} {name} {metrics[name]:.4g} (n = {metrics['examples']:,})"
    )


if __name__ == "__main__":
    main()
