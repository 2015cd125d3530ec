"""Where a model has attention, and how a normalizer gets there.

Modules of transformers that ask its interface for their attention go by `transformers_route`, all
others by `interception`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from multimax.normalizers import Normalizer
from multimax.replacement import diffusers_route, plain_torch, transformers_route
from multimax.replacement.classes import (
    AttentionClass,
    defining_class,
    known_module,
    lets_normalize,
    normalizes,
    qualified_name,
)
from multimax.replacement.interception import guarded, original_class

UNKNOWN = (
    "its code has SoftMax or attention, but the class is not known: name the module in skip= to "
    "keep its SoftMax, or the class in also= if one forward pass normalizes exactly once, scores "
    "over keys"
)
HOOKED = (
    "its forward was exchanged on the instance, as hooks of accelerate and diffusers do: replace "
    "SoftMax before"
)


@dataclass(frozen=True)
class Found:
    """A module with SoftMax.

    Args:
        name: in the model.
        module: itself.
        install: puts a normalizer in, given `bias_place`.
        obstacle: why that cannot be done right, None if it can.
        left: why it is not to be replaced, None if it is.
    """

    name: str
    module: Any
    install: Callable[[Normalizer, str], None]
    obstacle: str | None = None
    left: str | None = None

    @property
    def kind(self) -> str:
        """The class of the module, in full."""
        return qualified_name(type(self.module))


def find(model: nn.Module, also: Collection[type], bias_place: str) -> list[Found]:
    """All modules of a model that normalize, the outermost of nested ones.

    Args:
        model: of any library.
        also: classes, of processors too, to take as attention though they are not known.
        bias_place: that is asked for.
    """
    found: list[Found] = []
    for name, module, kind in _outermost(model, lambda module: _describe(module, also)):
        obstacle = kind.refused or _bias_obstacle(kind, bias_place)
        if obstacle is None and transformers_route.asks_interface(type(module)):
            obstacle = transformers_route.obstacle(module)
        elif obstacle is None and "forward" in vars(module):
            obstacle = HOOKED
        if kind.not_attention is None and obstacle is None and hasattr(module, "normalizer"):
            obstacle = "it has an attribute `normalizer` already"
        found.append(Found(name, module, _installer(module, kind), obstacle, kind.not_attention))
    return found


def _bias_obstacle(kind: AttentionClass, place: str) -> str | None:
    """Why the bias of an attention class cannot be added where it is asked for."""
    if kind.biased_scores and kind.finite_mask:
        return "it masks by adding -100 to its scores, which a modulator could lift"
    if kind.biased_scores and place == "after":
        return (
            "its SoftMax gets scores with a bias in them, so that the bias would be modulated too: "
            'allow that by bias_place="before"'
        )
    if kind.finite_mask and place == "before":
        return 'it masks by adding -100, which a modulator could lift: use bias_place="after"'
    return None


def restore(model: nn.Module) -> int:
    """Give every module its own SoftMax back; the number of normalizers taken out."""
    count = 0
    transformers_route.switch_off(model)
    diffusers_route.forget(model)
    for module in list(model.modules()):
        if is_replaced(module):
            module.__class__ = original_class(module) or type(module)
            count += isinstance(module._modules.pop("normalizer", None), Normalizer)
            vars(module).pop("bias_place", None)
            if vars(module).pop("unfused", False):
                module.fused_attn = False  # pyright: ignore[reportArgumentType]
        vars(module).pop("keeps_softmax", None)
    return count


def finish(model: nn.Module, left: Collection[nn.Module], arguments: Mapping[str, Any]) -> None:
    """What a model as a whole needs once its modules have their normalizers.

    Args:
        model: all of it.
        left: modules that keep their SoftMax.
        arguments: of `replace_softmax`, which saved models carry.
    """
    for module in left:
        if transformers_route.asks_interface(type(module)):
            module.keeps_softmax = True  # pyright: ignore[reportArgumentType]
    for module in model.modules() if arguments["attention"] else ():
        if isinstance(module, plain_torch.FUSED) and not is_replaced(module):
            module.__class__ = guarded(type(module))
    transformers_route.switch_on(model)
    transformers_route.record(model, arguments)
    diffusers_route.record(model, arguments)


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Let every module normalize as its library wrote it, inside a `with` block."""
    replaced = [(m, type(m)) for m in model.modules() if original_class(m) is not None]
    for module, _ in replaced:
        module.__class__ = original_class(module)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with transformers_route.suspended(model):
            yield
    finally:
        for module, cls in replaced:
            module.__class__ = cls


def is_replaced(module: nn.Module) -> bool:
    """Whether a normalizer has been put into a module."""
    return original_class(module) is not None or transformers_route.is_replaced(module)


def _outermost(
    model: nn.Module, describe: Callable[[nn.Module], AttentionClass | None]
) -> Iterator[tuple[str, nn.Module, AttentionClass]]:
    """The modules that are described and in no other such one, each once, with their names."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, AttentionClass]]:
        if module in seen:
            return
        seen.add(module)
        kind = describe(module)
        if kind is not None:
            yield name, module, kind
            return
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, "")


def _describe(module: nn.Module, also: Collection[type]) -> AttentionClass | None:
    """What is known of a module that normalizes; None if it does not."""
    cls = type(module)
    if isinstance(module, Normalizer) or transformers_route.is_model(module):
        return None
    known = known_module(module)
    if {defining_class(cls), cls, type(getattr(module, "processor", None))} & set(also):
        return AttentionClass(intercept=(known or AttentionClass()).intercept)
    if known is None and transformers_route.asks_interface(cls):
        return AttentionClass()
    if known is None and (normalizes(cls) or lets_normalize(module)):
        other = transformers_route.not_attention(module)
        if other is not None:
            return AttentionClass(not_attention=other)
        return AttentionClass(refused=UNKNOWN)
    return None if known is not None and known.container else known


def _installer(module: Any, kind: AttentionClass) -> Callable[[Normalizer, str], None]:
    def install(normalizer: Normalizer, bias_place: str) -> None:
        if transformers_route.asks_interface(type(module)):
            transformers_route.install(module, normalizer, bias_place)
            return
        module.normalizer = normalizer
        module.bias_place = bias_place
        if hasattr(module, "fused_attn"):  # timm: torch's attention, which gets the bias apart
            module.unfused, module.fused_attn = not module.fused_attn, True
        kind.intercept(module)

    return install
