"""Text from a trained language model, printed as it is sampled.

python -m multimax.generate lm outputs/small/lm_multimax/<run> "The history of"
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from multimax.data.vocabulary import Vocabulary, WordVocabulary
from multimax.decoding import sample
from multimax.hub import load_model
from multimax.models.transformer import LanguageModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `generate lm` takes."""
    parser.add_argument(
        "checkpoint", type=Path, help="a run folder, its last.pt or best.pt, or a published model"
    )
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many to sample (200)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is safer (1)")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="among the fewest that have this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--data-root", help="where the data is now, if it has moved")


def run(arguments: argparse.Namespace) -> None:
    """Print the prompt and what the model makes of it.

    Raises:
        FileNotFoundError: the checkpoint, its config.yaml or the vocabulary is missing.
        ValueError: the checkpoint is of another task or vocabulary, or an argument is out of range.
    """
    if arguments.tokens < 1:
        raise ValueError(f"--tokens must be >= 1, got {arguments.tokens}")
    model, vocabulary = load(arguments.checkpoint, arguments.data_root)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pieces = continue_text(
        model.to(device),
        vocabulary,
        arguments.prompt,
        max_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        generator=torch.Generator(device).manual_seed(arguments.seed),
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def load(checkpoint: Path, data_root: str | None = None) -> tuple[LanguageModel, Vocabulary]:
    """The model of a run in evaluation mode, and its vocabulary.

    Args:
        checkpoint: a run folder (its reported weights), a checkpoint in one, or a published model.
        data_root: replaces `data.root` of the configuration.

    Raises:
        FileNotFoundError: the checkpoint, its config.yaml or the vocabulary is missing.
        ValueError: the checkpoint is of another task, or of another vocabulary.
    """
    trained = load_model(checkpoint, data_root, task="language_modeling")
    return cast(LanguageModel, trained.model), trained.vocabulary


def continue_text(
    model: LanguageModel, vocabulary: Vocabulary, prompt: str, **options: Any
) -> Iterator[str]:
    """Pieces of the prompt and of its continuation, each as soon as it is sampled.

    Args:
        model: in evaluation mode.
        vocabulary: of the model.
        prompt: may have several lines; a text begins after the end of a line.
        options: of `multimax.decoding.sample`.

    Raises:
        ValueError: the prompt is no Unicode, or as `sample`.
    """
    tokens = encode_prompt(vocabulary, prompt)
    device = next(model.parameters()).device
    context = torch.tensor([vocabulary.eos_index, *tokens], device=device)
    sampled = sample(model, context, exclude=vocabulary.never_sampled, **options)
    return vocabulary.decode(chain(tokens, sampled))


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> list[int]:
    """Tokens of a prompt; words that a vocabulary of words does not have are reported.

    Raises:
        ValueError: the prompt is no Unicode.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt {prompt!r} is not UTF-8: {error}") from error
    if isinstance(vocabulary, WordVocabulary):
        unknown = [word for word in prompt.split() if word not in vocabulary.indices]
        if unknown:
            print(f"<unk> in place of unknown words: {', '.join(unknown)}", file=sys.stderr)
    return vocabulary.encode(prompt)
