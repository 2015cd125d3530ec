"""The text data sets, and the registry that builds one from its name."""

from typing import Any

from multimax.data.text.files import TextFiles, Wikipedia
from multimax.data.text.source import TextSource
from multimax.data.text.wikitext103 import WikiText103
from multimax.registry import build

TEXT_DATA: dict[str, type[TextSource]] = {
    "wikipedia": Wikipedia,
    "wikitext103": WikiText103,
    "text_files": TextFiles,
}


def build_text_source(name: str, **options: Any) -> TextSource:
    """A text data set, of which nothing is read yet.

    Args:
        name: a key of `TEXT_DATA`.
        options: arguments of its class, such as `root` or `block_size`.

    Raises:
        FileNotFoundError: the files are not where `root` says.
        ValueError: see `multimax.registry.build`.
    """
    return build("text data set", TEXT_DATA, name, options)
