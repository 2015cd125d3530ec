"""The commands under the name `multimax`."""

import sys
from importlib.util import find_spec

import pytest

import multimax
from multimax.__main__ import COMMANDS, main


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line; returns what ended it, and what was printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["multimax", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_that_python_runs(command, name):
    module, _, _ = COMMANDS[name]
    spec = find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is None or find_spec(f"{module}.__main__")
    code, said = command(name, "--help")
    assert (code, said.err) == (0, "")
    assert said.out.startswith("usage: ")


def test_help_lists_the_commands_and_a_wrong_one_is_refused(command):
    code, said = command("--help")
    assert code == 0
    for name, (_, does, _) in COMMANDS.items():
        assert f"  {name} " in said.out
        assert does in said.out
    assert command("--version")[1].out == f"{multimax.__version__}\n"
    assert command()[0] == 2
    code, said = command("evaluated")
    assert code == 2
    assert "invalid choice: 'evaluated'" in said.err


def test_a_command_gets_its_arguments_and_names_the_extra_that_is_missing(
    command, monkeypatch, tmp_path
):
    (tmp_path / "echoes.py").write_text("import sys\nsys.exit(repr(sys.argv))\n")
    (tmp_path / "lacks.py").write_text("import package_that_is_not_there.part\n")
    (tmp_path / "broken.py").write_text("import multimax.not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("echoes", "lacks", "broken"):
        monkeypatch.setitem(COMMANDS, name, (name, "", "train"))
    assert command("echoes", "--help", "x y") == ("['multimax echoes', '--help', 'x y']", ("", ""))
    needed = "error: multimax lacks needs package_that_is_not_there: pip install 'multimax[train]'"
    assert command("lacks")[0] == needed
    monkeypatch.setattr(sys, "argv", ["multimax", "broken"])
    with pytest.raises(ModuleNotFoundError, match=r"multimax\.not_there"):
        main()
