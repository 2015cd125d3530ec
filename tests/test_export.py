"""torch.export of every normalizer, attention and model, for sizes other than the example's."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from subjects import MODELS, REGISTERED, SIZES, SUBJECTS, Attended, subject
from torch._subclasses.fake_tensor import FakeTensorMode

from multimax import SoftMax
from multimax.kernels.backend import use_backend


def export(name, strict=False):
    item = subject(name)
    inputs = item.draw(*SIZES[0])
    return torch.export.export(item.module, inputs, dynamic_shapes=item.dynamic, strict=strict)


exported = cache(export)


def foreign_operations(program):
    """What a program calls beside torch's own operations and arithmetic of sizes."""
    graphs = [part.graph for part in program.graph_module.modules() if hasattr(part, "graph")]
    calls = [node.target for g in graphs for node in g.nodes if node.op == "call_function"]
    own = {str(c): getattr(c, "namespace", getattr(c, "__module__", None)) for c in calls}
    known = ("aten", "_operator", "torch", "higher_order")  # the last: that no gradient is taken
    return {call: origin for call, origin in own.items() if origin not in known}


def assert_agrees(program, name):
    item = subject(name)
    assert not foreign_operations(program)
    for sizes in SIZES:
        inputs = item.draw(*sizes)
        got, expected = program.module()(*inputs), item.module(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_every_registered_model_is_a_subject():
    assert {name.partition("-")[0] for name in MODELS} == set(REGISTERED)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_an_exported_program_for_all_sizes(name):
    assert_agrees(exported(name), name)


# Of a normalizer alone it is the tracer of torch.compile, which each of them passes in other tests.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["multimax", "attention", "step"])
def test_strict_export(name):
    assert_agrees(export(name, strict=True), name)


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["multimax"] = sys.modules["timm"] = None  # an import of them is an error
for path in sys.argv[1:]:
    inputs, expected = torch.load(path + ".tensors")
    got = torch.export.load(path).module()(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)
"""


@pytest.mark.slow
def test_a_saved_program_runs_without_the_package(tmp_path):
    paths = []
    for name in ("multimax-affine", "sparsemax", "entmax", "step"):
        item, paths = subject(name), [*paths, str(tmp_path / f"{name}.pt2")]
        inputs = item.draw(*SIZES[1])
        torch.export.save(exported(name), paths[-1])
        with torch.no_grad():
            torch.save((inputs, item.module(*inputs)), f"{paths[-1]}.tensors")
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, *paths], check=True)


def test_no_triton_kernel_gets_into_a_program():
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 8, device="cuda")
        mask = torch.ones(5, 5, dtype=torch.bool, device="cuda")
        program = torch.export.export(Attended(SoftMax()), (query, query, query, mask))
    assert not foreign_operations(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multimax", "sparsemax", "topk-3", "attention"])
def test_a_kernel_asked_for_by_name_is_refused(name):
    with use_backend("c"), pytest.raises(ValueError, match="exported programs hold torch operat"):
        export(name)
