"""Without a GPU the Triton kernels run in Triton's interpreter, on tensors of the CPU."""

import os
import sys

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    # It is read when triton is imported, which parts of torch do: let the next import be the first.
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Give the interpreter products of bf16 tiles: Triton 3.8 multiplies their bits as integers."""
    if not INTERPRETED:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self, a, b, *rest):
        bf16, fp32 = interpreter.tl.bfloat16, interpreter.tl.float32
        a, b = (self.cast_impl(tile, fp32) if tile.dtype == bf16 else tile for tile in (a, b))
        return original(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)
