import functools
import json
import math
import warnings

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT, run_quietly

from multimax.models import registry
from multimax.options import as_typed, describe_field, leaves, section_of
from multimax.tasks import TASKS
from multimax.training.command_line import describe_settings, explain_bad_overrides, overrides_of
from multimax.training.config import (
    Config,
    check_processes,
    config_class,
    config_hash,
    read_config,
    run_folder,
)

# Values of each setting that are refused, by the kind of value that it takes.
WRONG = {
    "a whole number": [2.5, True, "many", math.nan],
    "a number": [True, "high", math.nan, math.inf],
    "true or false": ["no", 1, 0.0],
    "text": [3, False],
    "a list": [3, {"a": 1}],
    "a section": [3, False],
}
BAD = {
    "seed": [-1, None, "one"],
    "name": [None, "../../x", "", ".hidden", 3],
    "tags": ["abc", None],
    "output_dir": [None],
    "resume": [None, 3],
    "trainer.batch_size": [0, None],
    "trainer.epochs": [0],
    "trainer.updates": [0],
    "trainer.precision": [False, "fp8", None],
    "trainer.clip_norm": [0, -1.0],
    "trainer.ema_decay": [0, 1],
    "trainer.report": ["first", None],
    "trainer.compile": [None],
    "optimizer.lr": [0, -1e-3, None],
    "optimizer.weight_decay": [-0.1, None],
    "optimizer.eps": [0, "abc"],
    "optimizer.betas": [0.9, [0.9], [0.9, 0.99, 0.999], [0.9, 1.0]],
    "optimizer.name": [None, 3],
    "schedule.name": ["linear", None],
    "schedule.warmup": [-1, None],
    "schedule.warmup_lr": [-1],
    "schedule.min_lr": [-1e-5],
    "schedule.per_epoch": ["maybe"],
    "schedule.period": [0],
    "schedule.period_growth": [0.5],
    "schedule.shrink": [0],
    "loss.label_smoothing": [-0.1, 1, None],
    "loss.mixup": [-1, None],
    "loss.mixup_switch_prob": [2],
    "logger.wandb": ["on", True, None],
    "model.class_token": ["no", None],
    "model.dropout": [None, 1],
    "model.mlp_ratio": [0, "abc"],
    "model.architecture": [None],
    "data.valid_size": [-1, 0.5],
    "data.random_erasing": [1.5, "abc"],
}


@functools.cache
def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def changed(config, field, value):
    """The composed configuration with another value."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    if isinstance(value, dict) and OmegaConf.select(config, field) is not None:
        OmegaConf.update(config, field, None)
    OmegaConf.update(config, field, value, force_add=True)
    return config


# What may differ between two runs that give the same numbers (the seed has its own place).
SAME_NUMBERS = {
    "group", "trainer.keep", "trainer.dry_run", "trainer.shard",
    "name", "seed", "tags", "output_dir", "resume", "logger.wandb", "trainer.log_every",
    "data.root", "data.num_workers", "data.cache",
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_bad_value_is_refused_before_data_is_loaded(monkeypatch, field, value):
    monkeypatch.setattr("multimax.training.run.build_task", lambda *_: pytest.fail("data loaded"))
    config = composed("experiment=deit_multimax")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        run_quietly(changed(config, field, value))
    declared = {name: f for name, _, f in leaves(read_config(config))}[field]
    expected = describe_field(declared)
    said = str(caught.value)
    assert said.replace("a finite number", "a number").startswith(
        f"{field}={as_typed(value)} must be {expected} ("
    )
    assert len(declared.description) > 10
    assert declared.description.rstrip(".") in said


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["deit_multimax", "lm_softmax", "mt_softmax"])
def test_no_setting_takes_a_value_of_another_kind(experiment):
    config, refused = composed(f"experiment={experiment}"), set()
    for field, _, declared in leaves(read_config(config)):
        kinds = [kind for kind in WRONG if kind in describe_field(declared)]
        for value in WRONG[kinds[0]] if len(kinds) == 1 else []:
            with pytest.raises(ValueError, match=rf"(^| ){field}(=| )"):
                read_config(changed(config, field, value))
            refused.add(field)
    assert len(refused) > 20


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("trainer.clip_nrom", 1, "there is no setting trainer.clip_nrom; did you mean trainer.cli"),
        ("decoding", {"beam": 2}, "there is no setting decoding; there are: name, seed"),
        ("attention.k", 3, "there is no setting attention.k; there are: name, shared"),
        (
            "attention",
            None,
            "attention=null must be a section with a name: choose one of the files",
        ),
        ("data", "mnist", "data='mnist' must be a section with a name"),
        (
            "data.name",
            "mnist",
            "data.name='mnist': unknown image data set 'mnist'; known: fashion_mnist_subset",
        ),
        (
            "data.name",
            "wikipedia",
            "data.name=wikipedia goes with task=language_modeling, not with",
        ),
        ("model.name", "transformer", "model.name=transformer goes with task=translation, not"),
        (
            "model.name",
            "resnet",
            "model.name='resnet': unknown model of image_classification 'resnet'",
        ),
        (
            "task.name",
            "vision",
            "task.name='vision': unknown task 'vision'; known: image_classification",
        ),
        ("attention.order", 0, "attention.order must be an integer in"),
        ("trainer", None, "trainer=null must be a section with epochs, updates"),
        ("scale.topk", "???", "scale.topk: "),
    ],
)
def test_what_does_not_exist_or_go_together(field, value, said):
    with pytest.raises(ValueError, match=r"^") as caught:
        read_config(changed(composed("experiment=deit_multimax"), field, value))
    assert str(caught.value).startswith(said)


def test_shards_have_one_layout(compose_tiny):
    settings = "+trainer.shard=true", "+trainer.channels_last=true"
    with pytest.raises(ValueError, match=r"shard=true takes .* leave trainer\.channels_last=false"):
        read_config(compose_tiny(*settings))


def test_groups_of_another_task():
    config = composed("experiment=lm_softmax", "recipe=translation/small")
    with pytest.raises(ValueError, match="goes with task=translation, not with task=language"):
        read_config(config)


def test_every_option_has_a_type_and_a_sentence():
    """Of all tasks with all of their data sets and models, and of all normalizers."""
    for task in TASKS.values():
        for table, given in ((task.data_sets, ()), (task.models, task.model_arguments)):
            for name, function in table.items():
                for option, field in section_of(function, given).model_fields.items():
                    assert field.description, (name, option)
                    assert describe_field(field) != "a value", (name, option)
    for experiment in ("deit_multimax", "lm_softmax", "mt_softmax"):
        for option, _, field in leaves(read_config(composed(f"experiment={experiment}"))):
            assert field.description, option
    assert len(registry.IMAGE_CLASSIFIERS | registry.LANGUAGE_MODELS) >= 2


def test_numbers_have_their_declared_type(compose_tiny):
    whole, decimal = (
        compose_tiny("attention=softmax", f"attention.temperature={t}") for t in ("1", "1.0")
    )
    assert isinstance(read_config(whole).attention.temperature, float)
    assert run_folder(read_config(whole)) == run_folder(read_config(decimal))


def test_a_configuration_is_read_once(compose_tiny):
    config = read_config(compose_tiny())
    assert read_config(config) is config
    assert read_config(config.recorded()) == config
    assert isinstance(config, Config)
    task = TASKS["image_classification"]
    names = ("multimax", "multimax", "fashion_mnist_subset", "vision_transformer")
    assert type(config) is config_class(task, *names)


def test_settings_are_described(compose_tiny):
    said = describe_settings(compose_tiny())
    for line in (
        "trainer.batch_size=20",
        "model.class_token=false",
        "attention.init=paper",
        "trainer.clip_norm=1.0",
        "    true or false; torch.compile the model",
    ):
        assert line in said.splitlines()
    wrong = describe_settings(changed(compose_tiny(), "seed", -1))
    assert wrong.endswith(
        "error: seed=-1 must be a whole number >= 0 (of weights, order and augmentation)"
    )


def test_overrides_among_the_arguments():
    arguments = ["-m", "--cfg", "job", "seed=1", "~debug", "+a.b=2", "hydra/launcher=joblib"]
    assert overrides_of(arguments) == ["seed=1", "~debug", "+a.b=2", "hydra/launcher=joblib"]


@pytest.mark.parametrize(("epochs", "updates"), [("null", "null"), (2, 2)])
def test_epochs_and_updates_exclude_each_other(compose_tiny, epochs, updates):
    config = compose_tiny(f"trainer.epochs={epochs}", f"trainer.updates={updates}")
    with pytest.raises(ValueError, match=r"trainer\.updates=\w+: give one of them .* null"):
        read_config(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "processes", "accumulation", "nearest"),
    [(11, 2, 2, 12), (9, 2, 2, 8), (3, 4, 1, 4), (1, 1, 8, 8), (50, 3, 1, 51)],
)
def test_indivisible_batch_suggests_the_nearest(
    compose_tiny, batch_size, processes, accumulation, nearest
):
    sizes = f"trainer.batch_size={batch_size}", f"trainer.accumulation={accumulation}"
    with pytest.raises(ValueError, match=f"use trainer.batch_size={nearest}$"):
        check_processes(read_config(compose_tiny(*sizes)), processes)
    good = compose_tiny(f"trainer.batch_size={nearest}", sizes[1])
    check_processes(read_config(good), processes)


def test_warmup_must_leave_something(compose_tiny):
    with pytest.raises(
        ValueError, match=r"schedule\.warmup=4 leaves nothing of trainer\.updates=4"
    ):
        read_config(compose_tiny("schedule.warmup=4"))
    read_config(compose_tiny("schedule.warmup=3"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
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


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["deit_multimax", "lm_softmax", "mt_softmax"])
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_hash_covers_every_setting_that_changes_numbers(experiment, scale):
    place = ["data.root=/a"] if scale == "paper" else []
    config = read_config(composed(f"experiment={experiment}", f"scale={scale}", *place))
    before = config_hash(config)
    fields = {field for field, *_ in leaves(config)}
    assert len(fields - SAME_NUMBERS) > 30
    assert len(fields & SAME_NUMBERS) > 6
    for field, value, _ in leaves(config):
        *sections, name = field.split(".")
        other = "another" if value is None else [value, "another"]
        part = config if not sections else getattr(config, sections[0])
        part = part.model_copy(update={name: other})
        changed = part if not sections else config.model_copy(update={sections[0]: part})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the wrong type, which is meant
            assert (config_hash(changed) == before) == (field in SAME_NUMBERS), field


@pytest.mark.slow
def test_newer_settings_leave_older_folders_alone(compose_tiny):
    files = list((ROOT / "results" / "runs").rglob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        assert config_hash(read_config(result["config"])) == result["config_hash"]
        assert result["config_hash"] in file.name
    before = config_hash(read_config(compose_tiny()))
    changes = "attention.shared", "attention.before_scale", "+optimizer.decay_scalars"
    for setting in (*changes, "+trainer.channels_last", "+optimizer.fused"):
        assert config_hash(read_config(compose_tiny(f"{setting}=true"))) != before
    nulls = "+optimizer.decay_scalars=null", "+optimizer.fused=null"
    for setting in ("attention.shared=false", *nulls, "+trainer.channels_last=false"):
        assert config_hash(read_config(compose_tiny(setting))) == before


@pytest.mark.slow
def test_folder_tells_scale_experiment_normalizers_and_seed(compose_tiny, tmp_path):
    def folder_of(*overrides):
        return run_folder(read_config(compose_tiny(*overrides)))

    config = read_config(compose_tiny("seed=3", "attention=topk"))
    folder = run_folder(config)
    assert folder.parent == tmp_path / "small" / "deit_multimax"
    assert folder.name == f"topk-multimax-{config_hash(config)}-seed3"
    assert folder_of("seed=3", "attention=topk", "trainer.log_every=7") == folder
    others = [folder_of("seed=4", "attention=topk"), folder_of("seed=3", "attention=entmax")]
    assert len({folder, *others}) == 3


@pytest.fixture
def explain():
    def explain(*overrides):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return explain_bad_overrides(overrides)

    return explain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.epoch=3"], ["'trainer.epoch'", "did you mean: trainer.epochs", "batch_size"]),
        (["sed=1"], ["'sed'", "did you mean: seed", "output_dir"]),
        (["attention=multimax", "attention.k=3"], ["'attention.k'", "attention.order"]),
        (
            ["output=multimax", "output.before_scale=true"],
            ["'output.before_scale'", "output.order"],
        ),
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


@pytest.mark.slow
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
