"""The word embedding and the output layer of the Transformer."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from multimax.losses import linear_output_loss
from multimax.normalizers import Normalizer, build_for_output


def word_embedding(size: int, embed_dim: int, padding_index: int | None) -> nn.Embedding:
    """A table drawn from a normal of standard deviation embed_dim^-0.5; the padding row is 0."""
    embedding = nn.Embedding(size, embed_dim, padding_index)
    nn.init.normal_(embedding.weight, std=embed_dim**-0.5)
    if padding_index is not None:
        nn.init.zeros_(embedding.weight[padding_index])
    return embedding


class Output(nn.Module):
    """Scores of all words, normalized by any normalizer.

    Args:
        weight: (words, dim), shared with the input embedding where the two are tied.
        normalizer: name and options of the normalizer.
        padding_index: the target that does not count in the loss.
    """

    def __init__(
        self, weight: nn.Parameter, normalizer: Mapping[str, Any], padding_index: int
    ) -> None:
        super().__init__()
        self.weight = weight
        self.padding_index = padding_index
        self.normalizer: Normalizer = build_for_output(normalizer)

    @property
    def sparse(self) -> bool:
        """Whether a word can get no probability at all."""
        return self.normalizer.sparse

    @property
    def words(self) -> int:
        """How many there are."""
        return self.weight.size(0)

    def scores(self, features: Tensor) -> Tensor:
        """Scores (..., words) of features (..., dim), before the normalizer."""
        return F.linear(features, self.weight)

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities (..., words) of features (..., dim)."""
        return self.normalizer(self.scores(features))

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Logarithms of the probabilities, fp32 or wider; -inf for a word that has none."""
        return self.normalizer.log_probabilities(self.scores(features))

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The normalizer's loss, see `multimax.losses.linear_output_loss`.

        Args:
            features: (..., dim).
            targets: (...) int64, words.
            label_smoothing: in [0, 1), the share of the target that is spread over all words.
            ignore_index: the target that does not count; None is the padding index.
            reduction: "none", "sum", or "mean" over the targets that count.

        Raises:
            ValueError: as `output_loss`.
        """
        return linear_output_loss(
            self.normalizer,
            features,
            self.weight,
            targets,
            label_smoothing=label_smoothing,
            ignore_index=self.padding_index if ignore_index is None else ignore_index,
            reduction=reduction,
        )
