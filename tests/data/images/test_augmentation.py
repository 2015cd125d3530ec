import pytest
import torch
from timm.data.random_erasing import RandomErasing

from multimax.data.images.augmentation import (
    Augmentation,
    normalize,
    random_crop,
    random_erase,
    random_flip,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def distinct_images(batch, channels=2, height=6, width=5):
    size = batch * channels * height * width
    return torch.arange(1, size + 1, dtype=torch.int32).view(batch, channels, height, width)


def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs():
    images = distinct_images(batch=400)
    cropped = random_crop(images, 1, generator())
    padded = torch.zeros(400, 2, 8, 7, dtype=torch.int32)
    padded[:, :, 1:7, 1:6] = images
    windows = {(y, x): padded[:, :, y : y + 6, x : x + 5] for y in range(3) for x in range(3)}
    matches = torch.stack([(cropped == w).flatten(1).all(1) for w in windows.values()])
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) > 20).all()  # 400 / 9 = 44 expected


def test_a_flip_mirrors_left_to_right_as_often_as_asked():
    images = distinct_images(batch=1000)
    flipped = random_flip(images, 0.3, generator())
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 0.25 < mirrored.double().mean() < 0.35


def test_erasing_puts_noise_in_one_rectangle_of_each_chosen_image():
    images = torch.full((600, 3, 20, 30), 9.0)
    erased = random_erase(images, 0.4, generator())
    changed = erased != 9
    assert torch.equal(changed.any(1), changed.all(1)), "channels share the rectangle"
    changed = changed[:, 0]
    hit = changed.flatten(1).any(1)
    assert 0.34 < hit.double().mean() < 0.46
    rows, columns = changed.any(2), changed.any(1)
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :])
    for axis in (rows, columns):  # consecutive: at most one beginning
        begins = axis[:, 1:] & ~axis[:, :-1]
        assert ((begins.sum(1) + axis[:, 0].int()) == hit.int()).all()
    height, width = rows.sum(1)[hit], columns.sum(1)[hit]
    assert height.max() < 20
    assert width.max() < 30
    assert (height * width / 600).min() > 0.01
    assert (height * width / 600).max() < 0.37
    noise = erased[changed[:, None].expand_as(erased)]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_erasing_follows_the_law_of_timm():
    images = torch.full((4000, 1, 16, 24), 9.0)
    ours = (random_erase(images, 0.5, generator()) != 9)[:, 0]
    theirs = (RandomErasing(0.5, mode="pixel", device="cpu")(images.clone()) != 9)[:, 0]
    difference = ours.double().mean(0) - theirs.double().mean(0)
    assert difference.abs().max() < 0.05

    def log_aspect_and_area(erased):
        height, width = erased.any(2).sum(1).double(), erased.any(1).sum(1).double()
        hit = height > 0
        return (height[hit] / width[hit]).log(), (height * width)[hit] / (16 * 24)

    for got, expected in zip(log_aspect_and_area(ours), log_aspect_and_area(theirs), strict=True):
        scale = expected.std()
        assert abs(got.mean() - expected.mean()) < 0.1 * scale
        assert abs(got.std() - scale) < 0.1 * scale


def test_each_batch_has_noise_of_its_own():
    images = torch.full((50, 1, 8, 8), 9.0)
    first, second = (random_erase(images, 1.0, generator(seed)) for seed in (0, 1))
    both = (first != 9) & (second != 9)
    assert both.sum() > 50
    assert (first[both] != second[both]).all()


def test_normalize():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    mean, std = torch.tensor([0.5, 0.2]).view(2, 1, 1), torch.tensor([0.25, 0.4]).view(2, 1, 1)
    torch.testing.assert_close(normalize(images, mean, std).flatten(), torch.tensor([-2.0, 2.0]))


def test_each_part_can_be_switched_off_and_on():
    images = torch.randint(0, 256, (64, 1, 12, 12), generator=generator()).to(torch.uint8)
    mean, std = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.4)
    plain = normalize(images, mean, std)

    def augmented(crop_padding=0, horizontal_flip=0.0, random_erasing=0.0):
        augmentation = Augmentation(crop_padding, horizontal_flip, random_erasing)
        return augmentation(images, mean, std, generator())

    assert torch.equal(augmented(), plain)
    assert torch.equal(augmented(horizontal_flip=1.0), plain.flip(-1))
    assert torch.equal(
        augmented(crop_padding=2), normalize(random_crop(images, 2, generator()), mean, std)
    )
    assert torch.equal(augmented(random_erasing=1.0), random_erase(plain, 1.0, generator()))


def test_the_generator_decides_everything():
    images = torch.randint(0, 256, (8, 3, 12, 12), generator=generator()).to(torch.uint8)
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    augmentation = Augmentation(2, 0.5, 0.5)
    first = augmentation(images, mean, std, generator(1))
    torch.manual_seed(5)
    assert torch.equal(augmentation(images, mean, std, generator(1)), first)
    assert not torch.equal(augmentation(images, mean, std, generator(2)), first)


@pytest.mark.parametrize(
    "options",
    [
        dict(crop_padding=-1),
        dict(crop_padding=1.5),
        dict(horizontal_flip=2),
        dict(random_erasing=-1),
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)
