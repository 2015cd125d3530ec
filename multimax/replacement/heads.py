"""Output layers whose scores are modulated, so that SoftMax of them is the normalizer's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimax.normalizers import (
    LogitNormalizer,
    ModulatedSoftMax,
    Normalizer,
    build_preserving_rng,
)
from multimax.normalizers.base import check_has_loss
from multimax.replacement.classes import qualified_name
from multimax.replacement.interception import derive
from multimax.replacement.transformers_route import head_obstacle

# Where libraries keep the linear layer that makes the scores of classes or words.
HEADS = ("lm_head", "classifier", "score", "head", "heads.head", "fc", "qa_outputs")


@dataclass
class Head:
    """The linear layer of a model that makes its scores."""

    name: str
    module: Any
    normalizer: Normalizer

    @property
    def kind(self) -> str:
        """The class of the layer, in full."""
        return qualified_name(type(self.module))

    def install(self) -> None:
        """Let the layer modulate what it returns."""
        self.module.normalizer = self.normalizer
        self.module.__class__ = derive(type(self.module), _modulated_forward)


def find(model: nn.Module, options: Mapping[str, Any]) -> Head:
    """The output layer of a model, with the normalizer that `options` describe.

    Raises:
        ValueError: the normalizer is not SoftMax of some logits, or no such layer is known.
    """
    own = {name: value for name, value in options.items() if name not in ("before_scale", "heads")}
    normalizer = build_preserving_rng(own)
    if not isinstance(normalizer, LogitNormalizer):
        raise ValueError(
            f"output=True: {options['name']} is not SoftMax of other scores, so that cross-entropy "
            "is not its loss: use multimax.output_loss(normalizer, scores, target) in your training"
        )
    check_has_loss(normalizer)
    layer = output_layer(model)
    if layer is None:
        raise ValueError(
            f"output=True: {type(model).__name__} has no output layer that is known: put "
            "normalizer.logits(scores) behind it yourself"
        )
    obstacle = head_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"output=True: {type(model).__name__}: {obstacle}")
    names = {module: name for name, module in model.named_modules()}
    single = isinstance(normalizer, ModulatedSoftMax) and normalizer.length_scale is None
    if names[layer] == "qa_outputs" and not single:
        raise ValueError(
            "output=True: SoftMax of qa_outputs is over positions, which its layer does not see; "
            f"only a modulation of single scores can be put there, {options['name']} is none"
        )
    return Head(names[layer], layer, like_weights(normalizer, layer))


def output_layer(model: nn.Module) -> nn.Module | None:
    """The linear layer that makes the scores of classes or words; None if none is known."""
    for method in ("get_output_embeddings", "get_classifier"):
        layer = getattr(model, method, lambda: None)()
        if isinstance(layer, nn.Linear):
            return layer
    for name in HEADS:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return layer
    return None


def like_weights(normalizer: Normalizer, layer: nn.Module) -> Normalizer:
    """A normalizer where the weights of a layer are, in their dtype but not below fp32."""
    for weight in layer.parameters():
        if weight.is_floating_point():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return normalizer.to(weight.device, dtype).train(layer.training)
    return normalizer.train(layer.training)


def _modulated_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    scores = type(self).replaced_class.forward(self, *args, **kwargs)
    return self.normalizer.logits(scores).to(scores.dtype)
