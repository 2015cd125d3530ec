"""Draw the figures of `results/figures/`.

python -m experiments.figures                # all of them
python -m experiments.figures scores pareto
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments.figures import maps, pareto, propositions, scores, tables
from multimax.registry import look_up

FIGURES: dict[str, Callable[[Path], list[Path]]] = {
    "scores": scores.draw,
    "maps": maps.draw,
    "pareto": pareto.draw,
    "propositions": propositions.draw,
    "tables": tables.draw,
}
FOLDER = Path("results/figures")


def main() -> None:
    """Draw the figures that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(FIGURES)}; all if none is named")
    try:
        chosen = [look_up("figure", FIGURES, name) for name in parser.parse_args().names]
        for draw in chosen or FIGURES.values():
            print(*draw(FOLDER), sep="\n", flush=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
