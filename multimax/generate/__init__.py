"""Text from trained models.

python -m multimax.generate lm CHECKPOINT "prompt"
python -m multimax.generate mt CHECKPOINT < input.de
python -m multimax.generate --help
"""

import argparse
from types import ModuleType

from multimax.generate import language_model, translation

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "lm": (language_model, "continue a text with a language model"),
    "mt": (translation, "translate the lines of standard input"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands; each is a module with `add_arguments` and `run`."""
    parser = argparse.ArgumentParser(prog="python -m multimax.generate", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (module, description) in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print()  # what comes next begins on a line of its own
        raise SystemExit(130) from None
