"""Draw the figures of `results/figures/`.

python -m experiments.figures                # all of them
python -m experiments.figures scores pareto
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from multimax.registry import look_up

FIGURES = ("scores", "maps", "pareto")
FOLDER = Path("results/figures")


def main() -> None:
    """Draw the figures that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(FIGURES)}; all if none is named")
    try:
        for name in parser.parse_args().names or FIGURES:
            look_up("figure", dict.fromkeys(FIGURES), name)
            draw: Callable[[Path], list[Path]] = import_module(f"experiments.figures.{name}").draw
            print(*draw(FOLDER), sep="\n", flush=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
