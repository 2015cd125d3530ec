"""What the interpreter does not show: the compiler takes the kernels, and they fit onto a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import multimax

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

KERNELS = {
    "attention_forward",
    "attention_backward_bias",
    "attention_backward_query",
    "attention_backward_key_value",
    "cross_entropy_row",
}
# Bytes of shared memory for a program on the smallest GPU of each generation.
LIMITS = {"80": 99 * 1024, "90": 227 * 1024, "120": 99 * 1024}


def test_kernels_compile(tmp_path):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(multimax.__file__).parents[1]),
    }
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = {capability: set() for capability in LIMITS}
    for capability, kernel, shared in map(str.split, result.stdout.splitlines()):
        compiled[capability].add(kernel)
        assert int(shared) <= LIMITS[capability]
    assert compiled["80"] == compiled["90"] == KERNELS
    assert compiled["120"] == KERNELS - {"attention_backward_bias"}
