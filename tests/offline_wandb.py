"""What Weights & Biases wrote offline, as its public API would give it back once it is synced."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # of LevelDB's log, whose form the file has
FULL, LAST = 1, 4


def records(file: Path):
    """The records of a `run-ID.wandb`."""
    data = file.read_bytes()
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if not kind:
            return
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []


def media(file: Path):
    """The files that `run.log` was given, such as tables and images, by name."""
    content = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            _update(content, record.history.item)
    return {
        name.removesuffix("/path"): file.parent / "files" / path
        for name, path in content.items()
        if name.endswith("/path")
    }


class OfflineApi:
    """`wandb.Api` of runs that are still on disk."""

    def __init__(self, *files: Path):
        self.files = files

    def runs(self, project):
        return [_run(file) for file in self.files]


def _run(file: Path):
    config, summary, facts, state = {}, {}, None, "crashed"
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            facts = record.run
            _update(config, record.run.config.update)
        elif kind == "config":
            _update(config, record.config.update)
        elif kind == "summary":
            _update(summary, record.summary.update)
        elif kind == "exit":
            state = "failed" if record.exit.exit_code else "finished"
    return SimpleNamespace(
        name=facts.display_name,
        group=facts.run_group,
        tags=list(facts.tags),
        config={key: value for key, value in config.items() if not key.startswith("_")},
        summary=summary,
        state=state,
    )


def _update(content, items):
    for item in items:
        content[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
