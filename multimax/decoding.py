"""Text from trained models: sampling of a language model, beam search of a translation model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimax.models.transformer import Cache, LanguageModel, TranslationModel


def sample(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_tokens: int,
    eos: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    exclude: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue a text, one token after the other.

    A sparse output layer gives most words no probability at all, so that it needs neither `top_k`
    nor `top_p`. The padding word is never drawn.

    Args:
        model: in evaluation mode.
        prompt: (tokens,) int64, at least one.
        max_tokens: how many tokens to draw at most.
        eos: the word that ends the text; it is yielded too. None for no such word.
        temperature: > 0; probabilities are raised to the power 1 / temperature.
        top_k: draw only among this many most probable words.
        top_p: in (0, 1]; draw only among the most probable words that together have this much
            probability.
        exclude: words that are never drawn.
        generator: of the model's device; None is the global one.

    Yields:
        Tokens.

    Raises:
        ValueError: the model is in training mode, an argument is out of range, or no word that may
            be drawn has any probability.
    """
    _check_evaluation(model)
    if prompt.dim() != 1 or not prompt.numel():
        raise ValueError(f"prompt must be (tokens,) with at least one, got {tuple(prompt.shape)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be a finite number > 0, got {temperature}: for the best word, "
            "top_k=1"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    banned = torch.tensor([model.padding_index, *exclude], device=prompt.device)
    return _sample(model, prompt, max_tokens, eos, temperature, top_k, top_p, banned, generator)


def _sample(model, prompt, max_tokens, eos, temperature, top_k, top_p, banned, generator):
    cache, tokens = model.new_cache(), prompt.unsqueeze(0)
    for _ in range(max_tokens):
        with torch.inference_mode():  # not around `yield`: the caller would run in it
            features = model.step(tokens, cache)[:, -1]
            scores = model.output.log_probabilities(features)[0].index_fill(0, banned, -torch.inf)
            probabilities = _truncate(scores / temperature, top_k, top_p)
            tokens = torch.multinomial(probabilities, 1, generator=generator).unsqueeze(0)
        token = int(tokens)
        yield token
        if token == eos:
            return


def _truncate(log_probabilities: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities (words,) over the words that `top_k` and then `top_p` leave."""
    if not (log_probabilities > -torch.inf).any():
        raise ValueError("no word that may be drawn has any probability: exclude fewer")
    order = log_probabilities.argsort(descending=True, stable=True)
    ordered = torch.softmax(log_probabilities[order], 0)
    if top_k is not None:
        ordered[top_k:] = 0
        ordered /= ordered.sum()
    if top_p is not None:
        before = ordered.cumsum(0) - ordered
        ordered[before >= top_p] = 0
    return torch.zeros_like(ordered).index_copy(0, order, ordered)


@dataclass(frozen=True)
class Hypothesis:
    """A translation.

    Attributes:
        tokens: the words, the last of which is `eos`.
        score: sum of the log-probabilities of `tokens`, divided by their number to the power of the
            length penalty. It is -inf if the model, with a sparse output, gives no translation of
            this length any probability.
    """

    tokens: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    model: TranslationModel,
    source: Tensor,
    *,
    eos: int,
    bos: int | None = None,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_len_a: float = 0.0,
    max_len_b: int = 200,
    min_len: int = 1,
) -> list[list[Hypothesis]]:
    """The best translations of source sentences, as fairseq finds them.

    In each step the 2 `beam` best continuations of a sentence are candidates. Those of the first
    `beam` that end are finished; the best `beam` others go on. A sentence is done when `beam`
    hypotheses are finished, at its maximum length, or when nothing that goes on has any
    probability. Unlike in fairseq the maximum length depends on the sentence alone, not on the
    longest one of the batch.

    Args:
        model: in evaluation mode.
        source: (sentences, tokens) int64, with padding on either side.
        eos: the target word that ends a translation.
        bos: the target word that begins one; None is `eos`, as in fairseq.
        beam: >= 1, less than the number of target words.
        length_penalty: below 1 favours short translations, above 1 long ones.
        max_len_a: with `max_len_b`, the maximum length without `eos`: max_len_a * (tokens of the
            source that are not padding) + max_len_b, rounded down.
        max_len_b: see `max_len_a`.
        min_len: the minimum length without `eos`.

    Returns:
        For each sentence at most `beam` hypotheses, at least one, the best first.

    Raises:
        ValueError: the model is in training mode, or an argument is out of range.
        FloatingPointError: the model gives a probability that is not a number.

    Source: fairseq's `SequenceGenerator`.
    """
    _check_evaluation(model)
    words = model.decoder.vocabulary_size
    if not 1 <= beam < words:
        raise ValueError(f"beam must be in [1, {words}), the number of target words, got {beam}")
    lengths = (source != model.padding_index).sum(1)
    max_lengths = (max_len_a * lengths.double() + max_len_b).long()
    if (max_lengths < max(min_len, 0)).any() or min_len < 0:
        raise ValueError(
            f"min_len={min_len} must be in [0, maximum length], which is {int(max_lengths.min())} "
            f"for the shortest sentence (max_len_a={max_len_a}, max_len_b={max_len_b})"
        )
    search = _Search(model, source, eos if bos is None else bos, eos, beam, length_penalty)
    step = 0
    while search.sentences.numel():
        search.advance(step, max_lengths, min_len)
        step += 1
    for found in search.finished:
        found.sort(key=lambda hypothesis: -hypothesis.score)
    return search.finished


class _Search:
    """The sentences that are not done, with `beam` live hypotheses each (one before step 0)."""

    def __init__(
        self,
        model: TranslationModel,
        source: Tensor,
        bos: int,
        eos: int,
        beam: int,
        length_penalty: float,
    ) -> None:
        self.model, self.eos, self.beam, self.length_penalty = model, eos, beam, length_penalty
        self.finished: list[list[Hypothesis]] = [[] for _ in range(source.size(0))]
        self.sentences = torch.arange(source.size(0), device=source.device)
        self.cache: Cache = model.new_cache(model.encode(source))
        self.tokens = torch.full((source.size(0), 1), bos, device=source.device)  # row x time
        self.scores: Tensor | None = None  # (sentences, live), sums of log-probabilities

    def advance(self, step: int, max_lengths: Tensor, min_len: int) -> None:
        """One more word for all live hypotheses."""
        scores, parents, words = self._candidates(step, max_lengths, min_len)
        ends = words == self.eos
        self._finish(scores, parents, ends)

        # The best that go on; a stable sort keeps the order of the candidates.
        going_on = ends.sort(dim=1, stable=True).indices[:, : self.beam]
        live_scores = scores.masked_fill(ends, -torch.inf).gather(1, going_on)
        live = (live_scores > -torch.inf).any(1).tolist()
        remaining, live_rows = [], self.tokens.size(0) // len(live)
        for index, sentence in enumerate(self.sentences.tolist()):
            if live[index] and len(self.finished[sentence]) < self.beam:
                remaining.append(index)
            elif not self.finished[sentence]:
                tokens = [*self.tokens[index * live_rows, 1:].tolist(), self.eos]
                self.finished[sentence].append(Hypothesis(tokens, -math.inf))

        kept = torch.tensor(remaining, dtype=torch.int64, device=words.device)
        rows = parents.gather(1, going_on)[kept].reshape(-1)
        new = words.gather(1, going_on)[kept].reshape(-1, 1)
        self.scores = live_scores[kept]
        self.tokens = torch.cat([self.tokens[rows], new], dim=1)
        self.cache.reorder(rows, None if len(remaining) == len(live) else kept)
        self.sentences = self.sentences[kept]

    def _candidates(
        self, step: int, max_lengths: Tensor, min_len: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, rows and new words of the best continuations, each (sentences, candidates)."""
        features = self.model.step(self.tokens[:, -1:], self.cache)[:, -1]
        steps = self.model.output.log_probabilities(features)
        if steps.isnan().any():
            raise FloatingPointError(f"the model gives NaN as a probability of word {step + 1}")
        steps[:, self.model.padding_index] = -torch.inf
        if step < min_len:
            steps[:, self.eos] = -torch.inf
        steps = steps.unflatten(0, (self.sentences.numel(), -1))
        must_end = max_lengths[self.sentences] == step
        only_eos = torch.arange(steps.size(-1), device=steps.device) == self.eos
        steps = steps.masked_fill(must_end[:, None, None] & ~only_eos, -torch.inf)
        if self.scores is not None:
            steps = steps + self.scores.unsqueeze(-1)
        flat = steps.flatten(1)
        best = flat.topk(min(2 * self.beam, flat.size(1)), dim=1)
        offsets = torch.arange(steps.size(0), device=steps.device).unsqueeze(1) * steps.size(1)
        parents = best.indices // steps.size(2) + offsets
        return best.values, parents, best.indices % steps.size(2)

    def _finish(self, scores: Tensor, parents: Tensor, ends: Tensor) -> None:
        """Keep the hypotheses that end here."""
        chosen = (ends & (scores > -torch.inf))[:, : self.beam].nonzero()
        sums = scores[chosen[:, 0], chosen[:, 1]].tolist()
        begun = self.tokens[parents[chosen[:, 0], chosen[:, 1]], 1:].tolist()
        sentences = self.sentences[chosen[:, 0]].tolist()
        for sentence, total, words in zip(sentences, sums, begun, strict=True):
            if len(self.finished[sentence]) < self.beam:
                tokens = [*words, self.eos]
                score = total / len(tokens) ** self.length_penalty
                self.finished[sentence].append(Hypothesis(tokens, score))


def _check_evaluation(model: LanguageModel | TranslationModel) -> None:
    if model.training:
        raise ValueError("the model is in training mode, with dropout: call model.eval() first")
