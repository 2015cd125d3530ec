"""Translation with an encoder-decoder Transformer: any normalizer in attention and output layer."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor, nn

from multimax.data.pairs import PAIR_DATA
from multimax.data.pairs.batches import PairBatch, TokenTrainLoader
from multimax.data.pairs.made import MadePairs
from multimax.data.pairs.sources import Languages, PairData, PairSource
from multimax.data.vocabulary import PairVocabulary
from multimax.decoding import beam_search
from multimax.models.output import Output
from multimax.models.registry import TRANSLATION_MODELS
from multimax.models.transformer import TranslationModel
from multimax.options import Section
from multimax.recording import NormalizerRecorder
from multimax.tasks.base import (
    DataSets,
    Sections,
    Task,
    batch_size_per_process,
    check_not_diverged,
    describe_model,
    inspected_split,
    made_sizes,
)
from multimax.tasks.language_modeling import TokenLoss, smoothed_negative_log_likelihood

INSPECTED_SENTENCES = 64  # of an evaluation split

Beam = Annotated[int, Field(ge=1, le=1000)]


class Decoding(Section):
    """The options of beam search."""

    beam: Beam = Field(description="hypotheses of a sentence, in the translation of the test split")
    monitor_beam: Beam = Field(description="the same for the valid split, at every evaluation")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = Field(
        description="below 1 favours short translations, above 1 long ones"
    )
    max_len_a: Annotated[float, Field(ge=0, le=100)] = Field(
        description="longest translation in tokens, for each token of the source; see max_len_b"
    )
    max_len_b: Annotated[int, Field(ge=1, le=10_000)] = Field(
        description="tokens that are added to max_len_a times the source"
    )


class Translation(Task):
    """A Transformer that translates sentences.

    Metrics of a split, of which every sentence counts once:

    - `loss`: the output normalizer's own loss per target token, without label smoothing; nats for
      SoftMax and MultiMax.
    - `perplexity`: exp of the mean negative log-likelihood of a target token; of a sparse output
      normalizer `smoothed_perplexity`, see `LanguageModeling`.
    - `bleu`, `chrf`: of sacreBLEU on plain text, with the signatures in `notes`. The translations
      are those of beam search with `decoding.beam` on the test split, and with
      `decoding.monitor_beam` on all others.
    - `tokenized_bleu`: of tokenized words, without smoothing, as `fairseq-generate --remove-bpe`
      reports it; only for data that is tokenized.

    Batch sizes are in tokens of the longer side, padding included. Arguments and errors are those
    of `multimax.tasks.build_task`.
    """

    data_kind: ClassVar[str] = "translation data set"
    data_sets: ClassVar[DataSets] = PAIR_DATA
    models = TRANSLATION_MODELS
    model_arguments: ClassVar[tuple[str, ...]] = (
        "source_vocabulary_size",
        "target_vocabulary_size",
        "padding_index",
        "attention",
        "output",
    )
    sections: ClassVar[Sections] = {"loss": TokenLoss, "decoding": Decoding}
    unit = "tokens"
    monitor = "valid/bleu"
    higher_is_better = True

    def __init__(
        self,
        config: Any,
        source: PairSource,
        model: nn.Module,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.decoding: Decoding = config.decoding
        self.data: PairData = source.load()
        self.model: TranslationModel = cast(TranslationModel, model)  # pyright: ignore[reportIncompatibleVariableOverride]
        self._check_beams()
        self.open_loaders(self.data, config, rank, world_size, device)
        self.label_smoothing: float = config.loss.label_smoothing
        self.fingerprint: str = self.data.languages.fingerprint
        self.notes = {"left_out": self.data.left_out}

    @classmethod
    def make_data(cls, config: Any, world_size: int) -> PairSource:
        options = config.data.given()
        evaluated, _ = made_sizes(config, world_size)
        longest = min(config.data.max_length, batch_size_per_process(config, world_size))
        return MadePairs(options.pop("name"), options, evaluated, longest)

    @staticmethod
    def vocabulary(source: PairSource) -> Languages:
        return source.languages

    @classmethod
    def model_options(cls, config: Any, source: PairSource) -> dict[str, Any]:
        languages = source.languages
        return config.model.given() | {
            "attention": config.attention.given(),
            "output": config.output.given(),
            "source_vocabulary_size": languages.source_vocabulary.size,
            "target_vocabulary_size": languages.target_vocabulary.size,
            "padding_index": languages.target_vocabulary.padding_index,
        }

    def _check_beams(self) -> None:
        words = self.data.languages.target_vocabulary.size
        for name in ("beam", "monitor_beam"):
            beam = getattr(self.decoding, name)
            if beam >= words:
                raise ValueError(
                    f"decoding.{name}={beam} must be less than {words}, the number of target words"
                )

    def describe(self) -> dict[str, str]:
        data, languages = self.data, self.data.languages
        sizes = ", ".join(f"{len(pairs):,} {split}" for split, pairs in data.splits.items())
        vocabularies = [languages.source_vocabulary.size, languages.target_vocabulary.size]
        left_out = [
            f"{count:,} {split} {reason}"
            for split, counts in data.left_out.items()
            for reason, count in counts.items()
        ]
        batches_left_over = cast(TokenTrainLoader, self.train_loader).left_over
        if batches_left_over:
            left_out.append(f"{batches_left_over} batches of an epoch, each time others")
        encoder = cast(Any, self.model.encoder.layers[0])
        decoder = cast(Any, self.model.decoder.layers[0])
        attention = {
            "encoder": encoder.self_attn.normalizer,
            "decoder": decoder.self_attn.normalizer,
            "cross": decoder.encoder_attn.normalizer,
        }
        return {
            "data": f"{data.name} {languages.source}-{languages.target}: {sizes} pairs, "
            f"vocabularies of {vocabularies[0]:,} and {vocabularies[1]:,}",
            "left out": ", ".join(left_out) or "nothing",
            "model": describe_model(self.model),
            "attention": ", ".join(f"{place} {module}" for place, module in attention.items()),
            "output": str(cast(Output, self.model.output).normalizer),
        }

    def weight(self, batch: PairBatch) -> int:
        return batch.tokens

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:
        features = model(batch.source, batch.target_in)
        return self.model.output.loss(features, batch.target, label_smoothing=self.label_smoothing)

    def evaluate(
        self, model: nn.Module, split: str, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        model = cast(TranslationModel, model)
        pairs = self.data.splits[split]
        totals = torch.zeros(3, dtype=torch.float64)
        # Each process fills in its own sentences, and the sum over all processes has them all.
        found = torch.zeros(len(pairs), self._longest(split), dtype=torch.int64, device=self.device)
        for indices, batch in self.evaluation_batches(split):
            totals += self._totals(model, batch).cpu()
            translations = self._search(model, split, batch)
            for index, tokens in zip(indices.tolist(), translations, strict=True):
                found[index, : len(tokens)] = torch.tensor(tokens, device=self.device)
        loss, nll, count = reduce(totals.to(self.device)).tolist()
        rows = reduce(found).tolist()
        if count != pairs.target.lengths.sum() or not all(pairs.eos_index in row for row in rows):
            raise RuntimeError(f"not every {split} sentence was evaluated exactly once")
        check_not_diverged(split, loss / count, nll / count)
        vocabulary = self.data.languages.target_vocabulary
        lines = [vocabulary.decode(row[: row.index(pairs.eos_index)]) for row in rows]
        metrics, signatures = score_lines(vocabulary, lines, self.data.references[split])
        self.notes: Mapping[str, Any] = {**self.notes, **signatures}
        prefix = "smoothed_" if model.output.sparse else ""
        perplexity = {f"{prefix}perplexity": math.exp(nll / count)}
        return metrics | {"loss": loss / count} | perplexity

    def _totals(self, model: TranslationModel, batch: PairBatch) -> Tensor:
        """Loss, negative log-likelihood and number of target tokens."""
        counts = batch.target != model.padding_index
        features, target = model(batch.source, batch.target_in)[counts], batch.target[counts]
        loss = model.output.loss(features, target, reduction="sum")
        sparse = model.output.sparse
        nll = smoothed_negative_log_likelihood(model.output, features, target) if sparse else loss
        return torch.stack([loss, nll, loss.new_tensor(batch.tokens)])

    def _search(self, model: TranslationModel, split: str, batch: PairBatch) -> list[list[int]]:
        """The best translation of each sentence, which ends with the end of sentence."""
        options = search_options(self.decoding)
        if split != "test":
            options["beam"] = self.decoding.monitor_beam
        eos = self.data.languages.target_vocabulary.eos_index
        return [found[0].tokens for found in beam_search(model, batch.source, eos=eos, **options)]

    def _longest(self, split: str) -> int:
        """The largest number of tokens that a translation can have."""
        source = int(self.data.splits[split].source.lengths.max())
        return int(self.decoding.max_len_a * source + self.decoding.max_len_b) + 1

    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        model = cast(TranslationModel, model)
        pairs = self.data.splits[inspected_split(self.splits)]
        with NormalizerRecorder(model) as recorder:
            # One at a time: what attends from padding would count too.
            for index in range(min(INSPECTED_SENTENCES, len(pairs))):
                batch = pairs.batch([index], self.device)
                model.output.probabilities(model(batch.source, batch.target_in))
        return recorder.summary()


def score_lines(
    vocabulary: PairVocabulary, lines: list[str], references: list[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of translated lines by name, and the signatures of sacreBLEU."""
    plain = [vocabulary.plain(line) for line in lines]
    plain_references = [vocabulary.plain(line) for line in references]
    metrics, signatures = {}, {}
    for name, metric in {"bleu": BLEU(), "chrf": CHRF()}.items():
        metrics[name] = metric.corpus_score(plain, [plain_references]).score
        signatures[name] = str(metric.get_signature())
    words, word_references = (
        [words for line in side if (words := vocabulary.words(line)) is not None]
        for side in (lines, references)
    )
    if words:
        tokenized = BLEU(tokenize="none", smooth_method="none", force=True)
        metrics["tokenized_bleu"] = tokenized.corpus_score(words, [word_references]).score
        signatures["tokenized_bleu"] = str(tokenized.get_signature())
    return metrics, signatures


def search_options(decoding: Decoding) -> dict[str, Any]:
    """What `multimax.decoding.beam_search` takes of the configuration."""
    return {name: value for name, value in decoding.given().items() if name != "monitor_beam"}
