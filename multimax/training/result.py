"""The one result of a run: `result.json`, and the same as tables for a reader."""

import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from multimax.parameters import flat_scalars, named_scalars

SCHEMA = 2
PACKAGES = ("multimax", "torch", "torchvision", "timm", "accelerate", "hydra-core", "numpy")
COLUMNS = {
    "entropy": "entropy",
    "mass": "mass",
    "support_size": "support",
    "sparsity": "S",
    "uniform_sparsity": "S, s=0.1/n",
    "multi_modality": "M",
    "decreasing_share": "falling",
}


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, so that a result can be repeated and compared."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else _processor(),
            "cuda_devices": torch.cuda.device_count(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "peak_memory_mib": peak_memory_mib(),
    }


def peak_memory_mib() -> dict[str, float]:
    """Peak memory of this process so far, in MiB, on the host and on its CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"host": round(host, 1), "cuda": round(device, 1)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*command: str) -> str | None:
    try:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def attention_means(normalizers: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """The measures of all attention layers in one, such as "attention/multi_modality".

    Args:
        normalizers: measures by module name, as a result has them.

    Returns:
        Means over the layers; a measure that a layer does not have has none.
    """
    layers = [row for name, row in normalizers.items() if "attn" in name]
    means: dict[str, float] = {}
    for key in COLUMNS:
        values = [value for row in layers if (value := row.get(key)) is not None]
        if values and len(values) == len(layers):
            means[f"attention/{key}"] = sum(values) / len(values)
    return means


def flat_summary(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, learned scalars and measures of the normalizers under one level of names.

    Such as "test/top1", "learned/blocks.0.attn/t_b_1" (of order 1),
    "normalizers/blocks.0.attn/sparsity" and "attention/sparsity".
    """
    flat = {
        f"{split}/{name}": value
        for split, row in result["metrics"].items()
        for name, value in row.items()
    } | attention_means(result["normalizers"])
    flat |= flat_scalars(result["learned_scalars"])
    for name, row in result["normalizers"].items():
        measures = {key: row.get(key) for key in COLUMNS}
        layer = name.removesuffix(".normalizer")
        flat |= {f"normalizers/{layer}/{k}": v for k, v in measures.items() if v is not None}
    return flat


def now() -> str:
    """The current time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def print_result(console: Console, result: dict[str, Any], folder: Path) -> None:
    """Print the metrics of each split, those of each normalizer, and where everything is."""
    print_metrics(console, f"{result['experiment']} ({result['scale']} scale)", result["metrics"])
    _print_normalizers(console, result["normalizers"])
    _print_learned(console, named_scalars(result["learned_scalars"]))
    console.print(
        f"{result['updates']} updates in {result['training_seconds']:.0f} s of training, "
        f"peak memory {result['peak_memory_mib']['host']:.0f} MiB",
        highlight=False,
    )
    for name in ("result.json", "metrics.jsonl", "best.pt", "last.pt"):
        if (folder / name).exists():
            console.print(f"  {folder / name}", highlight=False, soft_wrap=True, markup=False)
    if not_uploaded := offline_run(folder):
        console.print(
            "Weights & Biases has it offline only; to upload it, log in and type\n"
            f"  wandb sync {shlex.quote(str(not_uploaded))}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Print what a run or an evaluation is of, a name and its value in each line."""
    for name, value in rows.items():
        console.print(f"{name:<10}{value}", highlight=False, soft_wrap=True, markup=False)


def print_metrics(console: Console, title: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print the metrics of each split as a table; a split need not have all of them."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for split, figures in metrics.items():
        table.add_column(f"{split} (n = {figures['examples']:,})", justify="right")
    names = dict.fromkeys(name for figures in metrics.values() for name in figures)
    for name in (name for name in names if name != "examples"):
        cells = (figures.get(name) for figures in metrics.values())
        table.add_row(name, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    console.print(table)


def offline_run(folder: Path) -> Path | None:
    """The last folder that Weights & Biases wrote offline below a run folder, if not uploaded.

    It has what earlier ones have too.
    """
    *_, last = (None, *sorted((folder / "wandb").glob("offline-run-*")))
    return None if last is None or list(last.glob("*.synced")) else last


def _print_normalizers(console: Console, normalizers: dict[str, dict[str, float]]) -> None:
    present = [key for key in COLUMNS if any(key in row for row in normalizers.values())]
    table = Table(
        title="attention layers and output layer",
        caption="means over evaluation rows: entropy in nats, support = entries > 0, sparsity S "
        "and multi-modality M as in the paper, S also with one reference s for rows of n entries, "
        "falling = share of scores that MultiMax reverses",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for key in present:
        table.add_column(COLUMNS[key], justify="right")
    for name, row in normalizers.items():
        cells = [row.get(key) for key in present]
        table.add_row(
            name.removesuffix(".normalizer"),
            *("" if cell is None else f"{cell:.3f}" for cell in cells),
        )
    console.print(table)


def _print_learned(console: Console, layers: dict[str, dict[str, list[float]]]) -> None:
    if not layers:
        return
    names = list(dict.fromkeys(name for scalars in layers.values() for name in scalars))
    table = Table(
        title="learned scalars",
        caption="several values are of order 1, 2, ... (MultiMax) or of head 1, 2, ... (entmax)",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for layer, scalars in layers.items():
        values = (scalars.get(name, []) for name in names)
        table.add_row(layer, *(", ".join(f"{v:.3f}" for v in found) for found in values))
    console.print(table)
