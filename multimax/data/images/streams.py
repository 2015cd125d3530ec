"""Image data sets that are read as streams: WebDataset shards and Hugging Face's streaming mode."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from multimax.data.images.base import Batch
from multimax.data.images.files import FileImageData, build_prefetcher, erase, image_loader, seeded
from multimax.data.loading import (
    EvalLoader,
    TrainLoader,
    batches_per_epoch,
    derive_seed,
)
from multimax.data.workers import DataError


@dataclass
class StreamImageData(FileImageData):
    """An image data set that can only be read from its beginning, shard by shard.

    In training, each process that loads images reads shards of its own, in an order drawn for the
    epoch, and shuffles within a buffer of some thousand examples. Every rank gets equally many
    batches: where the shards do not divide evenly, a process cuts the last examples of its shards
    off or shows the first ones again. Evaluation reads every example once; with fewer shards than
    ranks, a rank's share can be empty.

    The batches of an epoch depend on `num_workers` too. To resume in mid-epoch, keep it as it was;
    the examples before that point are then read, but not augmented, once more.

    Attributes:
        splits: timm's streams by split.
        repeated_augmentation: 1; timm's sampler needs examples by number.
    """

    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        return _StreamTrainLoader(self, *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        return _StreamEvalLoader(self, split, *arguments)


class _StreamTrainLoader(TrainLoader):
    def __init__(self, data, batch_size, rank, world_size, device, seed) -> None:
        self.data, self.batch_size, self.rank, self.seed = data, batch_size, rank, seed
        self.length = batches_per_epoch(data.name, data.sizes["train"], batch_size, world_size)
        reader = data.splits["train"].reader
        _check_shards(reader, world_size, data.num_workers)
        self.examples = _Examples(reader, rank, world_size, data.train_transform, data.num_classes)
        self.examples.reader.is_training = True
        self.examples.reader.batch_size = batch_size  # a process gives whole batches only
        self.prefetcher = build_prefetcher(self.examples, batch_size, data.num_workers, device)

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        key = (self.seed, epoch, self.rank)
        workers = max(1, self.data.num_workers)
        skipped = start // workers  # batches of each worker: they take turns
        examples = self.examples.shuffled(
            derive_seed(self.seed, epoch), key, skipped * self.batch_size
        )
        self.prefetcher.loader = image_loader(
            examples,
            self.batch_size,
            self.data.num_workers,
            self.prefetcher.device,
            derive_seed(*key),
        )
        for index, (images, labels) in enumerate(self.prefetcher, skipped * workers):
            if index == self.length:
                return
            if index >= start:
                yield erase(images, self.data.random_erasing, *key, index), labels


class _StreamEvalLoader(EvalLoader):
    def __init__(self, data, split, batch_size, rank, world_size, device) -> None:
        examples = _Examples(
            data.splits[split].reader, rank, world_size, data.eval_transform, data.num_classes
        )
        self.prefetcher = build_prefetcher(examples, batch_size, data.num_workers, device)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.prefetcher)


class _Examples(IterableDataset):
    """A rank's share of a stream, transformed; in a worker process, the worker's share of that.

    Args:
        reader: timm's, which has not been read from yet.
    """

    def __init__(self, reader, rank, world_size, transform, num_classes) -> None:
        self.reader = copy.copy(reader)
        # timm would take them from torch.distributed.
        self.reader.dist_rank, self.reader.dist_num_replicas = rank, world_size
        self.transform, self.num_classes = transform, num_classes
        self.key, self.skipped = (rank,), 0

    def shuffled(self, order_seed: int, key: tuple[int, ...], skipped: int) -> "_Examples":
        """The same share in another order and without its first examples.

        Args:
            order_seed: of the shards, the same on all ranks.
            key: of everything else.
            skipped: number of examples that each worker leaves out.
        """
        examples = copy.copy(self)
        examples.reader = copy.copy(self.reader)
        examples.reader.common_seed = order_seed
        examples.reader.worker_seed = derive_seed(*key)  # where there is no worker to have one
        examples.key, examples.skipped = key, skipped
        return examples

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        key = (*self.key, worker.id if worker else 0)
        for index, (image, label) in enumerate(_read(self.reader)):
            if index < self.skipped:
                continue
            if not 0 <= label < self.num_classes:
                raise DataError(
                    f"an image has the label {label}, of {self.num_classes} classes: "
                    f"type data.num_classes={label + 1} or more, or mend the labels"
                )
            # 2 keeps it apart from random erasing, which ends in 1.
            with seeded(derive_seed(*key, index, 2)):
                transformed = self.transform(image)
            yield transformed, label


def _read(reader: Any) -> Iterator[tuple[Any, int]]:
    """One pass over the share of the process, from a copy that leaves the reader untouched."""
    reader = copy.copy(reader)
    reader._lazy_init()
    if not reader.is_training:
        # The shards are shared out by now. With more than one rank, timm would cut and repeat
        # to make the shares equally large.
        reader.dist_num_replicas = 1
    for stage in getattr(reader.ds, "pipeline", ()):  # WebDataset's
        if "handler" in getattr(stage, "kw", ()):
            stage.kw["handler"] = _raise  # timm's would leave out what is damaged
            stage.args = tuple(_naming(decode) for decode in stage.args)
    try:
        yield from reader
    except DataError:
        raise
    except Exception as error:  # of a decoder, a file system or a network
        raise DataError(
            f"the stream of images breaks off ({error!r}): replace that shard, or try again"
        ) from error


def _raise(error: Exception) -> bool:
    raise error


def _naming(decode: Callable[[dict], Any]) -> Callable[[dict], Any]:
    """The decoder of an example, with errors that say which example it is."""

    def named(sample: dict) -> Any:
        try:
            return decode(sample)
        except Exception as error:
            place = f"{sample['__key__']} in {sample['__url__']}"
            raise DataError(f"example {place} cannot be read ({error!r}): replace it") from error

    return named


def _check_shards(reader: Any, world_size: int, num_workers: int) -> None:
    """Raise ValueError if a process that loads images would have no shard to read."""
    if hasattr(reader, "builder"):  # Hugging Face's; every rank reads all shards that do not divide
        shards = reader.builder.as_streaming_dataset(split=reader.split).num_shards
        available = shards // world_size if shards % world_size == 0 else shards
    else:
        shards = len(reader.split_info.filenames)
        available = shards // world_size
    if available < max(1, num_workers):
        raise ValueError(
            f"{shards} shards are too few for {world_size} process(es) with {num_workers} workers "
            f"each: type data.num_workers={available}"
            if available
            else f"{shards} shards are too few for {world_size} processes: write more of them"
        )
