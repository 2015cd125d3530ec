"""Every Python block of README and docs/ runs, in order, those of a document in one namespace."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)
WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text())]


def test_documents_have_code():
    assert {"README.md", "index.md", "drop-in.md", "torch.md"} <= {path.name for path in WITH_CODE}


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_CODE, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_code_of_a_document_runs(document, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text, namespace = document.read_text(), {}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block.group(1), str(document), "exec")  # errors name the line
        exec(code, namespace)
    capsys.readouterr()
