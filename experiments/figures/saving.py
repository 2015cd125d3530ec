"""Figures as files: whole or absent, and the same bytes for the same figure."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from multimax.files import write_atomically

DPI = 120
WITHOUT_TIME = {".pdf": {"CreationDate": None}, ".png": {}}


def save(
    figure: Figure, folder: Path, name: str, suffixes: Sequence[str] = (".png", ".pdf")
) -> list[Path]:
    """Write `folder/name` with each suffix, close the figure, and return the paths."""
    paths = []
    for suffix in suffixes:
        buffer = io.BytesIO()
        metadata = WITHOUT_TIME[suffix]
        figure.savefig(buffer, format=suffix[1:], dpi=DPI, metadata=metadata)
        path = folder / f"{name}{suffix}"
        write_atomically(path, lambda stream, buffer=buffer: stream.write(buffer.getvalue()))
        paths.append(path)
    plt.close(figure)
    return paths
