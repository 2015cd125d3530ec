"""What the benchmarks compare with: MultiMax as the official code computes it, and plain SoftMax.

The official code adds the four rectified terms to the scores and calls `torch.softmax`, in eager
mode or through `torch.jit.script`; written here from the formula of the paper.
"""

import warnings
from typing import Any

import torch
from torch import Tensor


def official_modulation(x: Tensor, ts: Tensor, ranges: Tensor) -> Tensor:
    """Scores of any shape with the second-order modulation of (4,) `ts` and `ranges`."""
    first = ts[0] * torch.relu(ranges[0] - x) + ts[1] * torch.relu(x - ranges[1])
    second = ts[2] * torch.relu(ranges[2] - x) ** 2 + ts[3] * torch.relu(x - ranges[3]) ** 2
    return x + first + second


def official_multimax(x: Tensor, ts: Tensor, ranges: Tensor) -> Tensor:
    """MultiMax over the last dimension."""
    return torch.softmax(official_modulation(x, ts, ranges), -1)


def official_attention(
    query: Tensor, key: Tensor, value: Tensor, ts: Tensor, ranges: Tensor, causal: bool
) -> Tensor:
    """Attention with MultiMax of (..., tokens, head_dim) tensors; the mask follows modulation."""
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)
    scores = official_modulation(scores, ts, ranges)
    if causal:
        later = torch.ones(scores.size(-2), scores.size(-1), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(later.triu(1), float("-inf"))
    return torch.softmax(scores, -1) @ value


def script(function: Any) -> Any:
    """`torch.jit.script`, which newer versions of torch warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)
