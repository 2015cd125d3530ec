import logging
import os
import resource
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from normalizer_cases import CASES, WEIGHTS, build_case

# Settings of whoever runs the tests, which are not those of the tests; a test that is about them
# sets its own. What is started in a process of its own is spared them too.
for name in list(os.environ):
    if name.startswith(("ACCELERATE_", "HYDRA_", "WANDB_")):
        del os.environ[name]

# Deterministic, so that a failure on one machine is the same failure on the next. The fixtures
# that hypothesis warns about are modules which no example changes.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=CASES)
def normalizer(request, _seed):
    """Each case in turn, with learned scalars at a random place."""
    return build_case(request.param)


@pytest.fixture(params=[case for case in CASES if case not in WEIGHTS])
def distribution(request, _seed):
    """The cases whose rows sum to one."""
    return build_case(request.param)


@pytest.fixture(
    params=[c for c, (name, _) in CASES.items() if name != "multimax" and c not in WEIGHTS]
)
def order_preserving(request, _seed):
    """The cases that look at differences of scores only, and never give a larger score less."""
    return build_case(request.param)


@pytest.fixture
def scores(_seed):
    """(2, 3, 4, 7) fp32 scores."""
    return 2 * torch.randn(2, 3, 4, 7)


@pytest.fixture
def mask(_seed):
    """(2, 1, 4, 7) bool: one row is masked completely, one has a single entry, the rest some."""
    mask = torch.rand(2, 1, 4, 7) < 0.6
    mask[..., 0] = True
    mask[0, 0, 1] = False
    mask[1, 0, 2] = torch.arange(7) == 4
    return mask


@pytest.fixture
def class_scores(_seed):
    """(5, 6) fp64 scores of an output layer."""
    return 2 * torch.randn(5, 6, dtype=torch.float64)


@pytest.fixture
def targets(_seed):
    """Targets of five rows and six classes, by kind; "one-hot" is "hard" as probabilities."""
    first, second = torch.randint(6, (2, 5))
    one_hot = F.one_hot(first, 6).double()
    return {
        "hard": first,
        "one-hot": one_hot,
        "mixup": 0.3 * one_hot + 0.7 * F.one_hot(second, 6).double(),
        "soft": torch.rand(5, 6, dtype=torch.float64).softmax(-1),
    }


@pytest.fixture
def few_inspected(monkeypatch):
    """What a result says of normalizers is of two batches of images, or four sentences.

    Of so many as usual it takes as long as the rest of a tiny run.
    """
    monkeypatch.setattr("multimax.tasks.image_classification.INSPECTED_IMAGES", 100)
    monkeypatch.setattr("multimax.tasks.translation.INSPECTED_SENTENCES", 4)


@pytest.fixture
def full_disk(request):
    """No file can grow beyond 20 kB, or another number of bytes: the kernel refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (getattr(request, "param", 20_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs `train.py` as the main module; its exit code, output and error output.

    In this process, because a new one imports for seconds. Tests of what a process does (signals,
    workers, launchers) start one.
    """
    from hydra.core.global_hydra import GlobalHydra

    logger = logging.getLogger("multimax")
    handlers = list(logger.handlers)

    def train(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        code = 0
        try:
            runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield train
    logger.handlers = handlers
    GlobalHydra.instance().clear()
