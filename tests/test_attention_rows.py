"""Rows of scores that kernels of attention show to hooks which are content with some."""

import pytest
import torch
from kernels_here import needs_kernels

from multimax import MultiMax, SoftMax
from multimax.attention import ROWS, attention

pytestmark = needs_kernels


def seen_rows(normalizer, *tensors, **options):
    """The result of attention, and what a hook on some rows saw: scores, options, probabilities."""
    seen = []

    def hook(module, args, kwargs, out):
        seen.append((args[0], kwargs, out))

    hook.takes_rows = True
    handle = normalizer.register_forward_hook(hook, with_kwargs=True)
    out = attention(*tensors, normalizer, **options)
    handle.remove()
    assert len(seen) == 1
    return out, *seen[0]


def middles(size, count):
    return [int((part + 0.5) * size / count) for part in range(count)]


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("module", [SoftMax, MultiMax])
def test_rows_are_those_of_the_whole(module, place):
    normalizer = module().double()
    query = torch.randn(3, 4, 200, 8, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 3, 2, 210, 8, dtype=torch.float64)  # heads in groups of two
    bias = torch.randn(4, 1, 210, dtype=torch.float64)
    mask = torch.arange(210) < torch.tensor([210, 190, 150])[:, None, None, None]
    options = {"causal": True, "mask": mask, "bias": bias, "bias_place": place, "dropout": 0.3}
    torch.manual_seed(0)
    out, scores, kwargs, p = seen_rows(normalizer, query, key, value, **options)
    torch.manual_seed(0)
    assert out.equal(attention(query, key, value, normalizer, **options))
    assert out.requires_grad
    assert not p.requires_grad

    rows = middles(200, ROWS // 12)
    assert p.shape == (3, 4, len(rows), 210)
    whole = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    seen = mask & torch.ones(200, 210, dtype=torch.bool).tril(10)
    every = normalizer.biased(whole, bias, seen, place)[:, :, rows]
    torch.testing.assert_close(p, every, atol=1e-12, rtol=1e-12)
    expected = whole + (bias if place == "before" else 0)
    torch.testing.assert_close(scores, expected[:, :, rows], atol=1e-12, rtol=1e-12)
    assert kwargs["mask"].equal(seen.expand(3, 4, 200, 210)[:, :, rows])


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "items", "rows"),
    [
        (2, 2, 3, [0, 1], [0, 1, 2]),
        (700, 4, 5, middles(700, ROWS // 4), [2]),
        (1, 1, 5000, [0], middles(5000, ROWS)),
        (2, 1500, 7, [1], [3]),
    ],
)
def test_rows_are_spread_over_batch_and_queries(batch, heads, queries, items, rows):
    query = torch.randn(batch, heads, queries, 1)
    key = torch.randn(batch, heads, 3, 1)
    _, scores, *_ = seen_rows(SoftMax(), query, key, key, scale=1.0)
    torch.testing.assert_close(scores, (query @ key.mT)[items][:, :, rows])


def test_no_rows():
    for batch, queries in ((0, 3), (2, 0)):
        query, key = torch.randn(batch, 2, queries, 4), torch.randn(batch, 2, 3, 4)
        out, scores, *_ = seen_rows(MultiMax(), query, key, key)
        assert out.shape == query.shape
        assert scores.numel() == 0


def test_a_hook_that_wants_all_rows_gets_them():
    normalizer, shapes = MultiMax(), []
    for takes_rows in (True, False):

        def hook(module, args, out):
            shapes.append(out.shape)

        hook.takes_rows = takes_rows
        normalizer.register_forward_hook(hook)
    attention(*torch.randn(3, 2, 4, 300, 8), normalizer)
    assert shapes == 2 * [(2, 4, 300, 300)]
