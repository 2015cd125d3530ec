"""The command that draws figures: which it draws, and what becomes of one that cannot be drawn."""

import sys
from pathlib import Path

import pytest

from experiments.figures import __main__ as command


@pytest.fixture
def typed(monkeypatch):
    """The command with names, in the place of whose figures stand three small functions."""
    drawn = []

    def draws(name):
        return lambda folder: drawn.append(name) or [folder / f"{name}.png"]

    def fails(folder):
        raise FileNotFoundError("there is nothing to draw: make it")

    figures = {"one": draws("one"), "empty": fails, "other": draws("other")}
    monkeypatch.setattr(command, "FIGURES", figures)

    def run(*names):
        monkeypatch.setattr(sys, "argv", ["figures", *names])
        command.main()

    return run, drawn


def test_named_figures_are_drawn_and_their_files_said(typed, capsys):
    run, drawn = typed
    run("other")
    assert drawn == ["other"]
    assert Path(capsys.readouterr().out.strip()) == Path("results/figures/other.png")


def test_without_a_name_all_are_drawn_and_failures_said_at_the_end(typed, capsys):
    run, drawn = typed
    with pytest.raises(SystemExit) as stopped:
        run()
    assert drawn == ["one", "other"]
    assert stopped.value.code == "error: empty: there is nothing to draw: make it"
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_unknown_name_is_refused_before_anything_is_drawn(typed):
    run, drawn = typed
    with pytest.raises(SystemExit, match=r"error: unknown figure 'onne'.*one.*empty.*other"):
        run("other", "onne")
    assert drawn == []


def test_every_module_that_draws_is_registered():
    modules = {path.stem for path in Path(command.__file__).parent.glob("*.py")}
    assert set(command.FIGURES) == modules - {"__init__", "__main__", "pairs", "saving"}
