"""Draw the figures of `results/figures/`.

python -m experiments.figures                # all of them
python -m experiments.figures scores pareto
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments.figures import (
    maps,
    normalizers,
    pareto,
    propositions,
    reachable,
    responses,
    retrieval_errors,
    retrieval_training,
    scores,
    simplex,
    tables,
)
from multimax.registry import look_up

FIGURES: dict[str, Callable[[Path], list[Path]]] = {
    "normalizers": normalizers.draw,
    "simplex": simplex.draw,
    "scores": scores.draw,
    "maps": maps.draw,
    "pareto": pareto.draw,
    "responses": responses.draw,
    "propositions": propositions.draw,
    "tables": tables.draw,
    "retrieval_errors": retrieval_errors.draw,
    "retrieval_training": retrieval_training.draw,
    "reachable": reachable.draw,
}
FOLDER = Path("results/figures")


def main() -> None:
    """Draw the figures that the command line names; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(FIGURES)}; all if none is named")
    names = parser.parse_args().names or list(FIGURES)
    errors = []
    try:
        chosen = {name: look_up("figure", FIGURES, name) for name in names}
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for name, draw in chosen.items():
        try:
            print(*draw(FOLDER), sep="\n", flush=True)
        except (ValueError, OSError) as error:
            errors.append(f"error: {name}: {error}")
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()
