"""The rooms of the house in layers: an import may only point down, or stay in its room.

`python tests/test_layers.py` prints the layers and every arrow between rooms.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. Rooms of one layer do not know each other.
LAYERS = (
    ("functional", "files", "registry", "options"),
    ("kernels",),
    ("normalizers",),
    ("attention", "losses", "metrics", "parameters"),
    ("data", "models", "recording"),
    ("decoding", "monitoring", "replacement"),
    ("tasks",),
    ("training",),
    ("hub", "integrations"),
    ("evaluate", "generate"),
    ("experiments", "benchmarks"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
GROUND_FLOOR = {room: {"torch"} for layer in LAYERS[:4] for room in layer} | {
    "options": {"pydantic"}
}


def sources(root=ROOT):
    """Python files by room, without the entry points above all rooms."""
    files = defaultdict(list)
    for file in sorted((root / "multimax").rglob("*.py")):
        room = file.relative_to(root / "multimax").parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__") and "embedded" not in file.parts:
            files[room].append(file)
    for folder in ("experiments", "benchmarks"):
        files[folder] = sorted((root / folder).rglob("*.py"))
    return files


def imported_modules(file):
    """Full names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def arrows(root=ROOT):
    """(from room, to room) -> the files whose imports make the arrow."""
    found = defaultdict(set)
    for room, files in sources(root).items():
        for file in files:
            for module in imported_modules(file):
                top, _, rest = module.partition(".")
                target = rest.partition(".")[0] if top == "multimax" else top
                if target in LEVEL and target != room:
                    found[room, target].add(str(file.relative_to(root)))
    return found


def upward(root=ROOT):
    return {pair: files for pair, files in arrows(root).items() if not points_down(*pair)}


def points_down(room, target):
    return LEVEL.get(room, len(LAYERS)) > LEVEL[target]


def test_every_room_has_a_layer():
    assert set(sources()) == set(LEVEL)


def test_no_arrow_points_up():
    assert upward() == {}


def test_an_upward_arrow_is_found(tmp_path):
    (tmp_path / "multimax" / "data").mkdir(parents=True)
    (tmp_path / "multimax" / "data" / "x.py").write_text("from multimax import tasks\n")
    (tmp_path / "multimax" / "metrics.py").write_text("def f():\n    import multimax.losses\n")
    assert set(upward(tmp_path)) == {("data", "tasks"), ("metrics", "losses")}


def test_the_lower_floors_import_nothing_but_torch():
    for room, allowed in GROUND_FLOOR.items():
        assert sources()[room], room
        for file in sources()[room]:
            tops = {module.partition(".")[0] for module in imported_modules(file)}
            others = tops - set(sys.stdlib_module_names) - {"multimax", "triton", "__future__"}
            assert others <= allowed, file


def shortest():
    """The arrows that no way over other rooms replaces: what is drawn."""
    below = defaultdict(set)
    for room, target in arrows():
        below[room].add(target)

    def reach(room):
        return below[room].union(*(reach(target) for target in below[room]))

    return {
        (room, target)
        for room in list(below)
        for target in below[room]
        if not any(target in reach(other) for other in below[room] - {target})
    }


def test_the_picture_in_the_documentation_is_the_house():
    """docs/architecture.md draws the arrows that are there, but for those that others imply."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"^\s*(\w+) --> (\w+)$", text, re.MULTILINE))
    assert drawn == shortest()
    rooms = {room for pair in drawn for room in pair}
    assert rooms == set(LEVEL)


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for rooms in reversed(LAYERS):
        print(" | ".join(rooms))
    for (room, target), files in sorted(arrows(root).items()):
        mark = "   " if points_down(room, target) else "UP "
        print(f"{mark}{room} -> {target}  ({len(files)}: {', '.join(sorted(files)[:3])})")
    print(f"{len(upward(root))} arrows point up; drawn are:")
    print(*(f"    {room} --> {target}" for room, target in sorted(shortest())), sep="\n")
