"""A run repeated from its result.json: the same numbers, or which are not."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny import only, run_quietly, tiny_config

from multimax.training.repeat import differences, other_conditions, repeat

FINISHED = {}


@pytest.fixture
def finished(tmp_path_factory):
    """The result of one run for all tests, made under the fixtures of the first of them."""
    if not FINISHED:
        folder = tmp_path_factory.mktemp("first")
        run_quietly(tiny_config(folder))
        FINISHED["file"] = only(folder, "result.json")
    return FINISHED["file"]


def repeated(*arguments):
    stream = io.StringIO()
    same = repeat(arguments, Console(file=stream, width=400))
    return same, stream.getvalue()


def changed_copy(finished, tmp_path, change):
    content = json.loads(finished.read_text())
    change(content)
    copy = tmp_path / "changed.json"
    copy.write_text(json.dumps(content))
    return copy


def test_the_same_numbers(finished, tmp_path):
    same, said = repeated(f"repeat={finished}", f"output_dir={tmp_path}")
    assert same
    assert said.splitlines()[-1] == "repeated: the same numbers"
    again = only(tmp_path / "repeated", "result.json")
    assert again.parent.name == finished.parent.name
    assert json.loads(again.read_text())["metrics"] == json.loads(finished.read_text())["metrics"]
    once_more, said = repeated(f"repeat={finished}", f"output_dir={tmp_path}")
    assert once_more
    assert "here is its result" not in said  # it was trained again, and the other one kept aside
    assert len([*tmp_path.rglob("previous-*/result.json")]) == 1


def test_numbers_that_differ_are_listed(finished, tmp_path):
    def change(content):
        content["metrics"]["test"]["top1"] += 1
        content["learned_scalars"]["output.ts"][1] = 0.25
        content["hardware"]["device"] = "abacus"
        content["processes"] = 4
        content |= {"commit": "0" * 40, "uncommitted_changes": False}

    copy = changed_copy(finished, tmp_path, change)
    same, said = repeated(f"repeat={copy}", f"output_dir={tmp_path}")
    assert not same
    assert "metrics.test.top1: " in said
    assert "learned_scalars.output.ts.1: 0.25 recorded" in said
    assert said.splitlines()[-1] == "2 numbers differ"
    assert "hardware.device was abacus" in said
    assert "processes were 4, are 1: start as many" in said
    assert f"commit was {'0' * 40}, is " in said


def test_as_many_threads_as_recorded(finished, tmp_path):
    here = torch.get_num_threads()
    copy = changed_copy(finished, tmp_path, lambda content: content["hardware"].update(threads=2))
    repeated(f"repeat={copy}", f"output_dir={tmp_path}")
    again = only(tmp_path / "repeated", "result.json")
    assert json.loads(again.read_text())["hardware"]["threads"] == 2
    assert torch.get_num_threads() == here


def test_differences_compare_what_only_one_has():
    one = {"metrics": {"test": {"loss": 1.0, "bleu": 2.0}}, "normalizers": {}}
    other = {"metrics": {"test": {"loss": 1.0}}, "normalizers": {"a": {"entropy": None}}}
    one, other = ({**result, "learned_scalars": {}} for result in (one, other))
    assert differences(one, one) == []
    assert differences(one, other) == ["metrics.test.bleu: 2.0 recorded, null now"]
    assert other_conditions({}, {"versions": {}, "hardware": {}, "commit": None}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema=1), "has schema 1, this version writes 2"),
        (lambda content: content.update(origin="resumed from x"), "went on from another run"),
        (lambda content: content.pop("inputs"), "is no result.json: it lacks inputs"),
        (lambda content: content["config"].update(trainre={}), "there is no setting trainre"),
        (lambda content: content["inputs"].update(data="0" * 16), "is of other data"),
    ],
)
def test_what_cannot_be_repeated_is_refused(finished, tmp_path, change, message):
    copy = changed_copy(finished, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        repeated(f"repeat={copy}", f"output_dir={tmp_path}")


def test_other_settings_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"seed=1: repeat= takes all settings from its file, but"):
        repeated(f"repeat={finished}", "seed=1")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        repeated(f"repeat={tmp_path}/no.json")
    (tmp_path / "half.json").write_text('{"schema": 2,')
    with pytest.raises(ValueError, match=r"half\.json is damaged"):
        repeated(f"repeat={tmp_path}/half.json")
