"""Data sets that are drawn, for the tasks of retrieval; there are no files."""

from collections.abc import Callable

from multimax.data.synthetic.base import SyntheticData
from multimax.data.synthetic.k_mean import KMean
from multimax.data.synthetic.maximum import Maximum
from multimax.data.synthetic.recall import MultiQueryRecall

RETRIEVAL_DATA: dict[str, Callable[..., SyntheticData]] = {"k_mean": KMean}
MAX_RETRIEVAL_DATA: dict[str, Callable[..., SyntheticData]] = {"maximum": Maximum}
RECALL_DATA: dict[str, Callable[..., SyntheticData]] = {"multi_query_recall": MultiQueryRecall}
