"""The commands of the library under one name: `multimax COMMAND ...`, or `python -m multimax`.

Each is a module that `python -m` runs too; `multimax COMMAND --help` shows its own arguments.
"""

import argparse
import runpy
import sys

import multimax

# A command: its module, what it does, and the extra of pyproject.toml that it needs.
COMMANDS: dict[str, tuple[str, str, str | None]] = {
    "kernels": ("multimax.kernels", "compile the CPU kernels, or say where they are", None),
    "evaluate": ("multimax.evaluate", "the figures of trained models again", "train"),
    "average": ("multimax.training.average", "the mean of checkpoints of a run", "train"),
    "generate": ("multimax.generate", "text from trained models", "train"),
    "prepare-iwslt14": ("multimax.data.prepare.iwslt14", "IWSLT14 for training", "train"),
    "prepare-wikitext103": ("multimax.data.prepare.wikitext103", "WikiText-103 likewise", "train"),
}


def main() -> None:
    """Run the command that the command line names, with the arguments behind its name."""
    commands = [f"  {name:<22}{does}" for name, (_, does, _) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="multimax",
        description="MultiMax and its peers: the commands of the library.",
        epilog="\n".join(["commands:", *commands]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=multimax.__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    name = parser.parse_args(sys.argv[1:2]).command
    module, _, extra = COMMANDS[name]
    sys.argv[:2] = [f"multimax {name}"]
    try:
        runpy.run_module(module, run_name="__main__")
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "multimax").partition(".")[0] == "multimax":
            raise
        raise SystemExit(
            f"error: multimax {name} needs {error.name}: pip install 'multimax[{extra}]'"
        ) from error


if __name__ == "__main__":
    main()
