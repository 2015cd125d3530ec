import random

import numpy as np
import pytest
import torch

from multimax.training.random_state import random_state, restore_random_state, seed_everything


def draws():
    return random.gauss(0, 1), np.random.standard_normal(), torch.randn(()).item()


def test_state_of_every_generator_is_restored():
    seed_everything(0, 0, 0)
    draws()  # so that Python and NumPy hold the second of a pair of Gaussian draws
    state = random_state()
    expected = [draws() for _ in range(3)]
    restore_random_state(state)
    assert [draws() for _ in range(3)] == expected


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_seed_epoch_and_rank_has_a_stream_of_its_own(other):
    seed_everything(0, 0, 0)
    first = draws()
    assert len(first) > 1
    seed_everything(*other)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    seed_everything(0, 0, 0)
    assert draws() == first
