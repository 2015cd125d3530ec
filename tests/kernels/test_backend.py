"""Which form runs: the names, their errors, and that a named one never falls back."""

import re
import threading

import pytest
import torch
from definition import (
    MODULATED,
    THRESHOLDS,
    assert_equal,
    attended,
    build,
    normalized,
    qkv,
)
from kernels_here import needs_kernels
from torch.func import vmap

from multimax import (
    MultiMax,
    SoftMax,
    SparseMax,
    build_normalizer,
    multimax,
    registered_normalizers,
)
from multimax.attention import attention
from multimax.kernels import c_library, c_rows
from multimax.kernels.backend import BACKENDS, chosen_backend, use_backend


@pytest.fixture
def called(monkeypatch):
    """Names of the functions of the kernels that have been called."""
    names, call = [], c_library.call

    def record(dtype, function, *arguments):
        names.append(function)
        call(dtype, function, *arguments)

    monkeypatch.setattr(c_library, "call", record)
    return names


@pytest.mark.parametrize("name", ["fast", "", "Eager", "cpu"])
def test_an_unknown_name_lists_the_known(name):
    known = f"backend must be one of {', '.join(BACKENDS)}, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(known)), use_backend(name):
        pass
    assert chosen_backend() == "auto"
    with pytest.raises(ValueError, match=re.escape(known)):
        attention(*qkv(), SoftMax(), backend=name)


def test_use_backend_nests_and_ends_with_an_exception():
    assert chosen_backend() == "auto"
    with use_backend("eager"):
        with use_backend("c"):
            assert chosen_backend() == "c"
        assert chosen_backend() == "eager"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert chosen_backend() == "eager"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(chosen_backend()))
        thread.start()
        thread.join()
        assert seen == ["auto"]
    assert chosen_backend() == "auto"


@needs_kernels
@pytest.mark.parametrize("way", ["argument", "context"])
@pytest.mark.parametrize(
    ("backend", "normalizer", "message"),
    [
        (
            "c",
            SparseMax(),
            r"SparseMax\(alpha=2\): it is no SoftMax of scores with a modulator",
        ),
        (
            "triton",
            SparseMax(),
            r"SparseMax\(alpha=2\): it is no SoftMax of scores with a modulator",
        ),
        ("c", MultiMax(order=3), r"MultiMax\(order=3.* a modulator of order <= 2"),
        ("triton", SoftMax(), "the tensors are on cpu, it runs on CUDA"),
    ],
)
def test_a_named_backend_never_falls_back(monkeypatch, backend, normalizer, message, way):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    error = pytest.raises(
        ValueError, match=f"backend '{backend}' cannot compute this attention: {message}"
    )
    if way == "argument":
        with error:
            attention(*qkv(), normalizer, backend=backend)
    else:
        with error, use_backend(backend):
            attention(*qkv(), normalizer)


@needs_kernels
def test_the_c_kernels_say_what_hinders_them():
    def fails_with(message, *tensors):
        with pytest.raises(ValueError, match=f"'c' cannot compute this attention: {message}"):
            attention(*tensors, SoftMax(), backend="c")

    query, key, value = qkv()
    fails_with("query, key and value are torch.float32, torch.float64", query.float(), key, value)
    fails_with("the tensors are on meta", *(t.to("meta") for t in (query, key, value)))
    fails_with("there is nothing to compute", query[:0], key[:0], value[:0])

    def inside(*tensors):
        fails_with("function transforms such as vmap need torch operations", *tensors)
        return tensors

    vmap(inside)(query, key, value)


@needs_kernels
@pytest.mark.parametrize("backend", ["eager", "auto", "c"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(9, 8), (11, 7), (11, 5)], "query and key must have one head_dim"),
        ([(2, 3, 9, 8), (2, 3, 11, 7), (2, 3, 11, 5)], "query and key must have one head_dim"),
        ([(2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 10, 5)], "key and value one number of keys"),
        ([(2, 3, 9, 8), (2, 2, 11, 8), (2, 2, 11, 5)], "the heads of key and value must be"),
        ([(2, 4, 9, 8), (2, 2, 11, 8), (2, 4, 11, 5)], "the heads of key and value must be"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message, backend):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.ones(shape) for shape in shapes), SoftMax(), backend=backend)


@needs_kernels
def test_auto_computes_by_kernels(called):
    attended(qkv(), build("multimax-2"), backend="auto")
    assert called == ["attention_forward", "attention_backward"]
    for name, function in [("softmax", "softmax"), ("entmax15", "threshold")]:
        called.clear()
        normalized(build(name), torch.ones(2, 3, dtype=torch.float64))
        assert called == [f"{function}_forward", f"{function}_backward"]


@pytest.mark.parametrize("name", registered_normalizers())
@pytest.mark.parametrize("way", ["argument", "context"])
def test_eager_never_calls_a_kernel(called, name, way):
    normalizer = build_normalizer(name).double()
    tensors, scores = [t.requires_grad_() for t in qkv()], torch.randn(4, 5, requires_grad=True)
    if way == "argument":
        attention(*tensors, normalizer, causal=True, backend="eager").square().sum().backward()
    else:
        with use_backend("eager"):
            attention(*tensors, normalizer, causal=True).square().sum().backward()
            p = normalizer.float()(scores)
            assert not c_rows.usable(scores, normalizer)
        p.square().sum().backward()
    assert not called


def test_eager_functions_never_call_a_kernel(called):
    with use_backend("eager"):
        multimax(torch.randn(3, 4), torch.ones(2), torch.zeros(2))
    assert not called


@needs_kernels
def test_the_argument_goes_before_the_context(called):
    with use_backend("eager"):
        attention(*qkv(), SoftMax(), backend="c")
        assert called == ["attention_forward"]
    with use_backend("c"):
        attention(*qkv(), SoftMax(), backend="eager")
    assert called == ["attention_forward"]


@needs_kernels
@pytest.mark.parametrize(
    ("normalizer", "functions"),
    [(MultiMax(order=3), []), (SparseMax(), ["threshold_forward"])],
)
def test_auto_takes_what_no_kernel_of_attention_computes_to_the_definition(
    called, normalizer, functions
):
    tensors = qkv()
    out = attention(*tensors, normalizer.double())
    assert called == functions
    assert_equal(out, attention(*tensors, normalizer, backend="eager"))


# What each is called with, and that it changes nothing.
HOOKS = {
    "register_forward_hook": lambda module, inputs, output: None,
    "register_forward_pre_hook": lambda module, inputs: None,
    "register_full_backward_hook": lambda module, grads, outer: None,
    "register_full_backward_pre_hook": lambda module, grads: None,
}


@needs_kernels
@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", [*MODULATED, *THRESHOLDS])
def test_auto_calls_hooks(called, register, name):
    tensors, normalizer, seen = qkv(), build(name), []
    expected = attended(tensors, normalizer, backend="eager")

    def hook(module, *arguments):
        seen.append(arguments)
        return HOOKS[register](module, *arguments)

    [t.requires_grad_() for t in tensors]
    handle = getattr(normalizer, register)(hook)
    attention(*tensors, normalizer).sum().backward()
    assert len(seen) == 1
    assert seen[0][0][0].shape == (2, 3, 9, 11)
    handle.remove()
    called.clear()
    assert_equal(attended(tensors, normalizer, backend="auto"), expected)
    assert any("attention" in function for function in called) == (name in MODULATED)
