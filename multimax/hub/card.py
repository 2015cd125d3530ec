"""The README of a published model: what it is, its figures, and what they were counted on."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from multimax.options import as_typed

PAPER = "https://arxiv.org/abs/2406.01189"
# Names that the Hub has for our tasks.
PIPELINES = {
    "image_classification": "image-classification",
    "language_modeling": "text-generation",
    "translation": "translation",
}
# The embedded data sets; multimax/data/embedded/LICENSES.md has the whole texts.
DATA_LICENCES = {
    "fashion_mnist_subset": "MIT",
    "wikipedia": "CC BY-SA 3.0",
    "libreoffice_help": "MPL 2.0",
}
# What comes after a model is loaded: lines of Python, and a command.
USE = {
    "image_classification": (
        "scores = published(images)  # (batch, channels, height, width), normalized\n"
        "probabilities = published.network.output(scores)",
        "",
    ),
    "language_modeling": (
        "vocabulary = published.vocabulary\n"
        'tokens = torch.tensor([[vocabulary.eos_index, *vocabulary.encode("The history of")]])\n'
        "probabilities = published.network.output.probabilities(published(tokens))",
        'python -m multimax.generate lm FOLDER "The history of"',
    ),
    "translation": (
        "features = published(source, target_in)  # tokens of published.vocabulary\n"
        "probabilities = published.network.output.probabilities(features)",
        "python -m multimax.generate mt FOLDER < lines.txt",
    ),
}


def model_card(task: str, run: Mapping[str, Any]) -> ModelCard:
    """The card of a model.

    Args:
        task: a key of `multimax.tasks.TASKS`.
        run: facts of its training, see `multimax.hub.facts_of`; empty if they are not known.
    """
    if not run:
        data = ModelCardData(library_name="multimax", pipeline_tag=PIPELINES[task])
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_use(task)}")
    config, normalizers = run["config"], (run["config"]["attention"], run["config"]["output"])
    names = [str(normalizer["name"]) for normalizer in normalizers]
    data_set = config["data"]["name"]
    data = ModelCardData(
        library_name="multimax",
        license=run["license"],
        pipeline_tag=PIPELINES[task],
        tags=["pytorch_model_hub_mixin", "model_hub_mixin", *dict.fromkeys(names)],
        model_name=run["experiment"],
        eval_results=[
            EvalResult(
                task_type=PIPELINES[task],
                dataset_type=data_set,
                dataset_name=data_set,
                dataset_split=split,
                metric_type=name,
                metric_value=value,
            )
            for split, figures in run["metrics"].items()
            for name, value in figures.items()
            if name != "examples"
        ],
    )
    attention, output = (as_typed(normalizer) for normalizer in normalizers)
    licence = DATA_LICENCES.get(data_set)
    lines = [
        f"# {run['experiment']}: {names[0]} in attention, {names[1]} in the output layer",
        "",
        f"One training run of a {config['model']['name']} for {task.replace('_', ' ')}, with the "
        f"normalizers of the [MultiMax]({PAPER}) paper (Zhou et al., ICML 2024).",
        "",
        _use(task),
        *_images(run),
        "## Figures",
        "",
        *_figures(run["metrics"]),
        "",
        f"Of the {run['weights']} weights of one run, seed {run['seed']}: there is no spread over "
        f"seeds here. `python -m multimax.evaluate FOLDER` gives them again.",
        "",
        *(f"- {name}: {as_typed(note)}" for name, note in run["notes"].items()),
        "",
        "## Training",
        "",
        "| | |",
        "| --- | --- |",
        f"| data | {data_set}, fingerprint {run['inputs']['data']} |",
        f"| scale | {run['scale']} |",
        f"| attention | `{attention}` |",
        f"| output layer | `{output}` |",
        f"| parameters | {run['parameters']:,} |",
        f"| updates | {run['updates']:,} |",
        f"| seed | {run['seed']} |",
        f"| configuration | {run['config_hash']}, complete in `config.json` |",
        f"| versions | {', '.join(f'{k} {v}' for k, v in run['versions'].items())} |",
        f"| commit | {run['commit'] or 'unknown'} |",
        "",
        *(["It began with the weights of another checkpoint.", ""] * run["continued"]),
        "## Licence",
        "",
        f"The weights are under {run['license']}. The data that they were trained on has a licence "
        f"of its own{f': {licence}' if licence else ''}.",
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _use(task: str) -> str:
    lines, command = USE[task]
    load = 'published = PublishedModel.from_pretrained("FOLDER or USER/NAME")'
    imports = "import torch\n\n" if "torch." in lines else ""
    python = (
        f"```python\n{imports}from multimax.hub import PublishedModel\n\n{load}\n{lines}\n```\n"
    )
    return python + (f"\n```console\n{command}\n```\n" if command else "")


def _images(run: Mapping[str, Any]) -> list[str]:
    """How images are normalized; nothing of text."""
    if "images" not in run:
        return []
    mean, std = (
        ", ".join(f"{value:.4f}" for value in run["images"][name]) for name in ("mean", "std")
    )
    classes = ", ".join(run["images"]["class_names"][:10])
    number = len(run["images"]["class_names"])
    return [
        f"Pixels in [0, 1] are normalized by mean ({mean}) and standard deviation ({std}); exact "
        f"values and class names are in `config.json`, {number} of them: {classes}"
        f"{', ...' if number > 10 else ''}.",
        "",
    ]


def _figures(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = [name for name in next(iter(metrics.values())) if name != "examples"]
    return [
        f"| split | examples | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
        *(
            f"| {split} | {of['examples']:,} | {' | '.join(f'{of[name]:.4g}' for name in names)} |"
            for split, of in metrics.items()
        ),
    ]
