"""Normalizers as one word of a command line: `multimax`, or `topk:k=100,floor=1e-6`."""

import json
from collections.abc import Mapping
from typing import Any


def parse_normalizer(text: str) -> dict[str, Any]:
    """Name and options of a normalizer, as `build_normalizer` takes them.

    Args:
        text: the name, and after a colon its options as `key=value`, separated by commas. Numbers,
            `true` and `false` mean themselves, all else is a string.

    Raises:
        ValueError: the text is malformed. Whether the name and the options are known,
            `build_normalizer` tells.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {"name": name.strip()}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise ValueError(
                f"{text!r} is not a normalizer: write its name and, after a colon, its options, "
                "such as topk:k=100,floor=1e-6"
            )
        options[key.strip()] = _value(value.strip())
    return options


def check_supported(place: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of a normalizer that the plug-in does not have in a place."""
    if options.get("shared"):
        raise ValueError(
            f"shared={_text(options['shared'])} of {place}: in fairseq each layer has its own "
            "scalars; leave shared out, which keeps the values of every layer, or train with "
            "train.py and attention.shared=true"
        )
    if place == "output" and "before_scale" in options:
        raise ValueError(
            "before_scale of output: only the scores of attention are scaled; leave it out, or "
            "give it to --attention-normalizer"
        )


def format_normalizer(options: Mapping[str, Any]) -> str:
    """The text that `parse_normalizer` turns into `options`, without those that are None."""
    name, *rest = (options["name"], *(item for item in options.items() if item[0] != "name"))
    given = [f"{key}={_text(value)}" for key, value in rest if value is not None]
    return name + (":" + ",".join(given) if given else "")


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
