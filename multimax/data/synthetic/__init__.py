"""Data sets that are drawn, for the synthetic tasks; there are no files."""

from collections.abc import Callable

from multimax.data.synthetic.base import SyntheticData
from multimax.data.synthetic.k_mean import KMean
from multimax.data.synthetic.maximum import Maximum
from multimax.data.synthetic.multi_token import MultiTokenRecall
from multimax.data.synthetic.recall import MultiQueryRecall
from multimax.data.synthetic.sequences import Reverse, Sort

RETRIEVAL_DATA: dict[str, Callable[..., SyntheticData]] = {"k_mean": KMean}
MAX_RETRIEVAL_DATA: dict[str, Callable[..., SyntheticData]] = {"maximum": Maximum}
RECALL_DATA: dict[str, Callable[..., SyntheticData]] = {"multi_query_recall": MultiQueryRecall}
MULTI_TOKEN_RECALL_DATA: dict[str, Callable[..., SyntheticData]] = {
    "multi_token_recall": MultiTokenRecall
}
REVERSE_DATA: dict[str, Callable[..., SyntheticData]] = {"reverse": Reverse}
SORT_DATA: dict[str, Callable[..., SyntheticData]] = {"sort": Sort}
