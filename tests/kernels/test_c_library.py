"""Loading the C kernels, calling them, and what happens where there are none."""

import ctypes
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernels_here import needs_kernels

from multimax.kernels import c_build, c_library

ROOT = Path(__file__).parents[2]


def load(dtype=torch.float32):
    """The library or the reason why there is none, as in a new process."""
    return c_library._load.__wrapped__(dtype)


@needs_kernels
@pytest.mark.parametrize("structure", c_library.STRUCTURES)
@pytest.mark.parametrize("change", ["missing", "added", "wider", "last narrower"])
def test_a_structure_that_is_another_one_in_c(monkeypatch, structure, change):
    fields = dict(structure._fields_)
    last = list(fields)[-1]
    if change == "missing":
        del fields[last]
    elif change == "added":
        fields["another"] = ctypes.c_int64
    elif change == "wider":
        fields[next(iter(fields))] = ctypes.c_int64 * 2
    else:  # of the same size, but written elsewhere
        del fields[last]
        fields |= {"padding": ctypes.c_int32, last: ctypes.c_int32}
    wrong = c_library._structure(structure.__name__, **fields)
    monkeypatch.setattr(c_library, "STRUCTURES", (wrong,))
    reason = load()
    expected = rf"structure {structure.__name__} has size and last offset \[.*\] in csrc, but \["
    assert re.match(expected, reason)
    monkeypatch.setattr(c_library, "_library_or_reason", lambda dtype: reason)
    with pytest.raises(RuntimeError, match=expected):
        c_library.call(torch.float32, "softmax_forward")
    with pytest.warns(UserWarning, match=expected):
        assert c_library._warn_if_unavailable.__wrapped__(torch.float32) == reason


def test_what_the_kernels_answer(monkeypatch):
    library = SimpleNamespace(good=lambda *pointers: 0, bad=lambda *pointers: 1)
    monkeypatch.setattr(c_library, "_library_or_reason", lambda dtype: library)
    c_library.call(torch.float32, "good", torch.ones(3), None, 2)
    with pytest.raises(MemoryError, match="no memory for the working space of bad"):
        c_library.call(torch.float32, "bad")
    with pytest.raises(ValueError, match="a tensor is on meta, the others are on the CPU"):
        c_library.call(torch.float32, "good", torch.ones(3, device="meta"))


# Every normalizer inside of attention, by default and by definition; what there was to say.
EVERYTHING = """
import json
import warnings
import torch
from multimax import MultiMax, build_normalizer, registered_normalizers
from multimax.attention import attention

def results(normalizer, backend):
    out = attention(*tensors, normalizer, causal=True, backend=backend)
    return out, *torch.autograd.grad(out.square().sum(), tensors)

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    tensors = [torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3)]
    for name in registered_normalizers():
        normalizer = build_normalizer(name)
        torch.testing.assert_close(results(normalizer, None), results(normalizer, "eager"))
said = [str(warning.message) for warning in caught if "multimax" in str(warning.message)]
try:
    named = attention(*tensors, MultiMax(), backend="c").shape
except ValueError as error:
    named = str(error)
print(json.dumps([said, named]))
"""


def run_everything(**environment):
    """What `EVERYTHING` prints in this environment."""
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_without_a_compiler_all_works_and_a_warning_says_so_once(tmp_path):
    reason = "no C compiler was found; install gcc or clang, or set CC"
    said, named = run_everything(CC="", PATH="", XDG_CACHE_HOME=tmp_path)
    assert said == [f"multimax runs without its compiled CPU kernels for torch.float32: {reason}"]
    assert named == f"backend 'c' cannot compute this attention: {reason}"


@pytest.mark.slow
@needs_kernels
def test_a_plain_compiler_and_no_place_to_keep_the_library(tmp_path):
    """Without OpenMP and for any processor; what is written is gone in the end."""
    script, temporary = tmp_path / "plain", tmp_path / "temporary"
    temporary.mkdir()
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*|*-march*) exit 1;; esac\n'
        f'exec {shlex.join(c_build.find_compiler())} "$@" -O1\n'  # which is quicker
    )
    script.chmod(0o755)
    said, named = run_everything(CC=script, XDG_CACHE_HOME=script, TMPDIR=temporary)
    assert said == []
    assert named == [2, 3, 40, 8]
    # Torch itself may leave a folder of its compiler's there.
    assert [path for path in temporary.iterdir() if "torchinductor" not in path.name] == []
