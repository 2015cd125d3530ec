from collections import Counter

import pytest
import torch
from streams import (
    NAMES,
    PLAIN,
    TRAIN,
    VALID,
    assert_batches_start_anywhere,
    assert_evaluation_is_exact,
    assert_same,
    assert_shares_are_disjoint,
    build,
    build_streamed,
    numbers,
    ranks_of_training,
    write,
)


def test_facts(shards):
    data = build(shards)
    assert data.name == "wds/"
    assert data.sizes == {"train": sum(TRAIN), "valid": sum(VALID)}
    assert data.class_names == ["0", "1"]
    assert (data.num_classes, data.image_size, data.channels) == (2, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (5, 0), (1, 2), (2, 2)]
)
def test_evaluation_reads_each_example_once(shards, pictures, world_size, num_workers):
    assert_evaluation_is_exact(build(shards, num_workers=num_workers), pictures, world_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size"),
    [(1, 0, 5), (2, 0, 3), (3, 0, 4), (1, 2, 3), (3, 2, 2)],
)
def test_ranks_train_on_shares_of_their_own(shards, world_size, num_workers, batch_size):
    data = build(shards, num_workers=num_workers, **PLAIN)
    ranks = ranks_of_training(data, world_size, batch_size)
    shown = Counter(i for batches in ranks for i in numbers(batches))
    assert max(shown.values()) == 1
    assert shown.total() == sum(TRAIN) // (batch_size * world_size) * batch_size * world_size
    for batches in ranks:
        assert torch.cat([labels for _, labels in batches]).tolist() == [
            i % 2 for i in numbers(batches)
        ]


def test_shares_are_drawn_from_seed_and_epoch(shards):
    data = build(shards, **PLAIN)
    drawn = [
        frozenset(i // 4 for i in numbers(ranks_of_training(data, 2, 4, epoch, seed)[0]))
        for epoch, seed in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
    ]
    assert all(len(share) == 3 for share in drawn)
    assert len(set(drawn)) == 5  # (0, 1) and (1, 0) are not the same


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_examples_of_shards_are_shuffled(shards, num_workers):
    data = build(shards, train_split="train-{0001..0002}.tar|8", num_workers=num_workers, **PLAIN)
    orders = [
        numbers(ranks_of_training(data, 1, 4, epoch, seed)[0])
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert [sorted(order) for order in orders] == [list(range(4, 12))] * 3
    assert len({tuple(i % 4 for i in order if i < 8) for order in orders}) == 3
    assert all(set(order[:4]) not in ({4, 5, 6, 7}, {8, 9, 10, 11}) for order in orders)


def test_every_rank_gets_equally_many_batches_of_uneven_shards(shards, tmp_path):
    data = build(write(tmp_path, train=[9, 1, 1, 1]), **PLAIN)
    first, second = (numbers(batches) for batches in ranks_of_training(data, 2, 3))
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)
    ranks_of_training(build(shards, num_workers=2), 1, 7)  # the workers' shares are no multiples


@pytest.mark.slow
@pytest.mark.parametrize("random_erasing", [0.0, 1.0])
def test_batches_start_anywhere(noisy_shards, random_erasing):
    def make(num_workers):
        data = build(noisy_shards, num_workers=num_workers, random_erasing=random_erasing)
        return data.train_loader(2, 1, 2, "cpu", seed=7)

    assert_batches_start_anywhere(make)


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(random_erasing=0.0), {**PLAIN, "random_erasing": 1.0}])
def test_copies_of_an_image_are_changed_differently(tmp_path, options):
    write(tmp_path, train=[1] * 8, noise=60)
    for file in tmp_path.glob("train-*.tar"):
        file.write_bytes((tmp_path / "train-0000.tar").read_bytes())
    data = build(tmp_path, num_workers=2, **options)
    shown = [
        images
        for rank in range(2)
        for epoch in range(2)
        for images, _ in data.train_loader(2, rank, 2, "cpu", seed=0).batches(epoch)
    ]
    assert len({image.double().sum().item() for image in torch.cat(shown)}) == 16


def test_each_batch_is_erased_differently(noisy_shards):
    kept, erased = (
        build(noisy_shards, random_erasing=p).train_loader(4, 0, 1, "cpu", seed=0)
        for p in (0.0, 1.0)
    )
    changed = [
        images != kept_images
        for (images, _), (kept_images, _) in zip(erased.batches(0), kept.batches(0), strict=True)
    ]
    shares = torch.cat(changed).double().mean((1, 2, 3))
    assert 0.01 < shares.min() <= shares.max() < 0.4
    assert len({mask.numpy().tobytes() for mask in changed}) == 6


def test_shards_can_be_listed_without_an_info_file(shards, pictures, tmp_path):
    for file in shards.glob("*.tar"):
        (tmp_path / file.name).symlink_to(file)
    data = build(
        tmp_path,
        train_split="train-{0000..0005}.tar|24",
        valid_split="val-{0000..0002}.tar|7",
    )
    assert data.sizes == {"train": 24, "valid": 7}
    assert_evaluation_is_exact(data, pictures, 2)


def test_the_process_group_is_not_asked(shards, pictures, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    data = build(shards, **PLAIN)
    assert data.sizes == {"train": 24, "valid": 7}
    assert_evaluation_is_exact(data, pictures, 1)
    assert_shares_are_disjoint(data, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
def test_hugging_face_streams_evaluate_exactly(arrow, pictures, tmp_path, world_size, num_workers):
    data = build_streamed(arrow, tmp_path, num_workers=num_workers, num_classes=None)
    assert data.sizes == {"train": 24, "valid": 7}
    assert data.class_names == NAMES
    assert_evaluation_is_exact(data, pictures, world_size)


@pytest.mark.slow
def test_hugging_face_streams_train(arrow, tmp_path):
    data = build_streamed(arrow, tmp_path, **PLAIN)
    for world_size, batch_size in ((1, 4), (2, 3), (3, 4), (4, 3)):  # 4 does not divide 6 shards
        ranks = assert_shares_are_disjoint(data, world_size, batch_size)
    assert ranks != [numbers(batches) for batches in ranks_of_training(data, 4, 3, epoch=1)]
    assert_shares_are_disjoint(build_streamed(arrow, tmp_path, num_workers=2, **PLAIN), 4, 3)

    def make(num_workers):
        data = build_streamed(arrow, tmp_path, num_workers=num_workers)
        return data.train_loader(2, 1, 2, "cpu", seed=7)

    assert_batches_start_anywhere(make)


@pytest.mark.slow
def test_hugging_face_files_read_as_folders_do(pictures, tmp_path):
    options = dict(repeated_augmentation=3, **PLAIN)
    data = build(tmp_path, f"hfds/{pictures}", valid_split="validation", **options)
    assert data.sizes == {"train": 24, "valid": 7}
    assert data.class_names == NAMES
    expected = build(pictures, "", **options)
    for split in ("train", "valid"):
        loaders = [each.eval_loader(split, 4, 1, 2, "cpu") for each in (data, expected)]
        assert_same(*(list(loader) for loader in loaders))
    loaders = [each.train_loader(4, 1, 2, "cpu", seed=0) for each in (data, expected)]
    assert_same(*(list(loader.batches(1)) for loader in loaders))
