"""What a replacement did."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True)
class Entry:
    """One module of the model.

    Args:
        name: its name in the model, such as "blocks.0.attn".
        kind: its class.
        note: what is worth knowing: the normalizer in it, or why it was left.
    """

    name: str
    kind: str
    note: str


@dataclass(frozen=True)
class Replacement:
    """What `replace_softmax` did to a model; printed, it is a table.

    Args:
        attention: modules whose SoftMax was replaced.
        output: heads whose scores are modulated now.
        left: modules that still have SoftMax.
        parameters: how many scalars the model has gained.
    """

    attention: list[Entry] = field(default_factory=list)
    output: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        lines = [
            f"replaced: {len(self.attention)} attention layers, {len(self.output)} output layers; "
            f"left: {len(self.left)}; scalars: {self.parameters}"
        ]
        for title in ("attention", "output", "left"):
            lines += [f"  {title:9} {line}" for line in lines_of(getattr(self, title))]
        return "\n".join(lines)


def lines_of(entries: Iterable[Entry]) -> list[str]:
    """One line for neighbours of one kind and note."""
    lines = []
    for (kind, note), group in groupby(entries, lambda entry: (entry.kind, entry.note)):
        names = [entry.name for entry in group]
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        lines.append(f"{shown}: {kind.rpartition('.')[2]}, {note}")
    return lines
