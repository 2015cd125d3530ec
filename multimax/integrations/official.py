"""Checkpoint files of the official MultiMax code (vision); see `multimax.models.official_names`."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from multimax.models.official_names import rename_official_keys


def load_official_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint file of the official code into a model of `build_vision_transformer`.

    The weights may be wrapped as `{"model": ...}` (the trained weights are taken, not the averaged
    ones) and carry DDP's "module." prefix. Nothing in the file is executed.

    Args:
        model: changed in place; unchanged if an error is raised.
        path: the .pth file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or does not fit the model; the message says which
            option of the model to change.
    """
    state_dict = _read(Path(path))
    rename_official_keys(model, state_dict, "")
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state_dict), sorted(state_dict.keys() - own)
    reshaped = [
        f"{key} is {tuple(state_dict[key].shape)} there and {tuple(own[key].shape)} here"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    if missing or unexpected or reshaped:
        problems = [
            *(f"{key} is missing there" for key in missing),
            *(f"{key} does not exist here" for key in unexpected),
            *reshaped,
        ]
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        hints = _hints(state_dict, own)
        raise ValueError(
            f"{path} does not fit the model: {' and '.join(hints) or shown}. ({shown})"
        )
    model.load_state_dict(state_dict)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give the path of a .pth file")
    try:
        # The official training script stores its command-line arguments beside the weights.
        known = argparse.Namespace in torch.serialization.get_safe_globals()  # and stays it
        with torch.serialization.safe_globals([] if known else [argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict, neither at the top nor under 'model'")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _hints(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[str]:
    """What to change in the model's options, one phrase for each known cause of a mismatch."""
    hints = []

    def both(key: str) -> bool:
        return key in theirs and key in ours

    def present_in_one(key: str, there: str, here: str) -> None:
        if (key in theirs) != (key in ours):
            hints.append(there if key in theirs else here)

    if both("head.weight") and len(theirs["head.weight"]) != len(ours["head.weight"]):
        hints.append(
            f"it has {len(theirs['head.weight'])} classes, the model {len(ours['head.weight'])} "
            "(num_classes)"
        )
    present_in_one(
        "cls_token",
        "it has a class token, the model none (class_token=True)",
        "the model has a class token, it has none (class_token=False)",
    )
    present_in_one(
        "blocks.0.attn.qkv.bias",
        "it has a query-key-value bias, the model none (qkv_bias=True)",
        "the model has a query-key-value bias, it has none (qkv_bias=False)",
    )
    present_in_one(
        "norm.weight",
        "it normalizes before pooling (norm='norm_then_pool')",
        "it does not normalize before pooling (norm='pool_then_norm')",
    )
    present_in_one(
        "blocks.0.attn.normalizer.ts",
        "its attention is MultiMax, the model's is not (attention={'name': 'multimax'})",
        "the model's attention is MultiMax, its is not (attention={'name': 'softmax'})",
    )
    present_in_one(
        "output.ts",
        "its output is MultiMax, the model's is not (output={'name': 'multimax'})",
        "the model's output is MultiMax, its is not (output={'name': 'softmax'})",
    )
    return hints
