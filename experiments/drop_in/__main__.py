"""python -m experiments.drop_in [PACKAGE ...]: the table of families, in results/tables/drop_in.*

The rows of packages that are not named stay as they are there.

For each model: how many attention layers get another normalizer; the largest difference of an
output to the original's at the identity start, as a share of the largest output, in evaluation and
in training mode; whether greedy generation gives the same tokens, with its cache, where models of
transformers generate; whether a training step moves the scalars of all layers, and whether a state
dict brings them back into a new model. Or why it is refused.
"""

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from experiments.drop_in.families import Family, families
from multimax import replace_softmax, verify_replacement
from multimax.files import write_atomically
from multimax.parameters import normalizer_parameters
from multimax.replacement import routes
from multimax.replacement.verify import without_dropout

COLUMNS = [
    "package",
    "model",
    "layers",
    "evaluation",
    "training",
    "generation",
    "step",
    "reload",
    "remark",
]
NEW_TOKENS = 8


def main(arguments: list[str] | None = None) -> None:
    """Write the table of all packages, or of those that are named."""
    parser = argparse.ArgumentParser(prog="python -m experiments.drop_in", description=__doc__)
    known = sorted({family.package for family in families()})
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(known)}")
    parser.add_argument("--folder", type=Path, default=Path("results/tables"))
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.packages) - set(known)
    if unknown:
        parser.error(f"no package {', '.join(unknown)}: there are {', '.join(known)}")
    kept = _written(parsed.folder / "drop_in.csv") if parsed.packages else {}
    rows = []
    for family in families():
        if not parsed.packages or family.package in parsed.packages:
            rows.append(row(family))
            print(*rows[-1].values(), sep=" | ", flush=True)
        elif (family.package, family.name) in kept:
            rows.append(kept[family.package, family.name])
    parsed.folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in {"md": _markdown(rows), "csv": _csv(rows)}.items():
        content = text.encode()
        path = parsed.folder / f"drop_in.{suffix}"
        write_atomically(path, lambda stream, content=content: stream.write(content))


def _written(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a table that was written before, by package and model."""
    if not path.exists():
        return {}
    with path.open(newline="") as stream:
        rows = [
            {column: row.get(column) or "" for column in COLUMNS} for row in csv.DictReader(stream)
        ]
    return {(row["package"], row["model"]): row for row in rows}


def row(family: Family) -> dict[str, str]:
    """What replacing SoftMax does in one model."""
    result = dict.fromkeys(COLUMNS, "") | {"package": family.package, "model": family.name}
    model, args, kwargs = family.build()
    try:
        report = replace_softmax(model, bias_place=family.bias_place)
    except ValueError:
        found = routes.find(model, (), family.bias_place)
        reasons = {module.obstacle for module in found if module.obstacle}
        reasons = reasons or {module.left for module in found if module.left}
        remark = "refused: " + "; ".join(map(str, sorted(reasons)))
        return result | {"layers": "0", "remark": remark}
    verified = verify_replacement(model, *args, **kwargs)
    original, *_ = family.build()
    tokens = _generated(original, kwargs)
    if tokens is not None:
        same = torch.equal(tokens, _generated(model, kwargs))
        result["generation"] = "same tokens" if same else "other tokens"
    remarks = ['bias_place="before"'] if family.bias_place == "before" else []
    remarks += sorted({f"left: {entry.note}" for entry in report.left})
    return result | {
        "layers": str(len(report.attention)),
        "evaluation": f"{verified.evaluation:.0e}",
        "training": "random" if verified.training is None else f"{verified.training:.0e}",
        "step": "yes" if _steps(model, args, kwargs) else "no",
        "reload": "yes" if _reloads(model, family) else "no",
        "remark": "; ".join(remarks),
    }


def _generated(model: Any, kwargs: Any) -> Any:
    """The prompts and the most probable next tokens; None for a model that does not generate."""
    if not getattr(model, "can_generate", bool)():
        return None
    given = {name: value for name, value in kwargs.items() if not name.startswith("decoder_")}
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(**given, **lengths, do_sample=False)


def _steps(model: Any, args: Any, kwargs: Any) -> bool:
    """Whether a step of Adam in training mode moves scalars of every normalizer."""
    before = [scalar.detach().clone() for scalar in normalizer_parameters(model)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with without_dropout(model, training=True):  # a layer that is skipped learns nothing
        outputs = tree_leaves(model(*args, **kwargs))
    loss = sum(t.float().square().mean() for t in outputs if isinstance(t, torch.Tensor))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    moved = [not a.equal(b) for a, b in zip(before, normalizer_parameters(model), strict=True)]
    ts, ranges = moved[0::2], moved[1::2]
    return all(own or other for own, other in zip(ts, ranges, strict=True))


def _reloads(model: Any, family: Family) -> bool:
    """Whether a new model with a replacement takes the state dict, scalars included."""
    again, *_ = family.build()
    replace_softmax(again, bias_place=family.bias_place)
    again.load_state_dict(model.state_dict())
    pairs = zip(normalizer_parameters(again), normalizer_parameters(model), strict=True)
    return all(ours.equal(theirs) for ours, theirs in pairs)


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _csv(rows: list[dict[str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


if __name__ == "__main__":
    main()
