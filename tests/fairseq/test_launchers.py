"""The commands of scripts/fairseq, parsed by fairseq itself: every number is the recipe's."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from multimax.integrations.fairseq import USER_DIR

SCRIPTS = Path(__file__).parents[2] / "scripts" / "fairseq"
ADAM = {"optimizer.adam_betas": "(0.9, 0.98)", "optimization.clip_norm": 0}
ADAM |= {"optimization.lr": [5e-4], "lr_scheduler._name": "inverse_sqrt"}
ADAM |= {"lr_scheduler.warmup_updates": 4000}
LANGUAGE = {"task.sample_break_mode": "none", "common.fp16": True}
RECIPES = {
    "lm_transformer_lm": ADAM
    | LANGUAGE
    | {
        "model.decoder_layers": 6,
        "model.decoder_embed_dim": 512,
        "model.decoder_ffn_embed_dim": 2048,
        "model.decoder_attention_heads": 8,
        "model.decoder_normalize_before": True,
        "model.no_decoder_final_norm": False,
        "model.share_decoder_input_output_embed": True,
        "model.dropout": 0.1,
        "model.attention_dropout": 0.0,
        "model.activation_dropout": 0.0,
        "optimizer.weight_decay": 0.01,
        "lr_scheduler.warmup_init_lr": 1e-7,
        "task.tokens_per_sample": 512,
        "dataset.max_tokens": 2048,
        "optimization.update_freq": [16],
        "distributed_training.distributed_world_size": 2,
        "optimization.max_update": 50000,
        "criterion._name": "cross_entropy",
    },
    "lm_wiki103": LANGUAGE
    | {
        "model.decoder_layers": 16,
        "model.decoder_embed_dim": 1024,
        "model.decoder_ffn_embed_dim": 4096,
        "model.decoder_attention_heads": 8,
        "model.decoder_normalize_before": True,
        "model.no_decoder_final_norm": True,
        "model.dropout": 0.3,
        "model.attention_dropout": 0.1,
        "model.activation_dropout": 0.1,
        "model.adaptive_softmax_cutoff": "20000,60000",
        "model.adaptive_softmax_dropout": 0.2,
        "model.tie_adaptive_proj": True,
        "optimizer._name": "nag",
        "optimization.clip_norm": 0.1,
        "optimization.lr": [1.0],
        "lr_scheduler._name": "cosine",
        "lr_scheduler.lr_period_updates": 270000,
        "lr_scheduler.t_mult": 2,
        "lr_scheduler.lr_shrink": 0.75,
        "lr_scheduler.min_lr": 1e-4,
        "lr_scheduler.warmup_updates": 16000,
        "lr_scheduler.warmup_init_lr": 1e-7,
        "task.tokens_per_sample": 3072,
        "dataset.max_tokens": 3072,
        "optimization.update_freq": [3],
        "distributed_training.distributed_world_size": 8,
        "optimization.max_update": 286000,
        "criterion._name": "adaptive_loss",
    },
    "mt_iwslt14": ADAM
    | {
        "model.encoder_layers": 6,
        "model.decoder_layers": 6,
        "model.decoder_embed_dim": 512,
        "model.decoder_ffn_embed_dim": 1024,
        "model.decoder_attention_heads": 4,
        "model.decoder_normalize_before": False,
        "model.share_decoder_input_output_embed": True,
        "model.dropout": 0.3,
        "optimizer.weight_decay": 1e-4,
        "criterion.label_smoothing": 0.1,
        "dataset.max_tokens": 4096,
        "optimization.max_epoch": 50,
        "checkpoint.best_checkpoint_metric": "bleu",
        "checkpoint.maximize_best_checkpoint_metric": True,
    },
}


@pytest.fixture(autouse=True)
def _python(tmp_path, monkeypatch):
    """A `python` that prints the folder of the plug-in without importing PyTorch first."""
    (tmp_path / "python").write_text(f"#!/bin/sh\necho {USER_DIR}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def commands(script, *arguments):
    environment = os.environ | {"DRY_RUN": "1"}
    line = [SCRIPTS / f"{script}.sh", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    return [shlex.split(command) for command in done.stdout.splitlines()]


def parsed(command, parser):
    arguments = options.parse_args_and_arch(parser, command[1:])
    return convert_namespace_to_omegaconf(arguments)


def value(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("script", RECIPES)
def test_recipe(script):
    preprocess, train, evaluate = commands(script, "/data")
    assert preprocess[0] == "fairseq-preprocess"
    assert train[train.index("--user-dir") + 1] == str(USER_DIR)
    config = parsed(train, options.get_training_parser())
    assert config.model.attention_normalizer == config.model.output_normalizer == "multimax"
    for path, expected in RECIPES[script].items():
        assert value(config, path) == expected, path

    if script == "mt_iwslt14":
        config = parsed(evaluate, options.get_generation_parser())
        assert config.generation.beam == 5
    else:
        config = parsed(evaluate, options.get_eval_lm_parser())
        window, size = (400, 512) if script == "lm_transformer_lm" else (2560, 3072)
        assert (config.eval_lm.context_window, config.task.tokens_per_sample) == (window, size)
    assert config.dataset.num_workers == 0
    assert config.dataset.gen_subset == "test"
    assert config.common_eval.path.startswith(train[train.index("--save-dir") + 1])


@pytest.mark.parametrize("script", RECIPES)
def test_normalizers_and_further_arguments(script):
    _, train, _ = commands(script, "/data", "topk:k=5", "softmax", "--seed", "7")
    config = parsed(train, options.get_training_parser())
    assert config.model.attention_normalizer == "topk:k=5"
    assert config.model.output_normalizer == "softmax"
    assert config.common.seed == 7
    _, baseline, _ = commands(script, "/data", "softmax")
    config = parsed(baseline, options.get_training_parser())
    assert config.model.attention_normalizer == config.model.output_normalizer == "softmax"
    assert config.checkpoint.save_dir.endswith("softmax-softmax")


@pytest.mark.parametrize("script", RECIPES)
def test_usage(script):
    done = subprocess.run([SCRIPTS / f"{script}.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{script}.sh" in done.stderr
    assert "# the baseline" in done.stderr
