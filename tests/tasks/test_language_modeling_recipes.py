"""The configurations of the language model: those of the paper, and what may differ."""

from types import SimpleNamespace

import pytest
import torch
from tiny_language_model import ROOT, build

from multimax.data.vocabulary import WordVocabulary
from multimax.tasks.language_modeling import LanguageModeling
from multimax.training.config import run_folder

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("lm_*.yaml"))


@pytest.mark.slow
def test_experiments_differ_in_nothing_but_the_normalizers(composed):
    configs = [composed(name, tiny=False) for name in EXPERIMENTS]
    assert {config.attention.name for config in configs} == {
        "softmax", "topk", "sparsemax", "entmax15", "evsoftmax", "multimax",
    }  # fmt: skip
    for config in configs:
        expected = "multimax" if config.name == "lm_multimax" else "softmax"
        assert config.output.name == expected
    rest = [config.recorded() for config in configs]
    for settings in rest:
        for section in ("attention", "output", "name"):
            del settings[section]
    assert all(settings == rest[0] for settings in rest)


# The table of fairseq's recipes: what is composed, and what it is there.
PAPER = {
    "data.name": "wikitext103", "data.block_size": 512, "data.context_window": 400,
    "model.depth": 6, "model.embed_dim": 512, "model.ffn_dim": 2048, "model.num_heads": 8,
    "model.pre_norm": True, "model.final_norm": True, "model.dropout": 0.1,
    "model.attention_dropout": 0.0, "model.activation_dropout": 0.0, "model.tie_embeddings": True,
    "model.adaptive_cutoffs": None, "model.official_mismatch": False,
    "optimizer": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.01, "eps": 1e-8,
                  "betas": [0.9, 0.98], "filter_bias_and_bn": False},
    "schedule": {"name": "inverse_sqrt", "warmup": 4000, "warmup_lr": 1e-7},
    "trainer.clip_norm": None, "trainer.updates": 50_000, "trainer.epochs": None,
    "trainer.precision": "fp16", "loss.label_smoothing": 0.0, "scale.name": "paper",
}  # fmt: skip
WIKI103 = {
    "data.name": "wikitext103", "data.block_size": 3072, "data.context_window": 2560,
    "model.depth": 16, "model.embed_dim": 1024, "model.ffn_dim": 4096, "model.num_heads": 8,
    "model.pre_norm": True, "model.final_norm": False, "model.dropout": 0.3,
    "model.attention_dropout": 0.1, "model.activation_dropout": 0.1,
    "model.adaptive_cutoffs": [20000, 60000], "model.adaptive_factor": 4,
    "model.adaptive_dropout": 0.2, "model.tie_embeddings": True,
    "optimizer": {"name": "nesterov", "lr": 1.0, "momentum": 0.99, "weight_decay": 0.0},
    "schedule": {"name": "cosine_restarts", "warmup": 16_000, "warmup_lr": 1e-7, "min_lr": 1e-4,
                 "period": 270_000, "period_growth": 2.0, "shrink": 0.75},
    "trainer.clip_norm": 0.1, "trainer.updates": 286_000, "scale.name": "paper_wiki103",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "recipe", "tokens"),
    [("paper", PAPER, 2048 * 16 * 2), ("paper_wiki103", WIKI103, 3072 * 3 * 8)],
)
def test_paper_scale_is_fairseqs_recipe(composed, scale, recipe, tokens):
    for experiment in ("lm_topk", "lm_multimax"):
        config = composed(experiment, f"scale={scale}", "data.root=/data/a", tiny=False)
        for field, value in recipe.items():
            found = config
            for part in field.split("."):
                found = getattr(found, part)
            assert (found.given() if isinstance(value, dict) else found) == value, field
        assert config.trainer.batch_size * config.data.block_size == tokens
        assert config.data.root == "/data/a"
        if experiment == "lm_topk":
            assert config.attention.k == 100


@pytest.mark.slow
def test_sizes_of_the_papers_models(composed):
    words = WordVocabulary(str(i) for i in range(267_740))
    for scale, millions in (("paper", 156.0), ("paper_wiki103", 247.0)):
        config = composed("lm_softmax", f"scale={scale}", tiny=False)
        with torch.device("meta"):
            model = LanguageModeling.build_model(config, SimpleNamespace(vocabulary=words))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
        assert words.size == 267_744


def test_data_root_is_needed_at_paper_scale(composed):
    with pytest.raises(ValueError, match=r"data\.root=null: .*prepare.wikitext103"):
        build(composed("lm_softmax", "scale=paper", tiny=False))


@pytest.mark.slow
def test_places_of_files_do_not_name_a_run(composed):
    folders = {
        run_folder(composed("lm_softmax", f"data.cache={place}", f"data.root={place}"))
        for place in ("/a", "/b")
    }
    assert len(folders) == 1
    assert run_folder(composed("lm_softmax", "data.block_size=32")) not in folders


def test_warm_up_in_updates_goes_with_a_length_in_epochs(composed):
    by_updates = ("schedule.name=inverse_sqrt", "schedule.warmup=4000")
    composed("lm_softmax", *by_updates, "trainer.epochs=50", "trainer.updates=null")
    with pytest.raises(
        ValueError, match=r"schedule\.warmup=4000 leaves nothing of trainer\.updates=3"
    ):
        composed("lm_softmax", *by_updates)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("+schedule.period=0", r"schedule\.period=0 must be a whole number >= 1"),
        ("+schedule.period_growth=0.5", r"schedule\.period_growth=0\.5 must be a number >= 1"),
        ("+schedule.shrink=0", r"schedule\.shrink=0 must be a number in"),
    ],
)
def test_options_of_restarts_out_of_range(composed, override, problem):
    with pytest.raises(ValueError, match=problem):
        composed("lm_softmax", override)
