"""Building things by name: normalizers, data sets, models and tasks each have a table of names."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: str, table: Mapping[str, Callable[..., T]], name: str, options: Any) -> T:
    """What `table` has under a name, called with options.

    Args:
        kind: what the table holds, for messages, such as "normalizer".
        table: functions or classes by name.
        name: a key of it.
        options: a mapping of keyword arguments.

    Raises:
        ValueError: the name or an option is unknown (the message lists the known ones), or an
            option is out of range.
    """
    entry = look_up(kind, table, name)
    known = option_names(entry)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{kind} {name!r} has no option {', '.join(unknown)}; "
            f"it has: {', '.join(known) or 'none'}{_suggestion(unknown[0], known)}"
        )
    return entry(**options)


def look_up(kind: str, table: Mapping[str, T], name: str) -> T:
    """What `table` has under a name.

    Raises:
        ValueError: it has nothing; the message lists the names.
    """
    if name not in table:
        raise ValueError(
            f"unknown {kind} {name!r}; known: {', '.join(table)}{_suggestion(name, table)}"
        )
    return table[name]


def option_names(entry: Callable[..., Any]) -> list[str]:
    """The names of the arguments of a function or class."""
    return list(inspect.signature(entry).parameters)


def _suggestion(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
