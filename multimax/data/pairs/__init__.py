"""The translation data sets, and the registry that builds one from its name."""

from typing import Any

from multimax.data.pairs.sources import Iwslt14, LibreOfficeHelp, PairSource
from multimax.registry import build

PAIR_DATA: dict[str, type[PairSource]] = {"libreoffice_help": LibreOfficeHelp, "iwslt14": Iwslt14}


def build_pair_source(name: str, **options: Any) -> PairSource:
    """A translation data set, of which nothing is read yet.

    Args:
        name: a key of `PAIR_DATA`.
        options: arguments of its class, such as `root` or `max_length`.

    Raises:
        FileNotFoundError: the files are not where `root` says.
        ValueError: see `multimax.registry.build`.
    """
    return build("translation data set", PAIR_DATA, name, options)
