"""Synthetic tasks as their experiments compose them, with few examples."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from multimax.tasks import build_task
from multimax.training.config import read_config

ROOT = Path(__file__).parents[2]
FEW = ("data.valid_size=300", "data.test_size=200")


def build(experiment, *overrides, rank=0, world_size=1):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = read_config(compose("config", [f"experiment={experiment}", *overrides]))
    torch.manual_seed(0)
    return build_task(config, rank, world_size, torch.device("cpu"))


def evaluate(task, model=None, split="test"):
    with torch.inference_mode():
        return task.evaluate((model or task.model).eval(), split, lambda totals: totals)
