"""Train a model of the paper: compose the configuration, build the task, fit, test, write a result.

python train.py experiment=deit_multimax
python train.py --help
python train.py repeat=results/runs/small/deit/RUN.json    # the same run again: the same numbers?
"""

# ruff: noqa: E402 (imports last for seconds, in which the launcher can go)
import os

LAUNCHER = os.getppid()

import logging
import sys

import hydra
import torch.distributed as dist
from hydra import initialize
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from multimax.training import slurm
from multimax.training.command_line import (
    complete_length,
    describe_settings,
    explain_bad_overrides,
    overrides_of,
)
from multimax.training.repeat import repeat
from multimax.training.run import run
from multimax.training.signals import end_with_launcher, hand_on
from multimax.training.sweep import SweepSummary, main_process, run_job
from multimax.training.trainer import InterruptedRunError

CONFIGS = "configs"


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
def main(config: DictConfig) -> None:
    """Run one configuration; Hydra calls this once, or once for each run of a sweep."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if "study" in config and not sweep:
        name = config.study.name
        raise SystemExit(f"error: study={name} is many runs: python train.py -m study={name}")
    try:
        run_job(config) if sweep else run(config)
    except InterruptedRunError as stop:
        again = "" if config.resume == "auto" else " with resume=auto"
        print(f"{stop}; the same command{again} goes on from there", file=sys.stderr)
        # A failure of another process could end the main one before it has queued the job again.
        others = hand_on(stop.signals) and not main_process()
        raise SystemExit(0 if others else 143) from stop
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


def check_command_line(arguments: list[str]) -> None:
    """Exit with the valid choices when a setting on the command line does not exist."""
    with initialize(version_base="1.3", config_path=CONFIGS):
        problem = explain_bad_overrides(overrides_of(arguments))
    if problem:
        raise SystemExit(f"error: {problem}\n`python train.py --help` lists the settings.")


def repeat_run(arguments: list[str]) -> None:
    """Repeat the run of a result.json, and exit with 1 if it gives other numbers."""
    try:
        same = repeat(arguments)
    except InterruptedRunError as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(143) from stop
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    raise SystemExit(not same)


if __name__ == "__main__":
    end_with_launcher(LAUNCHER)
    try:
        slurm.adopt(os.environ)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    logging.getLogger("multimax").addHandler(logging.StreamHandler())
    if any(argument.startswith("repeat=") for argument in sys.argv[1:]):
        repeat_run(sys.argv[1:])
    OmegaConf.register_new_resolver(
        "settings", lambda *, _root_: describe_settings(_root_), replace=True
    )
    check_command_line(sys.argv[1:])
    sys.argv[1:] = complete_length(sys.argv[1:])
    try:
        main()
    finally:
        SweepSummary.close()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # NCCL warns of a process that does not
