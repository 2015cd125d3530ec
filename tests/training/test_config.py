import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT, run_quietly

from multimax.training.config import (
    CHECKS,
    check_config,
    config_hash,
    explain_bad_overrides,
    run_folder,
)

BAD = {
    "seed": [-1, 1.5, None, "one", True],
    "resume": [None, 3],
    "trainer.batch_size": [0, 2.5, None, "all"],
    "trainer.eval_batch_size": [0, None],
    "trainer.accumulation": [0, None],
    "trainer.epochs": [0, 2.5],
    "trainer.updates": [0, 2.5],
    "trainer.evaluate_every": [0, None],
    "trainer.log_every": [0, None],
    "trainer.precision": [False, "fp8", None],
    "trainer.clip_norm": [0, -1.0, "none"],
    "trainer.ema_decay": [0, 1, "none"],
    "trainer.report": ["first", None],
    "trainer.compile": ["yes", None, 1],
    "optimizer.lr": [0, -1e-3, None, "high", float("nan"), float("inf"), True],
    "optimizer.weight_decay": [-0.1, None],
    "schedule.warmup": [-1, 0.5, None],
    "schedule.min_lr": [-1e-5, "none"],
    "schedule.period": [0, 1.5],
    "schedule.period_growth": [0.5, "none"],
    "schedule.shrink": [0, "none"],
    "loss.label_smoothing": [-0.1, 1, None],
    "logger.wandb": ["on", True, None],
}
# What may differ between two runs that give the same numbers (the seed has its own place).
SAME_NUMBERS = {
    "name", "seed", "tags", "output_dir", "resume", "logger.wandb", "trainer.log_every",
    "data.root", "data.num_workers", "data.cache",
}  # fmt: skip


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_check_has_a_bad_value():
    assert set(BAD) == {field for field, _, _ in CHECKS}


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_bad_value_is_refused_before_data_is_loaded(compose_tiny, monkeypatch, field, value):
    monkeypatch.setattr("multimax.training.run.build_task", lambda *_: pytest.fail("data loaded"))
    config = compose_tiny()
    OmegaConf.update(config, field, value, force_add=True)
    remedy = next(remedy for name, _, remedy in CHECKS if name == field)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        run_quietly(config)
    assert str(caught.value) == f"{field}={value!r} must be {remedy}"


@pytest.mark.parametrize(("epochs", "updates"), [("null", "null"), (2, 2)])
def test_epochs_and_updates_exclude_each_other(compose_tiny, epochs, updates):
    config = compose_tiny(f"trainer.epochs={epochs}", f"trainer.updates={updates}")
    with pytest.raises(ValueError, match=r"trainer\.updates=\w+: give one of them .* null"):
        check_config(config, 1)


@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulation", "nearest"),
    [(11, 2, 2, 12), (9, 2, 2, 8), (3, 4, 1, 4), (1, 1, 8, 8), (50, 3, 1, 51)],
)
def test_indivisible_batch_suggests_the_nearest(
    compose_tiny, batch_size, processes, accumulation, nearest
):
    sizes = f"trainer.batch_size={batch_size}", f"trainer.accumulation={accumulation}"
    with pytest.raises(ValueError, match=f"use trainer.batch_size={nearest}$"):
        check_config(compose_tiny(*sizes), processes)
    check_config(compose_tiny(f"trainer.batch_size={nearest}", sizes[1]), processes)


def test_warmup_must_leave_something(compose_tiny):
    with pytest.raises(ValueError, match=r"schedule\.warmup=4 leaves nothing of the 4 updates"):
        check_config(compose_tiny("schedule.warmup=4"), 1)
    check_config(compose_tiny("schedule.warmup=3"), 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.mixup=-1", r"loss\.mixup=-1 must be >= 0"),
        ("loss.cutmix=-1", r"loss\.cutmix=-1 must be >= 0"),
        ("loss.mixup_switch_prob=2", r"loss\.mixup_switch_prob=2 must be in \[0, 1\]"),
        ("optimizer.name=adan_w", r"optimizer\.name='adan_w'.*list_optimizers"),
        ("trainer.batch_size=8000", "8000 is more|use a batch_size of at most 7000"),
    ],
)
def test_bad_option_of_task_or_optimizer(compose_tiny, override, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(compose_tiny(override))


def test_more_accumulation_than_batches(compose_tiny):
    config = compose_tiny("trainer.batch_size=14000", "trainer.accumulation=2")
    with pytest.raises(ValueError, match=r"trainer\.accumulation=2.*there are 1; use a smaller"):
        run_quietly(config)


def test_odd_batch_for_mixup(compose_tiny):
    with pytest.raises(ValueError, match="which has 5 per process"):
        run_quietly(compose_tiny("loss.mixup=0.5", "trainer.batch_size=5"))


def test_fp16_needs_cuda(compose_tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.precision=fp16 needs a CUDA device: use bf16"):
        run_quietly(compose_tiny("trainer.precision=fp16"))


@pytest.mark.parametrize("data", ["fashion_mnist_subset", "imagenet", "wikipedia"])
def test_hash_covers_every_setting_that_changes_numbers(compose_tiny, data):
    config = compose_tiny("trainer.ema_decay=0.9")
    config.data = OmegaConf.load(ROOT / "configs" / "data" / f"{data}.yaml")
    before = config_hash(config)
    assert config_hash(config.copy()) == before
    for field, value in leaves(OmegaConf.to_container(config, resolve=True)):
        changed = config.copy()
        OmegaConf.update(changed, field, "another" if value is None else [value, "another"])
        assert (config_hash(changed) == before) == (field in SAME_NUMBERS), field


def test_folder_tells_scale_experiment_normalizers_and_seed(compose_tiny, tmp_path):
    config = compose_tiny("seed=3", "attention=topk")
    folder = run_folder(config)
    assert folder.parent == tmp_path / "small" / "deit_multimax"
    assert folder.name == f"topk-multimax-{config_hash(config)}-seed3"
    assert run_folder(compose_tiny("seed=3", "attention=topk", "trainer.log_every=7")) == folder
    others = [compose_tiny("seed=4", "attention=topk"), compose_tiny("seed=3", "attention=entmax")]
    assert len({folder, *map(run_folder, others)}) == 3


@pytest.fixture
def explain():
    def explain(*overrides):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return explain_bad_overrides(overrides)

    return explain


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.epoch=3"], ["'trainer.epoch'", "did you mean: trainer.epochs", "batch_size"]),
        (["sed=1"], ["'sed'", "did you mean: seed", "output_dir"]),
        (["attention=multimax", "attention.k=3"], ["'attention.k'", "attention.order"]),
        (["attention.temprature=0.5,1"], ["did you mean: attention.temperature"]),
        (["sed=0,1,2"], ["did you mean: seed"]),
        (["attention=multimx"], ["attention/multimx", "Available options", "multimax", "topk"]),
        (["output=softmax,multimx"], ["output/multimx", "Available options", "multimax"]),
        (["experiment=deit"], ["experiment/deit", "deit_multimax", "deit_softmax"]),
        (["scale=papr"], ["papr", "paper", "small"]),
        (["atention=multimax"], ["atention", "attention"]),
        (["nonsense"], ["nonsense", "EQUAL"]),
    ],
)
def test_typo_names_the_valid_choices(explain, overrides, said):
    problem = explain(*overrides)
    assert problem is not None
    for part in said:
        assert part in problem


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=deit_softmax", "attention=multimax", "output=softmax"],
        ["experiment=deit_softmax", "attention.temperature=0.1,0.5,1,2,10", "seed=range(0,3)"],
        ["attention=glob(*)", "seed=0,1", "tags=[a,b]", "debug=two_updates"],
        ["~debug", "+new=1", "hydra.verbose=true", "scale=paper", "data.root=/data"],
    ],
)
def test_good_command_line_is_not_refused(explain, overrides):
    assert explain(*overrides) is None
