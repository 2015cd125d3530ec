"""Models of the synthetic retrieval tasks: one layer of attention over the items of a set."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multimax.attention import attention as attend
from multimax.models.sharing import take_shared
from multimax.normalizers import Normalizer, build_for_attention, build_for_output
from multimax.options import Count, Width, checked


class AttentionPooling(nn.Module):
    """Attention of one learned query to the items of a set; their order does not matter.

    Args:
        features: numbers of an item.
        head_dim: of query and keys.
        outputs: of the values, which are a linear map of the items.
        attention: name and options of the normalizer.
        hidden: width of an MLP with one hidden layer that makes the keys; None makes them by a
            linear map.
    """

    def __init__(
        self,
        features: int,
        head_dim: int,
        outputs: int,
        attention: Mapping[str, Any],
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.query: nn.Parameter = nn.Parameter(torch.randn(1, head_dim))
        self.k_proj: nn.Module = (
            nn.Linear(features, head_dim) if hidden is None else mlp(features, hidden, head_dim)
        )
        self.v_proj: nn.Linear = nn.Linear(features, outputs)
        options, _ = take_shared(attention)  # with whom: there is one layer
        self.normalizer: Normalizer = build_for_attention(options, 1, head_dim)

    def forward(self, items: Tensor) -> Tensor:
        """(sets, outputs) of items (sets, items, features)."""
        query = self.query.expand(items.size(0), 1, -1)
        return attend(query, self.k_proj(items), self.v_proj(items), self.normalizer).squeeze(-2)


class AttentionRegressor(nn.Module):
    """A layer of attention and nothing else: its result is the prediction.

    Args:
        features, outputs: of `AttentionPooling`.
        attention: name and options of the normalizer.
        head_dim: of query and keys.
        keys: "linear" in the items, or an "mlp" with one hidden layer.
        hidden: width of the hidden layer of an "mlp".
    """

    @checked
    def __init__(
        self,
        features: Width,
        outputs: Width,
        attention: Mapping[str, Any],
        head_dim: Width = 16,
        keys: Literal["linear", "mlp"] = "linear",
        hidden: Width = 64,
    ) -> None:
        super().__init__()
        width = hidden if keys == "mlp" else None
        self.attn: AttentionPooling = AttentionPooling(
            features, head_dim, outputs, attention, width
        )

    def forward(self, items: Tensor) -> Tensor:
        """Predictions (sets, outputs) for items (sets, items, features)."""
        return self.attn(items)


class AttentionClassifier(nn.Module):
    """An MLP for each item, attention over them, and an MLP that ends in scores of the classes.

    Args:
        features: numbers of an item.
        outputs: classes.
        attention: name and options of the normalizer of attention.
        output: name and options of that of the classes.
        width: of the encoded items, of the hidden layers, and of query and keys.

    Source: Velickovic et al., softmax is not enough (for sharp out-of-distribution), 2024, arXiv
    2410.01104, but for the query, which is learned here.
    """

    @checked
    def __init__(
        self,
        features: Width,
        outputs: Count,
        attention: Mapping[str, Any],
        output: Mapping[str, Any],
        width: Width = 32,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module = mlp(features, width, width)
        self.attn: AttentionPooling = AttentionPooling(width, width, width, attention)
        self.classifier: nn.Module = mlp(width, width, outputs)
        self.output: Normalizer = build_for_output(output)

    def forward(self, items: Tensor) -> Tensor:
        """Scores (sets, classes) for items (sets, items, features)."""
        return self.classifier(self.attn(self.encoder(items)))


def mlp(features: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear maps with a GELU between them."""
    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, outputs))
