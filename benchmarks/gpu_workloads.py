"""What `benchmarks.gpu` measures: attention, the output layer and DeiT-small in bf16."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import deit_step
from benchmarks.attention import HEAD_DIM, HEADS, STEPS
from benchmarks.formulations import official_attention, official_modulation
from benchmarks.timing import Workload
from multimax.attention import attention
from multimax.kernels.backend import use_backend
from multimax.losses import linear_output_loss, output_loss
from multimax.normalizers import Normalizer, build_normalizer

FEATURES = 512
COMPILED = "MultiMax, official, compiled"
FIXED = "FlexAttention, MultiMax of constants"  # it gives no gradients of more than one scalar
ATTENTION = (
    "SDPA",
    "FlexAttention, SoftMax",
    "SoftMax",
    "MultiMax",
    "MultiMax + log n, cap, sink",
    FIXED,
    "MultiMax, eager",
    "MultiMax, official",
    COMPILED,
)
OUTPUT = ("F.linear, F.cross_entropy", "SoftMax", "MultiMax", "MultiMax, eager")
DEIT = ("timm", "SoftMax", "MultiMax", "MultiMax, compiled", "MultiMax, official", COMPILED)


def attention_workload(name: str, tokens: int, batch: int, causal: bool, device: str) -> Workload:
    """Output and all gradients of (batch, 6, tokens, 64) tensors in bf16."""
    torch.manual_seed(0)
    shape = (batch, HEADS, tokens, HEAD_DIM)
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]
    upstream = torch.randn(shape, device=device, dtype=torch.bfloat16)
    options = STEPS[name.partition(" + ")[2]]
    kind = "multimax" if "MultiMax" in name else "softmax"
    normalizer = build_normalizer(kind, **options).to(device)
    leaves = [*(t.requires_grad_() for t in inputs), *normalizer.parameters()]
    function = _attention(name, normalizer, causal, tokens, device)

    def backward(out: Tensor) -> None:
        torch.autograd.backward(out, upstream)

    return Workload({"forward": lambda _: function(*inputs), "backward": backward}, leaves)


def _attention(
    name: str, normalizer: Any, causal: bool, tokens: int, device: str
) -> Callable[..., Tensor]:
    if name == "SDPA":
        return partial(F.scaled_dot_product_attention, is_causal=causal)
    if name.startswith("FlexAttention"):
        return _flex(normalizer, "MultiMax" in name, causal, tokens, device)
    if "official" in name:
        function = torch.compile(official_attention) if name == COMPILED else official_attention
        return lambda q, k, v: function(q, k, v, normalizer.ts, normalizer.ranges, causal)
    backend = "eager" if name.endswith("eager") else "auto"
    return partial(attention, normalizer=normalizer, causal=causal, backend=backend)


def _flex(
    normalizer: Any, modulated: bool, causal: bool, tokens: int, device: str
) -> Callable[..., Tensor]:
    """torch's attention over any function of a score, with the modulation as that function."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device)

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    constants = [scalars.detach() for scalars in normalizer.parameters()]

    def modulate(score: Tensor, *_: Tensor) -> Tensor:
        return official_modulation(score, *constants)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not modulated:
            return compiled(query, key, value, block_mask=mask)
        return compiled(query, key, value, score_mod=modulate, block_mask=mask)

    return attend


def output_workload(name: str, vocabulary: int, tokens: int, device: str) -> Workload:
    """Mean loss of (tokens, 512) features in bf16, and all gradients."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    features = torch.randn(tokens, FEATURES, **options).requires_grad_()
    weight = (torch.randn(vocabulary, FEATURES, **options) / FEATURES**0.5).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device)
    normalizer = build_normalizer("multimax" if "MultiMax" in name else "softmax").to(device)

    def forward(_: Any) -> Tensor:
        if name == OUTPUT[0]:
            return F.cross_entropy(F.linear(features, weight), target)
        with use_backend("eager" if name.endswith("eager") else "auto"):
            return linear_output_loss(normalizer, features, weight, target)

    leaves = [features, weight, *normalizer.parameters()]
    return Workload({"forward": forward, "backward": lambda loss: loss.backward()}, leaves)


def deit_workload(name: str, batch: int, image_size: int, depth: int, device: str) -> Workload:
    """A training step of DeiT-small on random images under bf16 autocast, with fused AdamW."""
    torch.manual_seed(1)
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    target = torch.randint(deit_step.CLASSES, (batch,), device=device)
    compiled = name.endswith(", compiled")
    model = deit_step.build(name.removesuffix(", compiled"), image_size, depth).to(device).train()
    call = torch.compile(model) if compiled else model
    output = getattr(model, "output", None)
    output = output if isinstance(output, Normalizer) else None  # timm has none
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def forward(_: Any) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = call(images)
            if output is None:
                return F.cross_entropy(logits, target)
            return output_loss(output, logits, target)

    phases = {
        "forward": forward,
        "backward": lambda loss: loss.backward(),
        "optimizer": lambda _: optimizer.step(),
    }
    return Workload(phases, list(model.parameters()))
