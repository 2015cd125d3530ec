"""README, CONTRIBUTING and docs/: the commands, modules and files that they name exist."""

import math
import os
import re
import shlex
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import multimax

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if path.exists()
]
# Files and folders of a run or of somebody's data, not of this repository.
ELSEWHERE = {"train/", "val/", "wds/", "hfds/", "hfids/", "config.yaml"}
SUFFIX = r"\.(py|sh|c|h|md|toml|txt|ya?ml|cff|csv|png)"
# Arguments of train.py with a setting (repeat= is none), up to a comment or another command; no
# "<placeholders>".
TRAINING = r"\btrain\.py (?!repeat=)(?=[^`#\n|&;<>$]*=)([^`#\n|&;<>$]*+)(?![<$])"
NOT_OURS = {"outputs", "wandb", "build", "dist", "htmlcov", "site", "__pycache__"}


def code(document):
    """The code blocks and spans of a document, with lines that end in a backslash joined."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.compile(r"^```.*?\n(.*?)^```", flags=re.M | re.S)
    return blocks.findall(text) + re.findall(r"`([^`]+)`", blocks.sub("", text))


def found(pattern):
    """(document, what the pattern finds in its code), each once."""
    everything = {
        (document.relative_to(ROOT).as_posix(), match)
        for document in DOCUMENTS
        for piece in code(document)
        for match in re.findall(pattern, piece, flags=re.M)
    }
    return sorted(everything)


def repository():
    """Files and folders, relative to the root; those of folders with a slash at the end."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name in (".ci", ".github") or (name not in NOT_OURS and not name.startswith("."))
        ]
        above = Path(folder).relative_to(ROOT)
        yield from ((above / name).as_posix() for name in files)
        yield from (f"{(above / name).as_posix()}/" for name in folders)


def looks_like_a_path(name):
    """Whether it has the form of a folder or of a file that could be in the repository."""
    # mine.py and mine.yaml are what a reader of CONTRIBUTING adds.
    if name in ELSEWHERE or name.startswith("outputs/") or "mine." in name:
        return False
    return re.fullmatch(rf"[\w.*-]+(/[\w.*-]+)*(/|{SUFFIX})", name) is not None


PATHS = [(document, name) for document, name in found(r"\A\S+\Z") if looks_like_a_path(name)]
LINKS = [
    (document, link)
    for document in DOCUMENTS
    for link in sorted(set(re.findall(r"\]\(([^)\s#]+)", document.read_text())))
    if not re.match(r"\w+:", link)
]


def test_readme_is_read():
    assert ("README.md", "demo") in found(r"^make ([\w-]+)")
    assert ("README.md", "multimax/kernels/csrc/") in PATHS
    assert any(document.name == "README.md" for document, _ in LINKS)


def test_the_normalizer_of_contributing_is_one():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    namespace = {}
    exec(re.search(r"^```python\n(.*?)^```", text, flags=re.M | re.S).group(1), namespace)
    module = namespace["ScalableSoftMax"]()
    scores = torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[:3]
    expected = [torch.softmax(0.43 * math.log(n) * scores[..., n - 1, :n], -1) for n in (1, 2, 3)]
    for row, (n, p) in enumerate(zip((1, 2, 3), expected, strict=True)):
        torch.testing.assert_close(module.double()(scores, mask=mask)[..., row, :n], p)
    assert not module.sparse
    target = torch.tensor([1, 2])
    loss = multimax.output_loss(module, scores[:, 0], target)
    torch.testing.assert_close(loss, -module.log_probabilities(scores[:, 0])[[0, 1], target].mean())


@pytest.mark.parametrize(("document", "target"), found(r"^(?:\$ )?make ([\w-]+)"))
def test_make_target_exists(document, target):
    assert target in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize(("document", "module"), found(r"python3? -m ([\w.]+\w)(?![\w.]*<)"))
def test_module_can_be_run(document, module):
    spec = find_spec(module)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        assert (Path(spec.submodule_search_locations[0]) / "__main__.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("document", "arguments"), found(TRAINING))
def test_training_command_composes(document, arguments):
    settings = [word for word in shlex.split(arguments) if "=" in word and "(" not in word]
    first = [word if "[" in word else word.split(",")[0] for word in settings]  # of a sweep
    assert first
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose("config", overrides=first)


def test_paths_exist():
    ours = list(repository())
    missing = [
        (document, name)
        for document, name in PATHS
        if not any(fnmatch(path, name) or fnmatch(path, f"*/{name}") for path in ours)
    ]
    assert missing == []


@pytest.mark.parametrize(("document", "link"), LINKS)
def test_link_to_a_file_leads_somewhere(document, link):
    assert (document.parent / link).exists()


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, flags=re.M)
    assert set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.M)) == set(phony.split())


def test_versions_agree():
    version = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert version.group(1) == multimax.__version__
    ruff = re.search(r"^ruff==.*", (ROOT / "constraints.txt").read_text(), flags=re.M).group()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {ruff}
    classified = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    (tested,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"[\d.]+", tested) == classified
