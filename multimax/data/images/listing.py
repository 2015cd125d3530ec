"""What tells one set of image files from another without reading them: names, sizes, counts."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def listing(images: Any) -> Iterator[str | bytes]:
    """A split in the parts that a fingerprint is made of; where the files lie is not among them.

    - Folders and tar files of images: name and size in bytes of each image.
    - WebDataset shards: name, number of examples and, of local files, size of each shard.
    - Data sets of Hugging Face: number of examples, size in bytes and features.
    - Arrays of torchvision: their content.

    Args:
        images: a data set of timm or torchvision.
    """
    reader = getattr(images, "reader", images)
    split: Any = getattr(reader, "split_info", None)
    if hasattr(split, "filenames"):
        yield from _shards(Path(reader.root), split)
    elif hasattr(reader, "builder"):
        info = reader.builder.info
        yield f"{split.num_examples} {split.num_bytes} {info.features}"
    elif hasattr(getattr(reader, "dataset", None), "features"):
        yield f"{len(reader.dataset)} {reader.dataset.data.nbytes} {reader.dataset.features}"
    elif hasattr(reader, "samples"):
        yield from sorted(_files(reader))
    elif hasattr(reader, "data"):
        for array in (reader.data, reader.targets):
            yield np.ascontiguousarray(torch.as_tensor(array).numpy()).tobytes()
    else:
        yield f"{type(reader).__name__} of {len(reader)} examples"


def _shards(root: Path, split: Any) -> Iterator[str]:
    lengths = split.shard_lengths or (split.num_samples,)
    yield f"{split.num_samples} {' '.join(map(str, lengths))}"
    for name in split.filenames:
        file = root / name
        yield f"{name} {file.stat().st_size if file.is_file() else ''}"


def _files(reader: Any) -> Iterator[str]:
    root = str(reader.root)
    for first, *rest in reader.samples:
        if isinstance(first, str):  # a path; `rest` is its label
            yield f"{first[len(root) :].lstrip(os.sep)} {os.stat(first).st_size}"
        else:  # a member of a tar file, that file, and one that it is in
            file, inside = rest
            yield f"{file or ''} {getattr(inside, 'name', '')} {first.name} {first.size}"
