"""`torch.nn`'s attention and Transformers with another normalizer: outputs, masks, fused forms."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from multimax import MultiMax, replace_softmax, restore_softmax, verify_replacement

BATCH, QUERIES, KEYS, WIDTH, HEADS = 2, 5, 7, 12, 3
# With dims: batch_first, and what the layer appends to the keys.
LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "other dims": {"kdim": 8, "vdim": 10, "batch_first": True},
}


def attend(layer, **options):
    torch.manual_seed(1)
    sizes = (QUERIES, WIDTH), (KEYS, layer.kdim), (KEYS, layer.vdim)
    tensors = [torch.randn(BATCH, *size) for size in sizes]
    if not layer.batch_first:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    return layer(*tensors, **options)


def masks():
    torch.manual_seed(2)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, -2:] = True
    hidden = torch.rand(QUERIES, KEYS) < 0.3
    hidden[:, 0] = False
    per_head = (torch.rand(BATCH * HEADS, QUERIES, KEYS) < 0.3) & ~(torch.arange(KEYS) == 0)
    relative = torch.randn(BATCH * HEADS, QUERIES, KEYS)
    additive = torch.zeros(QUERIES, KEYS).masked_fill(hidden, -torch.inf)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "boolean": {"attn_mask": hidden},
        "both": {"attn_mask": per_head, "key_padding_mask": padding},
        "additive": {"attn_mask": additive},
        "bias": {"attn_mask": relative, "key_padding_mask": padding.float() * -1e9},
    }


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("layer", "mask", "need_weights", "average"),
    list(itertools.product(LAYERS, masks(), [False, True], [False, True])),
)
def test_attention_starts_as_itself(layer, mask, need_weights, average, training):
    original = nn.MultiheadAttention(WIDTH, HEADS, **LAYERS[layer]).train(training)
    replaced = copy.deepcopy(original)
    replace_softmax(replaced)
    options = {"need_weights": need_weights, "average_attn_weights": average, **masks()[mask]}
    out, weights = attend(replaced, **options)
    expected, expected_weights = attend(original, **options)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert out.stride() == expected.stride() or layer != "batch_first"
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)
    else:
        assert weights is None


def test_unbatched_attention():
    original = nn.MultiheadAttention(WIDTH, HEADS)
    replaced = copy.deepcopy(original)
    replace_softmax(replaced)
    query, key = torch.randn(QUERIES, WIDTH), torch.randn(KEYS, WIDTH)
    padding = torch.arange(KEYS) > 4
    for ours, theirs in zip(
        replaced(query, key, key, key_padding_mask=padding),
        original(query, key, key, key_padding_mask=padding),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_a_finite_mask_is_added_after_the_modulation():
    layer = nn.MultiheadAttention(WIDTH, 1, bias=False)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(WIDTH).repeat(3, 1))
    replace_softmax(layer, init="paper")
    with torch.no_grad():
        layer.normalizer.ts.copy_(torch.tensor([0.5, -0.4, 0.2, 0.1]))
    x, bias = torch.randn(KEYS, WIDTH), torch.randn(KEYS, KEYS)
    scores = x @ x.T / WIDTH**0.5
    _, weights = layer(x, x, x, attn_mask=bias)
    expected = (layer.normalizer.modulate(scores) + bias).softmax(-1)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)
    restore_softmax(layer)
    replace_softmax(layer, init="paper", bias_place="before")
    with torch.no_grad():
        layer.normalizer.ts.copy_(torch.tensor([0.5, -0.4, 0.2, 0.1]))
    _, weights = layer(x, x, x, attn_mask=bias)
    torch.testing.assert_close(weights, layer.normalizer(scores + bias), atol=1e-6, rtol=1e-5)


def transformer(kind, **options):
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 16, "batch_first": True, **options}
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes, dropout=0.0), 2)
    if kind == "layer":
        return nn.TransformerEncoderLayer(**sizes, dropout=0.0)
    return nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, dropout=0.0, **sizes)


def arguments(kind):
    torch.manual_seed(3)
    source, target = torch.randn(BATCH, KEYS, WIDTH), torch.randn(BATCH, QUERIES, WIDTH)
    padding = torch.arange(KEYS) > torch.tensor([[4], [6]])
    if kind in ("encoder", "layer"):
        return (source,), {"src_key_padding_mask": padding}
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    return (source, target), {
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": causal,
        "tgt_is_causal": True,
    }


COUNT = {"encoder": 2, "layer": 1, "transformer": 6}


@pytest.mark.parametrize("kind", COUNT)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_start_as_themselves_and_use_the_normalizers(kind, training, gradients):
    original = transformer(kind).train(training)
    replaced = copy.deepcopy(original)
    report = replace_softmax(replaced)
    assert len(report.attention) == COUNT[kind]
    args, kwargs = arguments(kind)
    with torch.set_grad_enabled(gradients):
        out, expected = replaced(*args, **kwargs), original(*args, **kwargs)
        kept = kwargs["src_key_padding_mask"].logical_not() if kind != "transformer" else ...
        torch.testing.assert_close(out[kept], expected[kept], atol=3e-6, rtol=1e-5)
        with torch.no_grad():
            for module in replaced.modules():
                if isinstance(module, MultiMax):
                    module.ts.fill_(1.0)
        assert (replaced(*args, **kwargs) - expected)[kept].abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_fused_encoder_comes_back():
    model = transformer("encoder").eval()
    args, kwargs = arguments("encoder")
    with torch.no_grad():
        expected = model(*args, **kwargs)
        replace_softmax(model, "sparsemax")
        assert not model(*args, **kwargs).equal(expected)
        assert restore_softmax(model) == 2
        assert model(*args, **kwargs).equal(expected)
    assert type(model) is nn.TransformerEncoder
    assert not any("normalizer" in name for name in model.state_dict())


@pytest.mark.parametrize("way", ["copy", "pickle", "save"])
def test_copies_keep_the_scalars(way):
    model = transformer("transformer")
    replace_softmax(model, init="paper")
    if way == "copy":
        again = copy.deepcopy(model)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    args, kwargs = arguments("transformer")
    assert again(*args, **kwargs).equal(model(*args, **kwargs))
    states = again.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(tensor) for name, tensor in states[1].items())
    with torch.no_grad():
        again.encoder.layers[0].self_attn.normalizer.ts.add_(1)
    assert not again(*args, **kwargs).equal(model(*args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_graph(kind):
    model = transformer(kind)
    replace_softmax(model, init="paper")
    args, kwargs = arguments(kind)
    expected = model(*args, **kwargs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **kwargs), expected, atol=2e-6, rtol=1e-5)
    exported = torch.export.export(model, args, kwargs).module()
    torch.testing.assert_close(exported(*args, **kwargs), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_verification_of_a_transformer():
    model = transformer("transformer")
    replace_softmax(model)
    args, kwargs = arguments("transformer")
    verification = verify_replacement(model, *args, **kwargs)
    assert verification.evaluation < 2e-6
    assert verification.training < 2e-6
    assert verification.called == verification.normalizers == 6
    assert all(gradient > 0 for gradient in verification.gradients.values())
    assert model.training
    assert "6 of 6" in str(verification)
    with torch.no_grad():
        model.encoder.layers[0].self_attn.normalizer.ts.fill_(1.0)
    assert verify_replacement(model, *args, **kwargs).evaluation > 1e-3
