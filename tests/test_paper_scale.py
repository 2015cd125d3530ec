"""`scale=paper`: the recipe value by value, and the real model for two updates."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from multimax.training.config import read_config, run_folder
from multimax.training.run import run

ROOT = Path(__file__).parents[1]


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def paper_values():
    """The recipe of DeiT-small as shared by the paper, field by field."""
    return {
        "data": {
            "name": "imagenet", "root": None, "num_classes": 1000, "image_size": 224,
            "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "random_erasing": 0.25,
            "repeated_augmentation": 3, "num_workers": 8,
        },
        "model": {
            "name": "vision_transformer", "architecture": "deit_small_patch16_224",
            "class_token": False, "qkv_bias": False,
            "norm": "norm_then_pool", "gradient_checkpointing": True, "drop_path": 0.1,
            "dropout": 0.0, "attention_dropout": 0.0, "patch_size": None, "embed_dim": None,
            "depth": None, "num_heads": None, "mlp_ratio": None,
        },
        "trainer": {
            "epochs": 300, "updates": None, "batch_size": 1024, "eval_batch_size": 384,
            "accumulation": 1, "precision": "fp16", "compile": False, "clip_norm": None,
            "ema_decay": 0.99996, "evaluate_every": 1, "log_every": 50, "report": "last",
            "dry_run": False,
        },
        "optimizer": {
            "name": "adamw", "lr": 5e-4 * 1024 / 512, "weight_decay": 0.05, "eps": 1e-8,
            "betas": [0.9, 0.999],
        },
        "schedule": {
            "name": "cosine", "warmup": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "per_epoch": True,
        },
        "loss": {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5},
        "attention": {
            "name": "multimax",
            "order": 2,
            "init": "paper",
            "affine": False,
            "before_scale": False,
            "shared": False,
        },
        "output": {"name": "multimax", "order": 2, "init": "paper", "affine": False},
        "seed": 0,
    }  # fmt: skip


def test_paper_scale_is_the_recipe():
    config = OmegaConf.to_container(composed("experiment=deit_multimax", "scale=paper"))
    assert {key: config[key] for key in paper_values()} == paper_values()
    topk = composed("experiment=deit_topk", "scale=paper")
    assert topk.attention.k == 100


@pytest.mark.slow
def test_paper_scale_on_files(tmp_path):
    """The real model at 224 px, on two classes of noise in ImageNet's folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for i in range(count):
            folder = tmp_path / "imagenet" / split / ("n01440764" if i % 2 else "n02102040")
            folder.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (240, 260, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{i}.JPEG")
    config = composed(
        "experiment=deit_multimax", "scale=paper", "debug=two_updates", "trainer.batch_size=4",
        "trainer.precision=no", f"data.root={tmp_path / 'imagenet'}", "data.num_classes=2",
        "data.num_workers=0", "name=deit_multimax", f"output_dir={tmp_path}",
    )  # fmt: skip
    said = io.StringIO()
    result = run(config, Console(file=said))
    folder = run_folder(read_config(config))
    assert folder.parent == tmp_path / "paper" / "deit_multimax"
    # 22,050,664 as published, without class token and its position, without qkv bias, with two
    # classes in the place of 1,000, and with 8 scalars in each of 12 layers and the output.
    published, width = 22_050_664, 384
    expected = published - 2 * width - 12 * 3 * width - 998 * (width + 1) + 13 * 8
    assert result["parameters"] == expected
    assert result["metrics"]["valid"]["examples"] == 3
    assert math.isfinite(result["metrics"]["valid"]["ema_loss"])
    assert len(result["learned_scalars"]) == 13 * 2
    assert "imagenet: 8 train, 3 valid images of 224 x 224" in said.getvalue()
    assert (folder / "last.pt").stat().st_size > 4 * 4 * expected  # model, EMA, two of AdamW
