"""`make test-sanitized` finds what it is for: C kernels that read where they must not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# SoftMax of rows that the kernel takes to be longer than they are, by so many entries.
PLANTED = """
import sys
import torch
from multimax.kernels import c_library

excess = int(sys.argv[1])
scores, p = torch.zeros(4, 64), torch.empty(4, 64 + excess)
rows = c_library.Rows(outer=1, heads=1, queries=4, columns=64 + excess, threads=1)
identity = torch.tensor([1.0, 0.0])
c_library.call(torch.float32, "softmax_forward", rows, 0, identity, scores, p)
print("sum", p.sum().item())
"""


def has_sanitizers():
    if not (shutil.which("gcc") and shutil.which("make")):
        return False
    library = ["gcc", "-print-file-name=libasan.so"]
    return Path(subprocess.run(library, capture_output=True, text=True).stdout.strip()).is_file()


@pytest.mark.slow
@pytest.mark.skipif(not has_sanitizers(), reason="needs make, gcc and its libasan")
def test_a_read_out_of_bounds_is_found(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PLANTED}")

    def run(excess):
        environment = [f"VENV={sys.prefix}", "-o", f"{sys.prefix}/complete"]  # as it is
        command = ["make", *environment, "test-sanitized", f"SANITIZED={script} {excess}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(0)
    assert done.returncode == 0, done.stderr
    assert "sum 4.0" in done.stdout
    done = run(1)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "READ of size 4" in done.stderr
    assert "modulator.h" in done.stderr
