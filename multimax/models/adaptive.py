"""Adaptive input and output: rare words have narrow embeddings and are predicted in two steps."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimax.functional import function_transforms_active, values_known
from multimax.losses import linear_output_loss, output_loss
from multimax.models.output import word_embedding
from multimax.normalizers import Normalizer, build_normalizer
from multimax.normalizers.base import check_has_loss


class AdaptiveInput(nn.Module):
    """Word embeddings that get narrower from band to band of ever rarer words.

    Args:
        vocabulary_size: number of words, the frequent ones first.
        cutoffs: ends of the bands but the last, which ends with the vocabulary.
        embed_dim: width of the first band and of the result.
        factor: how much narrower each band is than the one before.
        padding_index: the padding word, in the first band.

    Raises:
        ValueError: the cutoffs do not rise, or a band has no width or the padding word is not in
            the first.

    Source: Baevski and Auli, Adaptive Input Representations, ICLR 2019.
    """

    _float_tensor: Tensor

    def __init__(
        self,
        vocabulary_size: int,
        cutoffs: Sequence[int],
        embed_dim: int,
        factor: int,
        padding_index: int,
    ) -> None:
        super().__init__()
        self.bands: list[int] = list(cutoffs)
        if vocabulary_size not in cutoffs:
            self.bands.append(vocabulary_size)
        self._check(embed_dim, factor, padding_index)
        self.embeddings: nn.ModuleList = nn.ModuleList()
        for index, (start, end) in enumerate(self._ranges()):
            dim = embed_dim // factor**index
            table = word_embedding(end - start, dim, None if index else padding_index)
            projection = nn.Linear(dim, embed_dim, bias=False)
            nn.init.xavier_uniform_(projection.weight)
            self.embeddings.append(nn.Sequential(table, projection))
        self.register_buffer("_float_tensor", torch.zeros(1))  # fairseq's name for the dtype

    def _ranges(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *self.bands]))

    def _check(self, embed_dim: int, factor: int, padding_index: int) -> None:
        if len(self.bands) < 2 or any(end <= start for start, end in self._ranges()):
            raise ValueError(
                "adaptive_cutoffs must rise from above 0 to below the vocabulary size, which is "
                f"the last end; got ends {self.bands}"
            )
        if factor < 1 or embed_dim // factor ** (len(self.bands) - 1) < 1:
            raise ValueError(
                f"adaptive_factor={factor} leaves no width for band {len(self.bands)} of "
                f"embed_dim={embed_dim}: use a factor >= 1 that is smaller, or fewer cutoffs"
            )
        if padding_index >= self.bands[0]:
            raise ValueError(
                f"padding_index={padding_index} must be in the first band, below {self.bands[0]}"
            )

    def weights(self, band: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Table (words, width) and projection (embed_dim, width) of a band."""
        table, projection = self.embeddings[band]  # pyright: ignore[reportGeneralTypeIssues]
        return table.weight, projection.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., embed_dim) of tokens (...)."""
        if torch.compiler.is_compiling() or function_transforms_active():
            return self._embed_without_choosing(tokens)
        flat = tokens.reshape(-1)
        rows, parts = [], []
        # A band without a token is run too: DDP waits for the gradient of every parameter.
        for (start, end), band in zip(self._ranges(), self.embeddings, strict=True):
            chosen = ((flat >= start) & (flat < end)).nonzero().squeeze(1)
            rows.append(chosen)
            parts.append(band(flat[chosen] - start))
        embedded = torch.cat(parts)[torch.cat(rows).argsort()].unflatten(0, tokens.shape)
        return embedded.to(self._float_tensor.dtype)  # the residual stream is not autocast

    def _embed_without_choosing(self, tokens: Tensor) -> Tensor:
        """`forward` of fixed shapes, for a graph or vmap: every band embeds all tokens."""
        embedded = None
        for (start, end), band in zip(self._ranges(), self.embeddings, strict=True):
            # A token outside the vocabulary stays outside of its table, which is an error.
            index = tokens if start == 0 else (tokens - start).clamp_min(0)
            index = index if end == self.bands[-1] else index.clamp_max(end - start - 1)
            part = band(index).to(self._float_tensor.dtype)
            inside = (tokens >= start).unsqueeze(-1)
            embedded = part if embedded is None else torch.where(inside, part, embedded)
        return cast(Tensor, embedded)


class TiedLinear(nn.Module):
    """A linear map with the weight of another module, (out, in), or (in, out) if transposed."""

    def __init__(self, weight: nn.Parameter, transpose: bool) -> None:
        super().__init__()
        self.weight = weight
        self.transpose = transpose

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t() if self.transpose else self.weight)


class AdaptiveHead(nn.Module):
    """Scores of the first band's words, then of the other bands."""

    _float_tensor: Tensor

    def __init__(self, words: nn.Parameter, embed_dim: int, bands: int) -> None:
        super().__init__()
        self.word_proj: TiedLinear = TiedLinear(words, transpose=False)
        self.class_proj: nn.Linear = nn.Linear(embed_dim, bands, bias=False)
        nn.init.xavier_uniform_(self.class_proj.weight)
        self.register_buffer("_float_tensor", torch.zeros(1))  # of fairseq's state dict, unused

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.word_proj(x), self.class_proj(x)], dim=-1)


class AdaptiveOutput(nn.Module):
    """A distribution over the frequent words and bands of rare words, one over each band's words.

    The weights are those of the adaptive input. Head and bands have a normalizer each, in
    `normalizers`, the head's first; the probability of a rare word is that of its band times its
    own in the band, so that all of them sum to one whatever the normalizer.

    Args:
        inputs: the adaptive input.
        embed_dim: width of the features.
        dropout: in [0, 1), of the features and of their projections, in the loss.
        normalizer: name and options of the normalizers.
        padding_index: the target that does not count in the loss.

    Source: Grave et al., Efficient Softmax Approximation for GPUs, ICML 2017; fairseq's
    `AdaptiveSoftmax` with tied weights and projections.
    """

    version: Tensor

    def __init__(
        self,
        inputs: AdaptiveInput,
        embed_dim: int,
        dropout: float,
        normalizer: Mapping[str, Any],
        padding_index: int,
    ) -> None:
        super().__init__()
        self.bands: list[int] = inputs.bands
        self.dropout = dropout
        self.padding_index = padding_index
        words, bands = inputs.weights(0)[0], len(self.bands) - 1
        self.head: AdaptiveHead = AdaptiveHead(words, embed_dim, bands)
        self.tail: nn.ModuleList = nn.ModuleList()
        for band in range(1, len(self.bands)):
            words, projection = inputs.weights(band)
            self.tail.append(
                nn.Sequential(
                    TiedLinear(projection, transpose=True),
                    nn.Dropout(dropout),
                    TiedLinear(words, transpose=False),
                )
            )
        # All in one fork: one `build_preserving_rng` after the other would draw the same numbers.
        with torch.random.fork_rng(devices=[]):
            normalizers = [build_normalizer(**normalizer) for _ in self.bands]
        check_has_loss(normalizers[0])
        self.normalizers: nn.ModuleList = nn.ModuleList(normalizers)
        self.register_buffer("version", torch.tensor([1]))

    def _clusters(self) -> list[tuple[nn.Module, Normalizer]]:
        """Head and bands, each with its normalizer."""
        return list(zip([self.head, *self.tail], cast(Any, self.normalizers), strict=True))

    @property
    def sparse(self) -> bool:
        """Whether a word can get no probability at all."""
        return any(normalizer.sparse for _, normalizer in self._clusters())

    @property
    def words(self) -> int:
        """How many there are."""
        return self.bands[-1]

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities (..., words) of features (..., dim)."""
        head, *tails = [normalizer(part(features)) for part, normalizer in self._clusters()]
        words, bands = head.tensor_split([self.bands[0]], dim=-1)
        rare = [bands[..., band, None] * tail for band, tail in enumerate(tails)]
        return torch.cat([words, *rare], dim=-1)

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Logarithms of the probabilities, fp32 or wider; -inf for a word that has none."""
        head, *tails = [
            normalizer.log_probabilities(part(features)) for part, normalizer in self._clusters()
        ]
        words, bands = head.tensor_split([self.bands[0]], dim=-1)
        rare = [bands[..., band, None] + tail for band, tail in enumerate(tails)]
        return torch.cat([words, *rare], dim=-1)

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The head's loss, plus the band's loss for a word that is in a band.

        For SoftMax and MultiMax this is the negative log-likelihood. Only the scores that the
        targets need are computed.

        Args:
            features, targets, ignore_index, reduction: as in `Output.loss`.
            label_smoothing: must be 0; it is not defined over bands.

        Raises:
            ValueError: as `output_loss`, or `label_smoothing` is not 0.
        """
        if label_smoothing:
            raise ValueError(
                f"the adaptive output has no label smoothing, got label_smoothing="
                f"{label_smoothing}: use 0, or adaptive_cutoffs=None"
            )
        if reduction not in ("none", "sum", "mean"):
            raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
        ignored = targets == (self.padding_index if ignore_index is None else ignore_index)
        self._check(features, targets, ignored)
        x = F.dropout(features.reshape(-1, features.size(-1)), self.dropout, self.training)
        target, ignored = targets.reshape(-1), ignored.reshape(-1)
        (head, head_normalizer), *tails = self._clusters()
        head_target, band_losses = target.masked_fill(ignored, -100), []
        for band, (tail, normalizer) in enumerate(tails):
            start, end = self.bands[band], self.bands[band + 1]
            inside = (target >= start) & (target < end) & ~ignored
            head_target = head_target.masked_fill(inside, self.bands[0] + band)
            # A band without a target is run too: DDP waits for the gradient of every parameter.
            rows = inside.nonzero().squeeze(1)
            *projection, words = cast(Any, tail)
            loss = linear_output_loss(
                normalizer,
                nn.Sequential(*projection)(x[rows]),
                words.weight,
                target[rows] - start,
                reduction="none",
            )
            band_losses.append((rows, loss))
        losses = output_loss(head_normalizer, head(x), head_target, reduction="none")
        for rows, loss in band_losses:
            losses = losses.index_add(0, rows, loss)
        if reduction == "none":
            return losses.reshape(targets.shape)
        return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum()

    def _check(self, features: Tensor, targets: Tensor, ignored: Tensor) -> None:
        if targets.dtype != torch.int64 or targets.shape != features.shape[:-1]:
            raise ValueError(
                f"targets must be int64 words of shape {tuple(features.shape[:-1])}, "
                f"got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        if values_known(targets):
            wrong = targets[((targets < 0) | (targets >= self.bands[-1])) & ~ignored]
            if wrong.numel():
                raise ValueError(f"targets must be in [0, {self.bands[-1]}), got {wrong[0].item()}")
