"""Checkpoints of fairseq's Transformers as ours, and ours as fairseq's.

    python -m multimax.integrations.fairseq.convert to-multimax checkpoint_best.pt model.pt
    python -m multimax.integrations.fairseq.convert to-fairseq model.pt checkpoint.pt

The weights have the same names in both; what is translated is the configuration. `model.pt` holds
the name of our class, its options and the weights; `load_model` builds the model from it. What is
written for fairseq is for the plug-in's models; it can be evaluated, generated from and fine-tuned.
fairseq itself is not needed, and nothing that a checkpoint holds is executed.
"""

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multimax.files import load_checkpoint, save_checkpoint
from multimax.integrations.fairseq.safe_globals import SAFE_GLOBALS
from multimax.integrations.fairseq.specification import (
    check_supported,
    format_normalizer,
    parse_normalizer,
)
from multimax.models.transformer import LanguageModel, TranslationModel

CLASSES = {model.__name__: model for model in (LanguageModel, TranslationModel)}
PADDING = 1  # of every dictionary of fairseq
LONGEST = 4096  # ours has no longest sentence; fairseq refuses what is longer than the model says
# What our Transformer can be only in one way, in the words of fairseq.
FIXED: dict[str, Any] = {
    "activation_fn": "relu",
    "base_layers": 0,
    "character_embeddings": False,
    "cross_self_attention": False,
    "decoder_learned_pos": False,
    "encoder_learned_pos": False,
    "layernorm_embedding": False,
    "merge_src_tgt_embed": False,
    "no_cross_attention": False,
    "no_scale_embedding": False,
    "no_token_positional_embeddings": False,
    "scale_attn": False,
    "scale_fc": False,
    "scale_heads": False,
    "scale_resids": False,
    "share_all_embeddings": False,
}
# What has another name here, for both tasks.
NAMES = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "embed_dim": "decoder_embed_dim",
    "ffn_dim": "decoder_ffn_embed_dim",
    "num_heads": "decoder_attention_heads",
    "pre_norm": "decoder_normalize_before",
    "tie_embeddings": "share_decoder_input_output_embed",
}
PLACES = ("encoder_attention", "decoder_attention", "cross_attention")


def to_multimax(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Class name, options and weights of our model, from the content of a fairseq checkpoint.

    Args:
        checkpoint: of a stock model or one of the plug-in.

    Raises:
        ValueError: it is no such checkpoint, or our Transformer lacks something that it uses.
    """
    config, weights = checkpoint.get("cfg"), checkpoint.get("model")
    settings = config.get("model") if isinstance(config, Mapping) else checkpoint.get("args")
    if settings is None or not isinstance(weights, Mapping):
        raise ValueError("no checkpoint of fairseq: it lacks 'model' or 'cfg'")
    settings = dict(settings if isinstance(settings, Mapping) else vars(settings))
    translation = any(key.startswith("encoder.") for key in weights)
    read = _translation_options if translation else _language_options
    try:
        options = _common_options(settings) | read(settings, weights)
    except KeyError as error:
        raise ValueError(f"no Transformer of fairseq: the checkpoint lacks {error}") from error
    content = {
        "class": (TranslationModel if translation else LanguageModel).__name__,
        "options": options,
        "model": weights,
    }
    # The weights of the model, not of the checkpoint: in fp32, and with their names of today.
    return content | {"model": build_model(content).state_dict()}


def build_model(content: Mapping[str, Any]) -> nn.Module:
    """Our model in evaluation mode, from what `to_multimax` returns.

    Raises:
        ValueError: the content is not of that form, or the weights do not fit the options.
    """
    if content.get("class") not in CLASSES or not {"options", "model"} <= content.keys():
        raise ValueError(f"no converted model: 'class' must be one of {', '.join(CLASSES)}")
    model = CLASSES[content["class"]](**content["options"])
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the options: {error}") from error
    return model.eval()


def load_model(path: str | Path) -> nn.Module:
    """Our model in evaluation mode, from a file that `to-multimax` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of that form.
    """
    return build_model(load_checkpoint(Path(path)))


def to_fairseq(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of the plug-in's models, from what `to_multimax` returns.

    Raises:
        ValueError: the content is not of that form, the weights do not fit the options, or the
            plug-in lacks one of these.
    """
    build_model(content)
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(CLASSES[content["class"]]).parameters.items()
    }
    options = defaults | content["options"]
    for place in ("attention", *PLACES, "output"):
        check_supported(place, options.get(place) or {})
    settings = {theirs: options[ours] for ours, theirs in NAMES.items()}
    for side in ("input", "output"):
        settings[f"decoder_{side}_dim"] = options["embed_dim"]
    settings["official_mismatch"] = options["official_mismatch"]
    settings["attention_normalizer"] = format_normalizer(options["attention"])
    settings["output_normalizer"] = format_normalizer(options["output"])
    settings["max_target_positions"] = LONGEST
    if content["class"] == "TranslationModel":
        task, model = "translation", argparse.Namespace(**settings, **_encoder_settings(options))
    else:
        task, model = "language_modeling", settings | _language_settings(options)
    return {
        "args": None,
        "cfg": {"model": model, "task": {"_name": task}},
        "model": dict(content["model"]),
        "optimizer_history": [
            {"optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 0}
        ],
        "last_optimizer_state": None,
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }


def _common_options(settings: dict[str, Any]) -> dict[str, Any]:
    same = {f"decoder_{side}_dim": settings["decoder_embed_dim"] for side in ("input", "output")}
    _check(settings, FIXED | same)
    options = {ours: settings.get(theirs) for ours, theirs in NAMES.items()}
    options["activation_dropout"] = options["activation_dropout"] or settings.get("relu_dropout")
    options = {key: value for key, value in options.items() if value is not None}
    options["padding_index"] = PADDING
    options["official_mismatch"] = settings.get("official_mismatch", False)
    # A stock model has no such setting.
    options["attention"] = parse_normalizer(settings.get("attention_normalizer", "softmax"))
    options["output"] = parse_normalizer(settings.get("output_normalizer", "softmax"))
    return options


def _language_options(settings: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "depth": settings["decoder_layers"],
        "final_norm": "decoder.layer_norm.weight" in weights,
    }
    cutoffs = settings.get("adaptive_softmax_cutoff")
    if cutoffs is None:
        _check(settings, {"adaptive_input": False})
        return options | {"vocabulary_size": len(weights["decoder.embed_tokens.weight"])}
    factor = settings["adaptive_softmax_factor"]
    tied = dict.fromkeys(("adaptive_input", "tie_adaptive_weights", "tie_adaptive_proj"), True)
    _check(settings, tied | {"adaptive_input_cutoff": cutoffs, "adaptive_input_factor": factor})
    tables = [f"decoder.embed_tokens.embeddings.{i}.0.weight" for i in range(len(weights))]
    return options | {
        "tie_embeddings": True,
        "vocabulary_size": sum(len(weights[table]) for table in tables if table in weights),
        "adaptive_cutoffs": [int(cutoff) for cutoff in cutoffs.split(",")],
        "adaptive_factor": int(factor),
        "adaptive_dropout": settings["adaptive_softmax_dropout"],
    }


def _translation_options(settings: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    same = ("embed_dim", "ffn_embed_dim", "attention_heads", "normalize_before")
    _check(settings, {f"encoder_{name}": settings[f"decoder_{name}"] for name in same})
    _check(settings, {"adaptive_softmax_cutoff": None})
    options: dict[str, Any] = {
        f"{side}_depth": settings[f"{side}_layers"] for side in ("encoder", "decoder")
    }
    for place in PLACES:
        if settings.get(f"{place}_normalizer"):
            options[place] = parse_normalizer(settings[f"{place}_normalizer"])
    return options | {
        "source_vocabulary_size": len(weights["encoder.embed_tokens.weight"]),
        "target_vocabulary_size": len(weights["decoder.embed_tokens.weight"]),
    }


def _check(settings: dict[str, Any], fixed: Mapping[str, Any]) -> None:
    wrong = [key for key in fixed if settings.get(key, fixed[key]) not in (fixed[key], None)]
    if wrong:
        shown = ", ".join(f"{key}={settings[key]!r} (only {fixed[key]!r})" for key in wrong)
        raise ValueError(f"our Transformer cannot be what this checkpoint is: {shown}")


def _language_settings(options: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "_name": "multimax_transformer_lm",
        "decoder_layers": options["depth"],
        "no_decoder_final_norm": not options["final_norm"],
        # Of the task, to which the stock configuration refers.
        "add_bos_token": False,
        "tokens_per_sample": LONGEST,
        "tpu": False,
    }
    if options["adaptive_cutoffs"] is not None:
        cutoffs = ",".join(map(str, options["adaptive_cutoffs"]))
        settings |= dict.fromkeys(("adaptive_softmax_cutoff", "adaptive_input_cutoff"), cutoffs)
        settings |= dict.fromkeys(("adaptive_input", "tie_adaptive_weights"), True)
        settings |= {"tie_adaptive_proj": True, "share_decoder_input_output_embed": False}
        for part in ("softmax", "input"):
            settings[f"adaptive_{part}_factor"] = options["adaptive_factor"]
        settings["adaptive_softmax_dropout"] = options["adaptive_dropout"]
    return settings


def _encoder_settings(options: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "_name": "multimax_transformer",
        "arch": "multimax_transformer",
        "encoder_layers": options["encoder_depth"],
        "decoder_layers": options["decoder_depth"],
        "max_source_positions": LONGEST,
    }
    for ours, theirs in NAMES.items():
        if theirs.startswith("decoder_"):
            settings[theirs.replace("decoder_", "encoder_")] = options[ours]
    for place in PLACES:
        normalizer = options[place]
        settings[f"{place}_normalizer"] = normalizer and format_normalizer(normalizer)
    return settings


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=["to-multimax", "to-fairseq"])
    parser.add_argument("source", type=Path, help="the checkpoint to read")
    parser.add_argument("destination", type=Path, help="the checkpoint to write")
    arguments = parser.parse_args()
    convert = to_multimax if arguments.direction == "to-multimax" else to_fairseq
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = convert(load_checkpoint(arguments.source))
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"{arguments.source}: {error}")
    save_checkpoint(arguments.destination, content)


if __name__ == "__main__":
    main()
