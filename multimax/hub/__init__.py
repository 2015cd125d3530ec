"""Trained models as folders of config.json and model.safetensors, here or on the Hugging Face Hub.

    published = PublishedModel.from_run("outputs/small/lm_multimax/RUN")
    published.save_pretrained("FOLDER")
    published.push_to_hub("USER/NAME")
    published = PublishedModel.from_pretrained("FOLDER")          # or "USER/NAME"

Nothing that such a folder holds is executed: weights are safetensors, all else is JSON and text.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from multimax.files import write_atomically, write_json
from multimax.hub import vocabulary as vocabulary_files
from multimax.hub.card import PIPELINES, model_card
from multimax.hub.facts import facts_of
from multimax.hub.vocabulary import load_vocabulary, save_vocabulary
from multimax.models.registry import build_model
from multimax.registry import look_up
from multimax.tasks import TASKS
from multimax.training.config import Config
from multimax.training.trained import TrainedModel, changed, load_finished_run, load_run

__all__ = ["PublishedModel", "load_model"]

CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", 1
FILES = (CONFIG, WEIGHTS, "README.md", *vocabulary_files.FILES)
ON_HUB = "hf-hub:"  # before the name of a model on the Hub, where a path could be meant too
AGAIN = "copy or download it again"


class PublishedModel(nn.Module, PyTorchModelHubMixin, library_name="multimax"):
    """A model of this project that can be saved, loaded and pushed to the Hub.

    Its weights in model.safetensors have the names that timm, fairseq and the official code give
    them; a tensor that two layers share is there once.

    Args:
        task: what it is for, a key of `multimax.tasks.TASKS`.
        model: name and all options of the model, as `multimax.models.registry.build_model` takes
            them.
        run: facts of its training, see `multimax.hub.facts`.

    Attributes:
        network: the model itself; `network.output` is its output layer.
        vocabulary: of a language model (`Vocabulary`), or of a translation model (`Languages`).

    Raises:
        ValueError: there is no such task or model, or an option is out of range.
    """

    def __init__(
        self,
        task: str,
        model: Mapping[str, Any],
        run: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.task: str = task
        self.options: dict[str, Any] = dict(model)
        self.vocabulary: Any = None
        self.run: dict[str, Any] = dict(run or {})
        self.network: nn.Module = build_model(look_up("task", TASKS, task).models, **self.options)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the network makes of its inputs: scores of an image, features of a text."""
        return self.network(*inputs)

    @classmethod
    def from_run(
        cls, folder: str | Path, *, license: str = "apache-2.0", averaged: bool = False
    ) -> "PublishedModel":
        """The model of a finished run, with the weights that its result is of.

        Args:
            folder: of the run.
            license: of the weights, in the words of the Hub; that of the data may bind you.
            averaged: publish the averaged weights, where the run has them.

        Raises:
            FileNotFoundError, ValueError: as `load_finished_run`; or there is no average, or the
                task is a synthetic one.
        """
        trained, result = load_finished_run(folder)
        if result["task"] not in PIPELINES:
            raise ValueError(
                f"{folder} was trained for {result['task']}, a synthetic task: publish a run of "
                f"{', '.join(PIPELINES)}"
            )
        if averaged and trained.averaged is None:
            raise ValueError(
                f"{folder} has no averaged weights: it ran with trainer.ema_decay=null"
            )
        weights = trained.averaged if averaged else trained.model.state_dict()
        task = result["task"]
        options = TASKS[task].model_options(trained.config, trained.source)
        facts = facts_of(trained, result, license, averaged)
        published = cls(task, _as_json(options), facts)
        published.vocabulary = trained.vocabulary
        published.network.load_state_dict(weights or {})
        return published.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> "PublishedModel":
        """A published model in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub.
            options: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

        Raises:
            FileNotFoundError: there is no such folder or model, or a file of it is missing.
            ValueError: a file is damaged, or does not fit the others.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(str(pretrained_model_name_or_path), options)
        config = _read_config(folder / CONFIG)
        weights = _read_weights(folder / WEIGHTS)
        try:
            published = cls(config["task"], config["model"], config["run"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG} describes no model of ours: {error}") from error
        _put_weights(published.network, weights, folder / WEIGHTS)
        if config["vocabulary"] is not None:
            published.vocabulary = load_vocabulary(config["vocabulary"], folder)
        return published.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights, vocabulary and card, and config.json at last: without it there is none."""
        content = to_bytes(_own_tensors(self.network), metadata={"format": "pt"})
        _write(save_directory / WEIGHTS, content)
        described = None
        if self.vocabulary is not None:
            described = save_vocabulary(self.vocabulary, save_directory)
        _write(save_directory / "README.md", str(self.generate_model_card()).encode())
        config = {
            "library": "multimax",
            "format": FORMAT,
            "task": self.task,
            "model": self.options,
            "vocabulary": described,
            "run": self.run,
        }
        write_json(save_directory / CONFIG, config)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README: figures, data, normalizers, seed and licence."""
        return model_card(self.task, self.run)


def load_model(
    checkpoint: str | Path,
    data_root: str | None = None,
    settings: Sequence[str] = (),
    task: str | None = None,
    open_data: bool = False,
) -> TrainedModel:
    """The trained model of a run folder, or a published one.

    Args:
        checkpoint: a run folder, a checkpoint in one, the folder of a published model, or
            "hf-hub:USER/NAME".
        data_root, settings, task: as in `load_run`.
        open_data: open the data set of a published model too, which `source` then is; it can be
            used without it.

    Raises:
        FileNotFoundError, ValueError: as `load_run` and `PublishedModel.from_pretrained`.
    """
    if not is_published(checkpoint):
        return load_run(checkpoint, data_root, settings, task)
    published = PublishedModel.from_pretrained(str(checkpoint).removeprefix(ON_HUB))
    if task not in (None, published.task):
        raise ValueError(f"{checkpoint} was trained for {published.task}, not for {task}")
    if not published.run:
        raise ValueError(f"{checkpoint} does not say how it was trained: publish a run")
    config = changed(published.run["config"], data_root, settings)
    return TrainedModel(
        published.network,
        config,
        published.vocabulary,
        _open_data(published, config) if open_data else None,
        Path(checkpoint) / WEIGHTS,
        data=published.run["inputs"]["data"],
    )


def _open_data(published: PublishedModel, config: Config) -> Any:
    """The data set of a configuration; ValueError if a published model is not for it."""
    task = TASKS[published.task]
    source = task.open_data(config)
    found, own = task.vocabulary(source), published.vocabulary
    if getattr(found, "fingerprint", "") != getattr(own, "fingerprint", ""):
        raise ValueError(
            f"the model was trained with another vocabulary than that of {config.data.name}: give "
            "its data with --data-root"
        )
    if _as_json(task.model_options(config, source)) != published.options:
        raise ValueError(
            "the published model is another one than the configuration and the data describe: its "
            "model, its attention and its output cannot be set"
        )
    return source


def is_published(checkpoint: str | Path) -> bool:
    """Whether it is the folder of a published model, or a name on the Hub."""
    return str(checkpoint).startswith(ON_HUB) or (Path(checkpoint) / CONFIG).is_file()


def _download(name: str, options: Mapping[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is no folder, and cannot be had from the Hub either: {error}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: give the folder of a published model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from error
    if not isinstance(config, dict) or config.get("library") != "multimax":
        raise ValueError(f"{path} is not of a model that this project published")
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format={config.get('format')!r}, this version reads {FORMAT}: install the "
            "version that it was published with"
        )
    kinds = {"task": str, "model": dict, "vocabulary": dict | None, "run": dict}
    for key, kind in kinds.items():
        if key not in config or not isinstance(config[key], kind):
            raise ValueError(f"{key} in {path} is missing or damaged: {AGAIN}")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: {AGAIN}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from error


def _own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, with one name for each tensor that several layers share."""
    named = chain(network.named_parameters(), network.named_buffers())
    first = {name for name, _ in named}
    state = network.state_dict().items()
    return {name: tensor.contiguous().cpu() for name, tensor in state if name in first}


def _put_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = _own_tensors(network)
    problems = [f"{name} is missing there" for name in own if name not in weights]
    problems += [f"{name} does not exist here" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        shown = "; ".join(problems[:3])
        raise ValueError(f"{path} does not fit the model in {CONFIG}: {shown}{more}. {AGAIN}")
    network.load_state_dict(weights, strict=False)  # the further names of shared tensors


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(options, allow_nan=False))


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda stream: stream.write(content), "Publish the model again")
