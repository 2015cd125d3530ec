"""Relative positions of the language model, next to attention that is written out in loops."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import MULTIMAX, PAD, SOFTMAX, WORDS, close, draw, language_model

from multimax import registered_normalizers
from multimax.models.positions import bias_slopes

RELATIVE = ("none", "alibi", "nape", "rotary")
SLOPES = {
    "none": [0, 0, 0, 0],
    "alibi": [1 / 4, 1 / 16, 1 / 64, 1 / 256],
    "nape": [0, 0, 1, 1 / 2],
    "rotary": [0, 0, 0, 0],
}
every_kind = pytest.mark.parametrize("positions", RELATIVE)


def turned(vector, place):
    """Numbers i and i + half as one complex number, turned by place / 10000^(2 i / width)."""
    half = len(vector) // 2
    numbers = [
        complex(vector[i], vector[i + half]) * cmath.exp(1j * place * 10000 ** (-i / half))
        for i in range(half)
    ]
    return [number.real for number in numbers] + [number.imag for number in numbers]


def attended(attn, x, positions):
    """Self-attention of one row (tokens, 16) with four heads, a score after the other."""
    queries, keys, values = (
        projection(x).view(-1, 4, 4).tolist()
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    out = torch.zeros(len(x), 4, 4, dtype=torch.float64)
    for head, slope in enumerate(SLOPES[positions]):
        for i in range(len(x)):
            scores = []
            for j in range(i + 1):
                query, key = queries[i][head], keys[j][head]
                if positions == "rotary":
                    query, key = turned(query, i), turned(key, j)
                scores.append(sum(a * b for a, b in zip(query, key, strict=True)) / 2)
            row = torch.tensor(scores, dtype=torch.float64)
            bias = -slope * torch.arange(i, -1, -1, dtype=torch.float64)
            p = attn.normalizer.biased(row, bias) if slope else attn.normalizer(row)
            out[i, head] = p @ torch.tensor([v[head] for v in values[: i + 1]], dtype=p.dtype)
    return attn.out_proj(out.flatten(1))


@pytest.mark.parametrize("attention", [SOFTMAX, MULTIMAX], ids=lambda mapping: mapping["name"])
@every_kind
def test_attention_is_that_of_loops(positions, attention):
    model, tokens = language_model(attention, positions=positions), draw()
    with torch.no_grad():
        for row, found in zip(tokens, model(tokens), strict=True):
            x = math.sqrt(16) * model.decoder.embed_tokens.weight[row]
            for layer in model.decoder.layers:
                x = x + attended(layer.self_attn, layer.self_attn_layer_norm(x), positions)
                x = x + layer.fc2(F.relu(layer.fc1(layer.final_layer_norm(x))))
            close(found, model.decoder.layer_norm(x))


def test_slopes():
    for name in ("alibi", "nape"):
        assert bias_slopes(name, 4) == SLOPES[name]
    assert bias_slopes("alibi", 8) == [2.0**-head for head in range(1, 9)]  # as in its paper
    assert bias_slopes("nape", 2) == [0, 1]


@pytest.mark.parametrize("attention", registered_normalizers())
@every_kind
def test_step_by_step_equals_parallel(positions, attention):
    # No word twice in a row: without positions, top-k would have to choose between equal scores.
    places = torch.rand(3, WORDS - 2, generator=torch.Generator().manual_seed(2))
    tokens = 2 + places.argsort(1)[:, :7]
    tokens[0, :3] = PAD
    mapping = {"name": attention} | ({"k": 3} if attention == "topk" else {})
    model, real = language_model(mapping, positions=positions), tokens != PAD
    cache = model.new_cache()
    steps = [model.step(part, cache) for part in tokens.split([3, 1, 1, 2], 1)]
    close(torch.cat(steps, 1)[real], model(tokens)[real])


@every_kind
def test_rows_that_are_reordered_keep_their_positions(positions):
    model, tokens, rows = language_model(positions=positions), draw(3, 7), torch.tensor([2, 0, 2])
    cache = model.new_cache()
    model.step(tokens[:, :4], cache)
    cache.reorder(rows)
    close(model.step(tokens[rows, 4:], cache), model(tokens[rows])[:, 4:])


@every_kind
def test_padding_before_or_after_a_row_changes_nothing(positions):
    model, tokens = language_model(positions=positions), draw(2, 5)
    pad = torch.full((2, 3), PAD)
    close(model(torch.cat([pad, tokens, pad], 1))[:, 3:8], model(tokens))


def test_the_order_of_words_matters_to_all_but_none():
    tokens = draw(1, 6)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    assert tokens[0, 0] != tokens[0, 1]
    for positions in (*RELATIVE, "sinusoidal"):
        model = language_model(positions=positions, depth=1)
        same = torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], rtol=0, atol=1e-12)
        assert same == (positions == "none")


def test_weights_do_not_depend_on_positions():
    """And so a checkpoint is one of any of them; sinusoidal ones are the default."""
    plain, tokens = language_model(), draw()
    for positions in (*RELATIVE, "sinusoidal"):
        model = language_model(positions=positions)
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        assert torch.equal(model(tokens), plain(tokens)) == (positions == "sinusoidal")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_lower_precision(positions, dtype):
    model, tokens = language_model(positions=positions), draw()
    expected = model(tokens)
    found = model.to(dtype)(tokens)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(positions="learned"), r"positions=.*learned.*sinusoidal"),
        (dict(positions="nape", num_heads=1), "positions=nape needs an even num_heads, got .*=1"),
        (dict(positions="rotary", num_heads=16), "positions=rotary needs heads of an even width"),
    ],
)
def test_positions_that_cannot_be_had(options, said):
    with pytest.raises(ValueError, match=said):
        language_model(**options)


def test_long_rows_are_finite():
    model = language_model(positions="alibi").float()
    assert model(draw(1, 600, WORDS)).isfinite().all()
