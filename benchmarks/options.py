"""What precision, torch.compile and a fused optimizer buy: updates of a recipe, on any device.

python -m benchmarks.options deit                      # paper scale, so on a GPU
python -m benchmarks.options lm --settings scale=small
python -m benchmarks.options mt --options precision=bf16 precision=bf16,fused

The updates are those of the trainer, with made data of full size; no data has to be there. What it
measures does not wait for data: how fast that must come is the column of the rate.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from benchmarks.gpu import context
from benchmarks.report import Row, print_table, write_csv
from benchmarks.trainer import config_of
from multimax.training.dry_run import made_trainer
from multimax.training.evaluation import build_accelerator
from multimax.training.trainer import Trainer

EXPERIMENTS = {"deit": "deit_multimax", "lm": "lm_multimax", "mt": "mt_multimax"}
OPTIONS = (
    "",
    "precision=bf16",
    "precision=bf16,fused",
    "precision=bf16,fused,channels_last",
    "precision=bf16,fused,softmax",
    "precision=bf16,fused,compile",
)
SETTINGS = {
    "fused": ("+optimizer.fused=true",),
    "compile": ("trainer.compile=true",),
    "softmax": ("attention=softmax", "output=softmax"),
    "channels_last": ("+trainer.channels_last=true",),
}
COLUMNS = {
    "options": "options",
    "rate": "units/s",
    "update_ms": "update, ms",
    "update_p20_ms": "p20",
    "update_p80_ms": "p80",
    "ratio": "to the first",
    "first_s": "first update, s",
    "cuda_mib": "peak of the GPU, MiB",
}


def settings_of(options: str) -> list[str]:
    """The settings of `train.py` that short options such as "precision=bf16,fused" stand for."""
    settings = ["trainer.precision='no'"]
    for option in filter(None, options.split(",")):
        settings += SETTINGS.get(option, (f"trainer.{option}",))
    return settings


def build(settings: Sequence[str], options: str) -> Trainer:
    """A trainer with made data."""
    config = config_of(*settings, *settings_of(options), "logger.wandb=disabled")
    return made_trainer(config, build_accelerator(config))


def measure(settings: Sequence[str], options: str, updates: int) -> Row:
    """Seconds of so many updates after three, and of the first; a failure has no numbers."""
    row: Row = {"options": options or "fp32", "failed": ""}
    try:
        seconds, units = _update(build(settings, options), updates)
    except Exception as error:  # too little memory, or what a compiler does not take
        row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"{row['options']}: {row['failed']}", flush=True)
        return row
    low, middle, high = np.quantile(seconds[3:], [0.2, 0.5, 0.8])
    row |= {"rate": units / middle, "update_ms": 1000 * middle, "update_p20_ms": 1000 * low}
    row |= {"update_p80_ms": 1000 * high, "first_s": seconds[0], "updates": updates}
    if torch.cuda.is_available():
        row["cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(f"{row['options']}: {row['update_ms']:.4g} ms, {row['rate']:,.0f} units/s", flush=True)
    return row


def _update(trainer: Trainer, updates: int) -> tuple[list[float], float]:
    """Seconds of each of 3 + `updates` updates, and the units of one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    batches = list(trainer.task.train_loader.batches(0))[: trainer.accumulation]
    seconds, metrics = [], {}
    for _ in range(3 + updates):
        started = time.perf_counter()
        metrics = trainer._update(batches)  # ends with the loss on the host
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        trainer.position.update += 1
    return seconds, metrics["train/units"]


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `options_<experiment>.csv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--options", nargs="+", default=OPTIONS, help="each a list with commas")
    parser.add_argument("--settings", nargs="*", default=[], help="more, as of train.py")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(command)
    settings = [f"experiment={EXPERIMENTS[arguments.experiment]}", "scale=paper"]
    rows: list[Row] = []
    path = arguments.results / "benchmarks" / f"options_{arguments.experiment}.csv"
    for options in arguments.options:
        rows.append(measure([*settings, *arguments.settings], options, arguments.updates))
        _forget()
        if "rate" in rows[0] and "rate" in rows[-1]:
            rows[-1]["ratio"] = rows[-1]["update_ms"] / rows[0]["update_ms"]
        shared = context("cuda" if torch.cuda.is_available() else "cpu")
        del shared["dtype"]  # each row has its own
        write_csv(path, rows, shared | {"settings": " ".join(arguments.settings)})
    print_table(f"Updates of {settings[0]}", rows, COLUMNS)
    print(path)


def _forget() -> None:
    """Nothing of one measurement is left for the next one."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
