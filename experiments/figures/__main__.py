"""The figures of results/figures/.

python -m experiments.figures                      # all of them
python -m experiments.figures tables
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments.figures import tables
from multimax.registry import look_up

FIGURES: dict[str, Callable[[Path], list[Path]]] = {"tables": tables.draw}


def main() -> None:
    """Draw the figures that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(FIGURES)}; all if none is named")
    try:
        for name in parser.parse_args().names or FIGURES:
            print(*look_up("figure", FIGURES, name)(Path("results/figures")), sep="\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
