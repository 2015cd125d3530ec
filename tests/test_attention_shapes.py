"""Attention of shapes that broadcast, next to torch's on expanded tensors."""

import pytest
import torch
import torch.nn.functional as F

from multimax import MultiMax, SoftMax
from multimax.attention import _obstacle, attention

# Leading dimensions of the query, of key and value, and of the result.
LEADING = [
    ((), (2, 3), (2, 3)),
    ((2, 3), (), (2, 3)),
    ((3,), (3,), (3,)),
    ((2, 3), (1, 3), (2, 3)),
    ((1, 3), (2, 3), (2, 3)),
    ((3, 3), (1, 3), (3, 3)),
    ((1, 3), (3, 3), (3, 3)),
    ((2, 4), (2, 2), (2, 4)),
    ((1, 4), (2, 2), (2, 4)),  # grouped heads
    ((2, 1, 3), (1, 2, 3), (2, 2, 3)),
]


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("masked", ["no", "alike", "each"])
@pytest.mark.parametrize(("of_query", "of_key", "leading"), LEADING, ids=str)
def test_leading_dimensions_broadcast(of_query, of_key, leading, masked, backend):
    query = torch.randn(*of_query, 5, 8, dtype=torch.float64)
    key, value = (torch.randn(*of_key, 7, dim, dtype=torch.float64) for dim in (8, 4))
    mask = {"no": None, "alike": torch.rand(5, 7) < 0.6, "each": torch.rand(*leading, 5, 7) < 0.6}
    mask = mask[masked]
    if mask is not None:
        mask[..., 0] = True
    groups = leading[-1] // of_key[-1] if of_key else 1
    wide = [
        tensor.repeat_interleave(groups, -3) if groups > 1 else tensor for tensor in (key, value)
    ]
    wide = [tensor.expand(*leading, *tensor.shape[-2:]) for tensor in (query, *wide)]
    out = attention(query, key, value, SoftMax(), mask, backend=backend)
    assert out.shape == (*leading, 5, 4)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*wide, attn_mask=mask))


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_keys_without_values_and_masks_of_more_dimensions(backend):
    query, key, value = torch.ones(3, 5, 8), torch.ones(3, 7, 8), torch.ones(3, 6, 8)
    with pytest.raises(ValueError, match=r"query .* key and value one number of keys"):
        attention(query, key, value, SoftMax(), backend=backend)
    with pytest.raises(ValueError, match=r"query and key must have one head_dim"):
        attention(query[..., :4], key, key, SoftMax(), backend=backend)
    mask = torch.ones(3, 3, 5, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="must broadcast to the scores, of shape"):
        attention(query, key, key, SoftMax(), mask, backend=backend)


@pytest.mark.parametrize(
    ("dims", "takes"), [((128, 128), True), ((129, 129), False), ((64, 32), False)]
)
def test_head_dimensions_of_the_triton_kernel(monkeypatch, dims, takes):
    monkeypatch.setattr("multimax.attention.triton_obstacle", lambda tensor: None)
    query, value = (torch.ones(1, 1, 2, dim) for dim in dims)
    obstacle = _obstacle("triton", query, query, value, MultiMax())
    assert (obstacle is None) == takes
    assert takes or f"head dimensions are {dims[0]} and {dims[1]}" in obstacle
