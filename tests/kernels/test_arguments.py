"""What the kernels, which take addresses, must refuse before they look at memory."""

import pytest
import torch

from multimax import MultiMax, SoftMax, build_normalizer, linear_output_loss, registered_normalizers
from multimax.attention import attention


@pytest.mark.parametrize("name", registered_normalizers())
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool])
def test_dtypes_that_are_no_scores(name, dtype):
    with pytest.raises(ValueError, match=f"scores must be float16, .* got {dtype}: use .float"):
        build_normalizer(name)(torch.zeros(4, 16).to(dtype))


class Doubled(MultiMax):
    """Gives its coefficients in another dtype than it is asked for."""

    def coefficients(self, dtype, device):
        return super().coefficients(torch.float64, device)


def test_coefficients_of_another_dtype():
    with pytest.raises(ValueError, match=r"coefficients must be torch\.float32 on cpu, .*float64"):
        Doubled()(torch.randn(4, 16))
    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"coefficients must be torch\.float32 on cpu, .*float64"):
        attention(query, query, query, Doubled())
    assert torch.isfinite(Doubled()(torch.randn(4, 16, dtype=torch.float64))).all()


@pytest.mark.parametrize("soft", [False, True])
def test_a_target_elsewhere(soft):
    target = torch.rand(3, 5).softmax(-1) if soft else torch.tensor([0, 1, 2])
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        linear_output_loss(SoftMax(), torch.randn(3, 4), torch.randn(5, 4), target.to("meta"))
