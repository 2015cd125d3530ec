"""What a checkpoint holds, and what is checked before one is taken over."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multimax.files import load_checkpoint
from multimax.training.optimization import normalizer_parameters
from multimax.training.sharding import as_optimizer_state_of, as_state_of, gathered

CHECKPOINT_FORMAT = 2
WEIGHTS = ("format", "fingerprint", "inputs", "position", "model", "ema")
# What resuming needs.
STATE = (*WEIGHTS, "updates_per_epoch", "optimizer_name", "optimizer", "scaler", "random_states")
# Settings of a group of parameters that the configuration decides, not the checkpoint.
GROUP_SETTINGS = ("lr", "lr_scale", "initial_lr", "weight_decay", "eps", "betas", "momentum")
AFRESH = "start from its weights with weights={path}, or start afresh with resume=never"


@dataclass
class Position:
    """How far a run has come: it begins again exactly here."""

    update: int = 0
    epoch: int = 0
    epoch_update: int = 0  # updates of this epoch that are done
    seconds: float = 0.0  # of training, over all processes that had a part in it
    best: float | None = None
    best_update: int = 0
    due: bool = False  # the evaluation after this update has not been done
    origin: str = ""  # the checkpoint of another run that this one began with


@dataclass(frozen=True)
class Inputs:
    """What a run was given beside its settings, by content: it does not matter where that lies.

    Attributes:
        data: fingerprint of the data.
        weights: digest of the file that `weights` names, if it names one.
    """

    data: str
    weights: str | None = None


def check_inputs(recorded: Any, inputs: Inputs, path: Path, own: bool = True) -> None:
    """Raise ValueError for a result or a checkpoint of other data, or of other first weights.

    Args:
        recorded: the inputs as `path` has them.
        inputs: those of this run.
        path: for messages.
        own: the file is this run's own; else it may have begun with other weights.
    """
    if not isinstance(recorded, Mapping) or not {"data", "weights"} <= recorded.keys():
        raise ValueError(f"{path} does not say which data it is of: {_remedy(path)}")
    if recorded["data"] != inputs.data:
        raise ValueError(
            f"{path} is of other data (fingerprint {recorded['data']}) than that of the "
            f"configuration ({inputs.data}): give that data (data.root=...), choose another name= "
            f"or output_dir= for a run on this data, or {_remedy(path)}"
        )
    if own and recorded["weights"] != inputs.weights:
        raise ValueError(
            f"{path} began with other weights (digest {recorded['weights']}) than the file of "
            f"`weights` holds now ({inputs.weights}): {_remedy(path)}"
        )


def _remedy(path: Path) -> str:
    return (
        "resume=never keeps it aside and runs again"
        if path.suffix == ".json"
        else AFRESH.format(path=path)
    )


def weights(
    model: nn.Module,
    ema: nn.Module | None,
    position: Position,
    fingerprint: str,
    inputs: Inputs,
    keep: bool,
) -> dict[str, Any]:
    """The part of a checkpoint that evaluation needs.

    Args:
        model: the network.
        ema: the averaged network, or None.
        position: where training is.
        fingerprint: see `Task`.
        inputs: of the run.
        keep: whether this process wants sharded weights, see `gathered`.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "fingerprint": fingerprint,
        "inputs": asdict(inputs),
        "position": asdict(position),
        "model": gathered(model.state_dict(), keep),
        "ema": None if ema is None else gathered(ema.state_dict(), keep),
    }


def load_weights(
    model: nn.Module, ema: nn.Module | None, state: dict[str, Any], fingerprint: str, path: Path
) -> None:
    """Put the weights of a checkpoint into the networks.

    Args:
        model, ema, fingerprint: as in `weights`.
        state: the content of the checkpoint.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: it is of another vocabulary or model, or only one of the two has an EMA.
    """
    _check_vocabulary(state, fingerprint, path)
    if (state["ema"] is None) != (ema is None):
        raise ValueError(
            f"{path} was written {'without' if state['ema'] is None else 'with'} EMA: "
            "set trainer.ema_decay as it was, or start afresh with resume=never"
        )
    try:
        model.load_state_dict(as_state_of(model, state["model"]))
        if ema is not None:
            ema.load_state_dict(as_state_of(ema, state["ema"]))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} does not fit the configured model: {error}. Use the configuration that it "
            "was trained with, or start afresh with resume=never"
        ) from error


def _check_vocabulary(state: dict[str, Any], fingerprint: str, path: Path) -> None:
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} was trained with another vocabulary: give the data that it was trained "
            "on, or start without it (resume=never, weights=null)"
        )


def load_initial_weights(model: nn.Module, path: Path, fingerprint: str) -> str:
    """Put the weights of a checkpoint into a model that is still to be trained.

    It can be a last.pt or best.pt (of which it is the trained weights, not their average), a
    converted checkpoint of fairseq, or one of the official code of MultiMax. Scalars of normalizers
    that it lacks stay as they are, so that a model with SoftMax can go on with MultiMax.

    Args:
        model: changed in place.
        path: of the checkpoint.
        fingerprint: see `Task`; only checkpoints of this project have one.

    Returns:
        What was loaded, for a reader.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, of another vocabulary, or of another model.
    """
    content = load_checkpoint(path)
    if "fingerprint" in content:
        _check_vocabulary(content, fingerprint, path)
    ids = {id(parameter) for parameter in normalizer_parameters(model)}
    named = model.named_parameters(remove_duplicate=False)  # layers may share scalars
    scalars = {name for name, parameter in named if id(parameter) in ids}
    found = content["model"] if isinstance(content.get("model"), dict) else content
    found = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"weights={path} holds no weights, neither at its top nor under 'model'")
    try:
        missing, unexpected = model.load_state_dict(found, strict=False)
    except (RuntimeError, ValueError) as error:  # of another shape, or tied here alone
        raise ValueError(f"weights={path} does not fit the configured model: {error}") from error
    lacking = [name for name in missing if name not in scalars]
    if lacking or unexpected:
        raise ValueError(
            f"weights={path} does not fit the configured model: {len(lacking)} weights are missing "
            f"there ({', '.join(lacking[:3])}), {len(unexpected)} are not known here "
            f"({', '.join(unexpected[:3])}); use the model and the normalizers that it was "
            "trained with"
        )
    kept = f"; {len(missing)} normalizer scalars as configured" if missing else ""
    return f"weights of {path}{kept}"


def check_complete(state: dict[str, Any], path: Path) -> None:
    """Raise ValueError for a checkpoint that cannot be resumed from."""
    missing = set(STATE) - set(state)
    if missing or state["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} cannot be resumed (missing: {', '.join(sorted(missing)) or 'nothing'}; "
            f"format {state.get('format')}, expected {CHECKPOINT_FORMAT}): give a last.pt "
            f"of this version, {AFRESH.format(path=path)}"
        )


def check_position(
    state: dict[str, Any], path: Path, updates_per_epoch: int, total: int, by_epochs: bool
) -> Position:
    """The position of a checkpoint, which must lie within the length of this run.

    Args:
        state: the content of the checkpoint.
        path: of the checkpoint, for messages.
        updates_per_epoch: of this run.
        total: updates of this run.
        by_epochs: its length is given in epochs.

    Raises:
        ValueError: it has more updates than this run is to have, or its epochs had another length.
    """
    try:
        position = Position(**state["position"])
    except TypeError as error:
        raise ValueError(
            f"{path} is damaged ({error}): give another last.pt, {AFRESH.format(path=path)}"
        ) from error
    there = state["updates_per_epoch"]
    if there != updates_per_epoch and (by_epochs or position.epoch_update):
        raise ValueError(
            f"an epoch has {there} updates in {path} and {updates_per_epoch} here: set "
            "trainer.batch_size and the number of processes as they were, or "
            f"{AFRESH.format(path=path)}"
        )
    if position.update > total:
        raise ValueError(
            f"{path} has {position.update} updates, more than the {total} of this run: set "
            f"trainer.{'epochs' if by_epochs else 'updates'} to as many, or "
            f"{AFRESH.format(path=path)}"
        )
    return position


def restore_optimizer(
    optimizer: torch.optim.Optimizer, name: str, state: dict[str, Any], path: Path
) -> None:
    """Take over the running means of an optimizer; its settings stay those of the configuration.

    Args:
        optimizer: as it was built; changed in place.
        name: of the configuration.
        state: the content of the checkpoint.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: the checkpoint is of another optimizer.
    """
    if state["optimizer_name"] != name:
        raise ValueError(
            f"optimizer.name={name}, but {path} was trained with {state['optimizer_name']}, whose "
            f"state is another one: set optimizer.name={state['optimizer_name']}, or "
            f"{AFRESH.format(path=path)}"
        )
    configured = [
        {key: group[key] for key in GROUP_SETTINGS if key in group}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(as_optimizer_state_of(optimizer, state["optimizer"]))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"the optimizer of {path} does not fit ({error}): set optimizer.filter_bias_and_bn, "
            f"optimizer.decay_scalars and the model as they were, or {AFRESH.format(path=path)}"
        ) from error
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
