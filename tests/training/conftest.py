import pytest
from accelerate.state import AcceleratorState
from tiny import tiny_config


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def _all_inspect_few(few_inspected):
    pass


@pytest.fixture
def compose_tiny(tmp_path):
    """Composes a configuration of seconds that writes to `tmp_path`."""

    def compose(*overrides):
        return tiny_config(tmp_path, *overrides)

    return compose
