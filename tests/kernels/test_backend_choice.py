"""Whose choice of a backend counts: threads, tasks, contexts that are not nested; no fall-back."""

import asyncio
import contextvars
import re
import threading
import warnings
from contextlib import ExitStack

import pytest
import torch
from definition import attended, build, normalized, qkv
from kernels_here import needs_kernels
from torch.nn.modules import module as torch_module

import multimax
from multimax import (
    EntMax,
    EntMax15,
    EvSoftMax,
    MultiMax,
    SoftMax,
    SparseMax,
    TopK,
    linear_output_loss,
    output_loss,
    use_backend,
)
from multimax.attention import attention
from multimax.kernels import backend, c_library
from multimax.kernels.backend import chosen_backend


def test_threads_choose_for_themselves():
    seen, step = {}, threading.Barrier(2)

    def overlap(name, first):
        step.wait()
        if not first:
            step.wait()
        with use_backend(name):
            if first:
                step.wait()
            step.wait()  # both are inside
            seen[name] = chosen_backend()
            if not first:
                step.wait()
        if first:  # which ends before the other
            step.wait()
        seen[f"{name} after"] = chosen_backend()

    with use_backend("triton"):
        threads = [
            threading.Thread(target=overlap, args=a) for a in (("c", True), ("eager", False))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert chosen_backend() == "triton"
    assert seen == {"c": "c", "eager": "eager", "c after": "auto", "eager after": "auto"}


def test_a_thread_with_the_context_of_another_has_its_choice():
    with use_backend("eager"):
        context = contextvars.copy_context()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(context.run(chosen_backend)))
    thread.start()
    thread.join()
    assert seen == ["eager"]


def test_tasks_choose_for_themselves():
    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return chosen_backend()

    async def both():
        return await asyncio.gather(task("c"), task("eager")), chosen_backend()

    assert asyncio.run(both()) == (["c", "eager"], "auto")


@pytest.mark.parametrize("names", [("eager", "c"), ("c", "c"), ("eager", "auto")])
def test_contexts_that_are_not_nested(names):
    first, second = ExitStack(), ExitStack()
    first.enter_context(use_backend(names[0]))
    second.enter_context(use_backend(names[1]))
    first.close()
    assert chosen_backend() == names[1]
    second.close()
    assert chosen_backend() == "auto"


@pytest.mark.slow
@needs_kernels
def test_a_compiled_function_chooses_for_itself():
    torch._dynamo.reset()
    graphs, normalizer = [], MultiMax(init="identity")

    def keep(graph_module, inputs):
        graphs.append({str(n.target) for n in graph_module.graph.nodes if "multimax" in str(n)})
        return graph_module

    def attend(*tensors):
        return attention(*tensors, SoftMax(), backend="eager"), chosen_backend()

    def normalize(x):
        with use_backend("eager"):
            return normalizer(x), chosen_backend()

    tensors = [t.float() for t in qkv()]
    out, after = torch.compile(attend, fullgraph=True, backend=keep)(*tensors)
    torch.testing.assert_close(out, attention(*tensors, SoftMax(), backend="eager"))
    p, inside = torch.compile(normalize, fullgraph=True, backend=keep)(tensors[0])
    torch.testing.assert_close(p, torch.softmax(tensors[0], -1))
    assert (after, inside, chosen_backend()) == ("auto", "eager", "auto")
    assert graphs
    assert not set().union(*graphs)


@pytest.mark.slow
def test_compiled_functions_keep_the_choice_where_torch_follows_no_context(monkeypatch):
    monkeypatch.setattr(backend, "READS_CONTEXT_VARIABLES", False)
    torch._dynamo.reset()
    compiled = torch.compile(chosen_backend, fullgraph=True, backend="eager")
    with use_backend("eager"):
        assert compiled() == "eager"
    assert compiled() == "eager"
    assert chosen_backend() == "auto"


SCORES = torch.linspace(-2, 2, 12).reshape(3, 4)
TARGET = torch.tensor([0, 1, 3])
TS = torch.zeros(6)


def linear(normalizer):
    return lambda: linear_output_loss(normalizer, SCORES, torch.eye(5, 4), TARGET)


# What a named backend cannot compute, and why.
ORDER = "it is no SoftMax of scores with a modulator of order <= 2"
ALPHA = "only alpha = 1.5 and alpha = 2 have a kernel"
NOT_IN_C = {
    "order 3": (lambda: MultiMax(3)(SCORES), ORDER),
    "function of order 3": (lambda: multimax.multimax(SCORES, TS, TS), ORDER),
    "entmax": (lambda: EntMax(1.3)(SCORES), ALPHA),
    "entmax of alpha 1": (lambda: EntMax(1.0)(SCORES), ALPHA),
    "learned entmax": (lambda: EntMax(1.5, learned=True)(SCORES), ALPHA),
    "function softmax": (lambda: multimax.softmax(SCORES), "the function has no kernel"),
    "loss of entmax": (lambda: output_loss(EntMax(1.3), SCORES, TARGET), ALPHA),
    "output layer of order 3": (linear(MultiMax(3)), ORDER),
    "output layer of top-k": (linear(TopK(2)), ORDER),
    "output layer of entmax": (linear(EntMax(1.3)), ALPHA),
    "nothing": (lambda: SoftMax()(SCORES[:0]), "there is nothing to compute"),
    "another device": (lambda: SoftMax()(SCORES.to("meta")), "the tensors are on meta"),
    "sparsemax elsewhere": (lambda: SparseMax()(SCORES.to("meta")), "the tensors are on meta"),
}
IN_C = {
    "softmax": lambda: SoftMax()(SCORES),
    "multimax": lambda: MultiMax()(SCORES),
    "function multimax": lambda: multimax.multimax(SCORES, TS[:4], TS[:4]),
    "sparsemax": lambda: SparseMax()(SCORES),
    "entmax15": lambda: EntMax15()(SCORES),
    "topk": lambda: TopK(2)(SCORES),
    "evsoftmax": lambda: EvSoftMax()(SCORES),
    "loss of sparsemax": lambda: output_loss(SparseMax(), SCORES, TARGET),
    "output layer": linear(MultiMax()),
    "output layer of entmax15": linear(EntMax15()),
}
NO_TRITON = "its kernels are attention and linear_output_loss"
NOT_ON_CPU = "the tensors are on cpu, it runs on CUDA"


def fails(backend, compute, reason):
    expected = rf"backend '{backend}' cannot compute .*: {re.escape(reason)}"
    with use_backend(backend), pytest.raises(ValueError, match=expected):
        compute()
    assert chosen_backend() == "auto"


@needs_kernels
@pytest.mark.parametrize("case", NOT_IN_C)
def test_c_never_falls_back(case):
    fails("c", *NOT_IN_C[case])


@needs_kernels
@pytest.mark.parametrize("case", IN_C)
def test_c_computes_by_kernels(monkeypatch, case):
    called, call = [], c_library.call
    monkeypatch.setattr(c_library, "call", lambda *a: called.append(a[1]) or call(*a))
    with use_backend("c"):
        result = IN_C[case]()
    assert called
    with use_backend("eager"):
        called.clear()
        torch.manual_seed(0)
        assert result.shape == IN_C[case]().shape
    assert not called


@pytest.mark.parametrize("case", [*NOT_IN_C, *IN_C])
def test_triton_never_falls_back(monkeypatch, case):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    compute = IN_C.get(case) or NOT_IN_C[case][0]
    reasons = {"output layer": NOT_ON_CPU}
    if case.startswith("output layer of"):
        reasons[case] = ORDER
    fails("triton", compute, reasons.get(case, NO_TRITON))


@pytest.mark.parametrize("backend", ["auto", "c", "triton"])
@pytest.mark.parametrize("normalizer", [SoftMax(), MultiMax(), EvSoftMax(), EntMax(1.0)], ids=repr)
def test_cross_entropy_has_one_form(normalizer, backend):
    with use_backend("eager"):
        expected = output_loss(normalizer, SCORES, TARGET)
    with use_backend(backend):
        assert output_loss(normalizer, SCORES, TARGET).equal(expected)


def test_named_backends_refuse_function_transforms():
    for normalizer in (MultiMax(), EntMax15()):
        for name in ("c", "triton"):
            loss = torch.func.vmap(lambda s, n=normalizer: linear(n)() + s.sum())
            fails(name, lambda f=loss: f(SCORES), "function transforms and torch.export need")


def test_the_backward_pass_keeps_to_the_backend_of_the_forward_pass(monkeypatch):
    features = SCORES.clone().requires_grad_()
    weight, seen = torch.eye(5, 4), []

    class Seeing(EvSoftMax):
        def logits(self, scores, dim=-1, mask=None):
            seen.append(chosen_backend())
            return super().logits(scores, dim, mask)

    loss = linear_output_loss(Seeing(), features, weight, TARGET, reduction="none")
    with use_backend("eager"):
        loss.sum().backward()
    assert seen == ["auto", "auto"]


GLOBAL_HOOKS = {
    torch_module.register_module_forward_hook: lambda module, inputs, output: None,
    torch_module.register_module_forward_pre_hook: lambda module, inputs: None,
    torch_module.register_module_full_backward_hook: lambda module, grads, outer: None,
    torch_module.register_module_full_backward_pre_hook: lambda module, grads: None,
}


@needs_kernels
@pytest.mark.parametrize("register", GLOBAL_HOOKS, ids=lambda register: register.__name__)
def test_hooks_of_all_modules_are_called(register):
    tensors, normalizer, seen = qkv(), build("multimax-2"), []
    expected = attended(tensors, normalizer, backend="eager")

    def hook(module, *arguments):
        seen.append((module, arguments))
        return GLOBAL_HOOKS[register](module, *arguments)

    handle = register(hook)
    try:
        out = attended(tensors, normalizer, backend="auto")
    finally:
        handle.remove()
    torch.testing.assert_close(out, expected)
    ((module, arguments),) = seen
    assert isinstance(module, MultiMax)
    assert arguments[0][0].shape == (2, 3, 9, 11)


@needs_kernels
@pytest.mark.parametrize("missing", [torch.float64, torch.float32])
def test_each_precision_has_a_library_of_its_own(monkeypatch, missing):
    """Without one of them, its tensors fall back; the others do not."""
    load, other = c_library._load, {torch.float64, torch.float32} - {missing}
    monkeypatch.setattr(c_library, "_load", lambda d: "no space" if d == missing else load(d))
    warn = c_library._warn_if_unavailable
    warn.cache_clear()
    called, call = [], c_library.call
    monkeypatch.setattr(c_library, "call", lambda *a: called.append(a[0]) or call(*a))
    half = torch.bfloat16
    tensors = [t.to(missing).requires_grad_() for t in qkv()]
    features = SCORES.to(missing).requires_grad_()
    weight = torch.eye(5, 4, dtype=missing)

    def compute_everything():
        for normalizer in (SoftMax(), MultiMax(), SparseMax(), EntMax15(), TopK(2), EvSoftMax()):
            normalizer.to(missing)(features).sum().backward()
            attention(*tensors, normalizer).sum().backward()
            linear_output_loss(normalizer, features, weight, TARGET).backward()

    with pytest.warns(UserWarning, match=f"CPU kernels for {missing}: no space") as caught:
        compute_everything()
    assert not called
    assert len([w for w in caught if "multimax" in str(w.message)]) == 1
    fails("c", lambda: SoftMax()(features), "no space")
    fails("c", lambda: attention(*tensors, SoftMax()), "no space")
    fails("c", lambda: linear_output_loss(SoftMax(), features, weight, TARGET), "no space")
    if missing == torch.float32:  # in which half precision is computed
        fails("c", lambda: SoftMax()(SCORES.to(half)), "no space")
        fails(
            "c", lambda: attention(*(t.detach().to(half) for t in tensors), SoftMax()), "no space"
        )
        wide = features.double(), weight.double()
        with torch.autocast("cpu", dtype=half):
            assert linear_output_loss(SoftMax(), *wide, TARGET).isfinite()
        assert not called
    (dtype,) = other
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use_backend("c"):
            normalized(MultiMax().to(dtype), SCORES.to(dtype), backend="c")
    assert set(called) == {dtype}
    warn.cache_clear()
