"""The text data sets, and the registry that builds one, or only its vocabulary, from its name."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from multimax.data.text_data import TextData
from multimax.data.text_files import (
    text_files,
    text_files_vocabulary,
    wikipedia,
    wikipedia_vocabulary,
)
from multimax.data.vocabulary import Vocabulary
from multimax.data.wikitext103 import wikitext103, wikitext103_vocabulary


class Builders(NamedTuple):
    """Of a data set, and of its vocabulary from some of the same options."""

    data: Callable[..., TextData]
    vocabulary: Callable[..., Vocabulary]


TEXT_DATA = {
    "wikipedia": Builders(wikipedia, wikipedia_vocabulary),
    "wikitext103": Builders(wikitext103, wikitext103_vocabulary),
    "text_files": Builders(text_files, text_files_vocabulary),
}


def build_text_data(name: str, **options: Any) -> TextData:
    """A text data set.

    Args:
        name: a key of `TEXT_DATA`.
        options: arguments of its function, such as `root` or `block_size`.

    Raises:
        FileNotFoundError: the files are not where `root` says.
        ValueError: the name or an option is unknown (the message lists the known ones), an option
            is out of range, or the files are not what they should be.
    """
    _check(name, options)
    return TEXT_DATA[name].data(**options)


def build_vocabulary(name: str, **options: Any) -> Vocabulary:
    """The vocabulary of a text data set, without its text; arguments as in `build_text_data`."""
    _check(name, options)
    function = TEXT_DATA[name].vocabulary
    needed = inspect.signature(function).parameters
    return function(**{key: value for key, value in options.items() if key in needed})


def _check(name: str, options: dict[str, Any]) -> None:
    if name not in TEXT_DATA:
        raise ValueError(f"unknown text data set {name!r}; known: {', '.join(TEXT_DATA)}")
    known = list(inspect.signature(TEXT_DATA[name].data).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"text data set {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known)}"
        )
