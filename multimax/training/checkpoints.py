"""What a checkpoint holds, and what is checked before one is taken over."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

CHECKPOINT_FORMAT = 1
WEIGHTS = ("format", "fingerprint", "position", "model", "ema")
STATE = (*WEIGHTS, "optimizer", "scaler", "random_states")  # what resuming needs


@dataclass
class Position:
    """How far a run has come: it begins again exactly here."""

    update: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this process already drawn in this epoch
    seconds: float = 0.0  # of training, over all processes that had a part in it
    best: float | None = None
    best_update: int = 0


def weights(
    model: nn.Module, ema: nn.Module | None, position: Position, fingerprint: str
) -> dict[str, Any]:
    """The part of a checkpoint that evaluation needs.

    Args:
        model: the network.
        ema: the averaged network, or None.
        position: where training is.
        fingerprint: see `Task`.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "fingerprint": fingerprint,
        "position": asdict(position),
        "model": model.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
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
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} was trained with another vocabulary: give the data that it was trained "
            "on, or start afresh with resume=never"
        )
    if (state["ema"] is None) != (ema is None):
        raise ValueError(
            f"{path} was written {'without' if state['ema'] is None else 'with'} EMA: "
            "set trainer.ema_decay as it was, or start afresh with resume=never"
        )
    try:
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the configured model: {error}. Use the configuration that it "
            "was trained with, or start afresh with resume=never"
        ) from error


def check_complete(state: dict[str, Any], path: Path) -> None:
    """Raise ValueError for a checkpoint that cannot be resumed from."""
    missing = set(STATE) - set(state)
    if missing or state["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} cannot be resumed (missing: {', '.join(sorted(missing)) or 'nothing'}; "
            f"format {state.get('format')}, expected {CHECKPOINT_FORMAT}): give a last.pt "
            "of this version, or start afresh with resume=never"
        )
