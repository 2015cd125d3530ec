"""Lines of standard input, translated by a trained model.

python -m multimax.generate mt outputs/small/mt_multimax/<run> < input.de
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from multimax.data.pairs.batches import Pairs, Sentences, cut_by_tokens
from multimax.data.pairs.sources import Languages
from multimax.decoding import Hypothesis, beam_search
from multimax.hub import load_model
from multimax.models.transformer import TranslationModel
from multimax.options import validate
from multimax.tasks.translation import Decoding, search_options

LINES = 256  # that are read, sorted by length and translated together
TOKENS = 4096  # of a batch, padding included


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `generate mt` takes."""
    parser.add_argument(
        "checkpoint", type=Path, help="a run folder, its last.pt or best.pt, or a published model"
    )
    parser.add_argument("--beam", type=int, help="width of the beam (as in the run's test)")
    parser.add_argument("--length-penalty", type=float, help="above 1 favours long translations")
    parser.add_argument(
        "--attention", type=Path, metavar="PICTURE", help="draw cross-attention of the first line"
    )
    parser.add_argument("--data-root", help="where the data is now, if it has moved")


def run(arguments: argparse.Namespace) -> None:
    """Print the translation of each line of standard input.

    Raises:
        FileNotFoundError: the checkpoint, its config.yaml or the vocabulary is missing.
        ValueError: the checkpoint is of another task or vocabulary, an argument is out of range, or
            a line is not UTF-8.
    """
    translator = load(arguments.checkpoint, arguments.data_root)
    chosen = {name: getattr(arguments, name) for name in ("beam", "length_penalty")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    translator.decoding = validate(Decoding, translator.decoding.given() | chosen, "decoding.")
    drawn = arguments.attention is None
    # Someone who types wants to see the translation of a line before typing the next.
    together = 1 if sys.stdin.isatty() else LINES
    for group in _groups(_decoded(sys.stdin.buffer), together):
        for line, translation in zip(group, translator.translate(group), strict=True):
            print(translation, flush=together == 1)
            if line.strip() and not drawn:
                translator.draw_attention(line, arguments.attention)
                print(f"{arguments.attention} drawn of {line.strip()!r}", file=sys.stderr)
                drawn = True


def load(checkpoint: Path, data_root: str | None = None) -> "Translator":
    """The model of a run, ready to translate; on CUDA if there is one.

    Args:
        checkpoint: a run folder (its reported weights), a checkpoint in one, or a published model.
        data_root: replaces `data.root` of the configuration.

    Raises:
        FileNotFoundError: the checkpoint, its config.yaml or the vocabulary is missing.
        ValueError: the checkpoint is of another task, or of another vocabulary.
    """
    trained = load_model(checkpoint, data_root, task="translation")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = cast(TranslationModel, trained.model.to(device))
    config: Any = trained.config
    return Translator(model, trained.vocabulary, config.decoding, config.data.max_length)


class Translator:
    """A trained model with its vocabularies.

    Args:
        model: in evaluation mode.
        languages: its vocabularies.
        decoding: options of beam search.
        max_length: tokens of a source sentence; the model has seen no longer ones.
    """

    def __init__(
        self,
        model: TranslationModel,
        languages: Languages,
        decoding: Decoding,
        max_length: int,
    ) -> None:
        self.model: TranslationModel = model
        self.languages: Languages = languages
        self.decoding: Decoding = decoding
        self.max_length: int = max_length

    def translate(self, lines: list[str]) -> list[str]:
        """The translation of each line, in order; that of an empty line is empty.

        Of a line that is too long, the first `max_length` tokens are translated, with a warning on
        standard error.
        """
        encoded = [self._encode(line) for line in lines]
        order = [i for i in sorted(range(len(lines)), key=lambda i: len(encoded[i])) if encoded[i]]
        translations = [""] * len(lines)
        vocabulary = self.languages.target_vocabulary
        sentences = Sentences(encoded[i] for i in order)
        for cut in cut_by_tokens(sentences.lengths, TOKENS):
            chosen = range(len(order))[cut]
            padded = sentences.padded(chosen, vocabulary.padding_index)
            for index, best in zip(order[cut], self._search(torch.from_numpy(padded)), strict=True):
                translations[index] = vocabulary.plain(vocabulary.decode(best.tokens))
        return translations

    def draw_attention(self, line: str, picture: Path) -> None:
        """Draw the cross-attention of each decoder layer, averaged over its heads, as heat maps.

        Args:
            line: a sentence that is not empty.
            picture: where to; its suffix chooses the format.

        Raises:
            ValueError: the format is unknown.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        source = self._encode(line)
        target = self._search(torch.tensor([source]))[0].tokens
        maps = self.cross_attention(source, target)
        # Between two dollar signs matplotlib would read a formula.
        rows, columns = (
            [piece.replace("$", r"\$") for piece in vocabulary.pieces(tokens)]
            for vocabulary, tokens in (
                (self.languages.target_vocabulary, target),
                (self.languages.source_vocabulary, source),
            )
        )
        size = (1 + 0.25 * len(columns), 1.3 + 0.25 * len(rows))
        figure, axes = pyplot.subplots(
            1, len(maps), figsize=(len(maps) * size[0] + 1, size[1]), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for number, (axis, weights) in enumerate(zip(axes[0], maps, strict=True), 1):
            axis.imshow(weights.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_xticks(range(len(columns)), columns, rotation=90)
            axis.set_yticks(range(len(rows)), rows)
            axis.set_title(f"decoder layer {number}")
            axis.set_xlabel(f"source ({self.languages.source})")
        axes[0, 0].set_ylabel(f"translation ({self.languages.target})")
        figure.colorbar(axes[0, 0].images[0], ax=list(axes[0]), label="attention, mean over heads")
        figure.savefig(picture, dpi=120)
        pyplot.close(figure)

    @torch.inference_mode()
    def cross_attention(self, source: list[int], target: list[int]) -> list[Tensor]:
        """Of each decoder layer the (target, source) probabilities, averaged over its heads."""
        pairs = Pairs(
            Sentences([source]),
            Sentences([target]),
            self.languages.target_vocabulary.padding_index,
            self.languages.target_vocabulary.eos_index,
        )
        batch = pairs.batch([0], next(self.model.parameters()).device)
        maps: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in cast(Iterable[Any], self.model.decoder.layers):
                hook = layer.encoder_attn.normalizer.register_forward_hook(
                    lambda module, inputs, output: maps.append(output[0].mean(0).float().cpu())
                )
                hooks.callback(hook.remove)
            self.model(batch.source, batch.target_in)
        return maps

    def _encode(self, line: str) -> list[int]:
        """Tokens of a plain sentence, shortened to `max_length`; none of an empty one."""
        if not line.strip():
            return []
        vocabulary = self.languages.source_vocabulary
        tokens = vocabulary.encode([vocabulary.line(line)])[0]
        if len(tokens) > self.max_length:
            print(
                f"a line has {len(tokens)} tokens, more than any training sentence: only its first "
                f"{self.max_length} are translated ({line.strip()[:50]!r}...)",
                file=sys.stderr,
            )
            tokens = [*tokens[: self.max_length - 1], vocabulary.eos_index]
        return tokens

    def _search(self, source: Tensor) -> list[Hypothesis]:
        source = source.to(next(self.model.parameters()).device)
        eos = self.languages.target_vocabulary.eos_index
        return [
            found[0]
            for found in beam_search(self.model, source, eos=eos, **search_options(self.decoding))
        ]


def _groups(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    """The lines by `size`; the good ones before a bad one come before its error."""
    group: list[str] = []
    try:
        for line in lines:
            group.append(line)
            if len(group) == size:
                yield group
                group = []
    except ValueError:
        if group:
            yield group
        raise
    if group:
        yield group


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} is not UTF-8 ({error}): convert it, for example with "
                "iconv -f latin1 -t utf-8"
            ) from error
