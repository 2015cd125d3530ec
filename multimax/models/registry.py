"""The models of each task by name; a new one is a file, a line here, and a YAML file."""

from collections.abc import Callable
from typing import Any

from torch import nn

from multimax.models.retrieval import AttentionClassifier, AttentionRegressor
from multimax.models.transformer import LanguageModel, TranslationModel
from multimax.models.vision import build_vision_transformer
from multimax.registry import build

Models = dict[str, Callable[..., nn.Module]]

IMAGE_CLASSIFIERS: Models = {"vision_transformer": build_vision_transformer}
LANGUAGE_MODELS: Models = {"transformer_lm": LanguageModel}
TRANSLATION_MODELS: Models = {"transformer": TranslationModel}
RETRIEVAL_MODELS: Models = {"attention_regressor": AttentionRegressor}
MAX_RETRIEVAL_MODELS: Models = {"attention_classifier": AttentionClassifier}


def build_model(models: Models, name: str, **options: Any) -> nn.Module:
    """A model with new weights.

    Args:
        models: one of the tables here.
        name: a key of it.
        options: arguments of its function or class.

    Raises:
        ValueError: see `multimax.registry.build`.
    """
    return build("model", models, name, options)
