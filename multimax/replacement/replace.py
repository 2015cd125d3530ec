"""Putting a normalizer into a model, and taking it out again."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from multimax.models.sharing import share_scalars, take_shared
from multimax.normalizers import Normalizer, build_for_attention
from multimax.parameters import normalizer_parameters
from multimax.replacement import heads, routes
from multimax.replacement.classes import HEAD_DIM, HEADS, size_of
from multimax.replacement.heads import like_weights
from multimax.replacement.report import Entry, Replacement
from multimax.replacement.routes import Found


def replace_softmax(
    model: nn.Module,
    name: str = "multimax",
    *,
    attention: bool = True,
    output: bool = False,
    skip: str | Sequence[str] = (),
    also: Collection[type] = (),
    bias_place: str = "after",
    **options: Any,
) -> Replacement:
    """Put another normalizer in the place of SoftMax, in a model of any library.

        report = replace_softmax(model, "multimax")  # starts as SoftMax: the outputs do not change
        print(report)

    Every attention layer gets a normalizer of its own, as `layer.normalizer`; its scalars are
    parameters of the model. The classes of the layers become subclasses of what they were.
    Nothing is changed if anything is refused.

    Args:
        model: changed in place.
        name: one of `registered_normalizers()`.
        attention: replace the SoftMax of attention.
        output: modulate the scores of the classes or words, so that SoftMax and cross-entropy of
            what the model returns are those of the normalizer.
        skip: names of modules that keep their SoftMax, with wildcards such as "decoder.*".
        also: classes of modules, or of processors of diffusers, to take as attention though they
            are not known here: one forward pass must normalize exactly once, scores over keys.
        bias_place: where a bias of the scores (relative positions, ALiBi) is added, "after" the
            modulation or "before" it.
        options: of the normalizer. `init` is "identity" unless given: multimax starts as SoftMax.
            Also "before_scale" and "shared", as in the experiments.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        ValueError: the model has SoftMax that cannot be replaced right (all such modules are
            named), none at all, or another normalizer already; or an option is bad.
    """
    options = {"name": name, **({"init": "identity"} if name == "multimax" else {}), **options}
    if bias_place not in ("after", "before"):
        raise ValueError(f"bias_place must be 'after' or 'before', got {bias_place!r}")
    if not attention and not output:
        raise ValueError("attention=False and output=False leave nothing to replace")
    _check_unreplaced(model)
    own, shared = take_shared(options)
    patterns = [skip] if isinstance(skip, str) else list(skip)
    layers, left = _choose(model, patterns, also, bias_place) if attention else ([], [])
    normalizers = [_for_layer(own, layer.module) for layer in layers]
    head = heads.find(model, own) if output else None
    for layer, normalizer in zip(layers, normalizers, strict=True):
        layer.install(normalizer, bias_place)
    if shared:
        share_scalars(model, (layer.module for layer in layers))
    if head is not None:
        head.install()
    arguments = {**options, "attention": attention, "output": output, "bias_place": bias_place}
    arguments["skip"] = [found.name for found in left if not found.left]
    try:
        routes.finish(model, [found.module for found in left], arguments)
    except ValueError:
        restore_softmax(model)
        raise
    return Replacement(
        attention=[Entry(f.name, f.kind, repr(f.module.normalizer)) for f in layers],
        output=[Entry(head.name, head.kind, repr(head.normalizer))] if head else [],
        left=[Entry(f.name, f.kind, f.left or "skipped") for f in left],
        parameters=sum(parameter.numel() for parameter in normalizer_parameters(model)),
    )


def restore_softmax(model: nn.Module) -> int:
    """Undo `replace_softmax`: every module normalizes as its library wrote it, without scalars.

    Args:
        model: changed in place; one without replacements is left as it is.

    Returns:
        How many normalizers were taken out.
    """
    return routes.restore(model)


def _check_unreplaced(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the model'} is compiled by TorchScript: use the original")
        if routes.is_replaced(module):
            raise ValueError(
                f"{name or 'the model'} has another normalizer already: restore_softmax(model) "
                "takes it out"
            )


def _choose(
    model: nn.Module, skip: Sequence[str], also: Collection[type], bias_place: str
) -> tuple[list[Found], list[Found]]:
    """The modules to replace and those to leave; ValueError if that cannot be done right."""
    layers: list[Found] = []
    left: list[Found] = []
    refused: list[str] = []
    found = routes.find(model, also, bias_place)
    for pattern in skip:
        if not any(fnmatch(module.name, pattern) for module in found):
            names = ", ".join(module.name for module in found[:5])
            raise ValueError(f"skip={pattern!r} is no module that normalizes; such are: {names}")
    for module in found:
        if module.left or any(fnmatch(module.name, pattern) for pattern in skip):
            left.append(module)
        elif module.obstacle:
            refused.append(f"{module.name} ({module.kind}): {module.obstacle}")
        else:
            layers.append(module)
    if refused:
        shown = refused[:5] + ([f"and {len(refused) - 5} more"] if len(refused) > 5 else [])
        raise ValueError("these modules cannot be replaced right: " + "; ".join(shown))
    if not layers:
        reasons = dict.fromkeys(f"{module.kind}: {module.left or 'skipped'}" for module in left)
        raise ValueError(
            f"{type(model).__name__} has no attention layer to replace: name the class of its "
            f"attention in also={''.join(f'; {reason}' for reason in reasons)}"
        )
    return layers, left


def _for_layer(options: Mapping[str, Any], layer: nn.Module) -> Normalizer:
    """A normalizer for one attention layer, on its device; its scalars are fp32 or wider."""
    num_heads, head_dim = size_of(layer, HEADS), size_of(layer, HEAD_DIM)
    scaling = getattr(layer, "scaling", None)
    if options.get("before_scale") and isinstance(scaling, float):  # not always head_dim**-0.5
        options = {**options, "before_scale": False, "score_scale": scaling}
    if options.get("before_scale") and head_dim is None:
        raise ValueError(
            f"before_scale needs the head dimension, which {type(layer).__name__} does not tell: "
            "give score_scale=head_dim**-0.5"
        )
    normalizer = build_for_attention(options, num_heads or options.get("heads") or 1, head_dim or 1)
    return like_weights(normalizer, layer)
