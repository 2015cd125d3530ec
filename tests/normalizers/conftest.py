import pytest

from multimax.kernels.backend import use_backend


@pytest.fixture(autouse=True, params=["auto", "eager"])
def _backend(request):
    """What is promised holds for the definition and for the kernels."""
    with use_backend(request.param):
        yield
