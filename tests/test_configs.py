"""What the files of `configs/` share: normalizers in both groups, headers of experiments."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONFIGS = Path(__file__).parents[1] / "configs"
ATTENTIONS, OUTPUTS, EXPERIMENTS = (
    sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    for group in ("attention", "output", "experiment")
)
# The settings that are not the same in configs/attention and configs/output, and why.
DIFFERENT = {
    "entmax": {"heads", "shared"},  # an output layer has no heads, and there is one of it
    "temperature": {"shared"},
    "multimax": {"before_scale", "shared"},  # the scores of an output layer are not scaled
    "topk": {"k"},  # of the keys, whose number depends on the scale; of the classes
    **{name: {"heads"} for name in ("asentmax", "scaled_softmax", "scaled_multimax")},
}
WITHOUT_LOSS = {"sink", "softpick", "sigmoid"}  # their weights do not sum to one


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def settings(group, name):
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"))


def test_attention_and_output_have_the_same_normalizers():
    assert set(ATTENTIONS) - WITHOUT_LOSS == set(OUTPUTS)
    assert set(DIFFERENT) <= set(ATTENTIONS)


@pytest.mark.parametrize("name", OUTPUTS)
def test_normalizer_is_the_same_in_attention_and_output(name):
    attention, output = settings("attention", name), settings("output", name)
    different = {
        key
        for key in attention.keys() | output.keys()
        if key not in attention or key not in output or attention[key] != output[key]
    }
    assert different == DIFFERENT.get(name, set())
    if not different:
        files = [CONFIGS / group / f"{name}.yaml" for group in ("attention", "output")]
        assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_begins_with_its_title_and_command(experiment):
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    package, title, command = lines[:3]
    assert package == "# @package _global_"
    assert re.match(r"# [A-Z]\w+ .*\w", title)
    assert "train.py" not in title
    assert command == f"# python train.py experiment={experiment}"
    assert composed(f"experiment={experiment}").name == experiment


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_other_commands_of_an_experiment_compose(experiment):
    header = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()[3:]
    commands = [line for line in header if line.startswith("#") and "python train.py" in line]
    (task,) = re.findall(r"override /task: (\w+)", "\n".join(header))
    at_paper_scale = (CONFIGS / "recipe" / task / "paper.yaml").exists()
    assert len(commands) == at_paper_scale
    for command in commands:
        overrides = command.split("python train.py ")[1].split()
        assert overrides[0] == f"experiment={experiment}"
        assert composed(*overrides).scale.name != "small"
