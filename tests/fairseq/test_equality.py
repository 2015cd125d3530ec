"""With identity scalars, every path gives the numbers of stock fairseq."""

import pytest
import torch
from conftest import FLAGS, MODELS, batch, incremental, normalizers, own_path, perturb
from fairseq.sequence_generator import SequenceGenerator

IDENTITY = normalizers("multimax:init=identity", "multimax:init=identity")
ALSO_IDENTITY = ["softmax:temperature=1.0", "multimax:order=1,affine=true,init=identity"]


@pytest.fixture(params=MODELS)
def pair(request, build):
    """A stock model and its twin."""
    return build(request.param), build(f"multimax_{request.param}", *IDENTITY)


def test_same_weights_under_the_same_seed(request, build):
    for name in MODELS:
        stock = build(name).model.state_dict()
        after = torch.rand(3)
        twin = build(f"multimax_{name}").model.state_dict()
        assert torch.equal(torch.rand(3), after)
        new = [key for key in twin if key not in stock]
        assert new
        assert all(key.endswith((".ts", ".ranges")) for key in new)
        unset = "_float_tensor"  # fairseq never initializes it
        same = [torch.equal(value, twin[k]) for k, value in stock.items() if unset not in k]
        assert all(same)
        assert len(same) > 10


def test_every_place_has_scalars_of_its_own(build):
    names = build("multimax_transformer_iwslt_de_en").model.state_dict()
    scalars = {name for name in names if name.endswith(".ts")}
    layers = [(side, i) for side in ("encoder", "decoder") for i in range(2)]
    assert scalars == {
        *(f"{side}.layers.{i}.self_attn.normalizer.ts" for side, i in layers),
        *(f"decoder.layers.{i}.encoder_attn.normalizer.ts" for i in range(2)),
        "decoder.output_projection.normalizer.ts",
    }
    values = [names[name] for name in scalars]
    assert len({tuple(value.tolist()) for value in values}) == len(values)
    names = build("multimax_transformer_lm_wiki103").model.state_dict()
    scalars = {name for name in names if name.endswith(".ts")}
    assert scalars == {
        *(f"decoder.layers.{i}.self_attn.normalizer.ts" for i in range(2)),
        *(f"decoder.adaptive_softmax.normalizers.{i}.ts" for i in range(3)),
    }


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_loss_and_gradients(pair, train):
    results = []
    for side in pair:
        own_path(side.model).train(train)
        torch.manual_seed(3)
        loss, size, _ = side.criterion(side.model, batch(side.task))
        loss.sum().backward()
        grads = {name: p.grad for name, p in side.model.named_parameters()}
        results.append((loss, size, grads))
    (loss, size, grads), (twin_loss, twin_size, twin_grads) = results
    assert torch.equal(loss.reshape(()), twin_loss.reshape(()))
    assert size == twin_size
    assert loss.item() > 0
    for name, grad in grads.items():
        assert torch.equal(twin_grads[name], grad), name


def test_teacher_forcing(pair):
    stock, twin = pair
    sample = batch(stock.task)
    expected_fused = stock.model(**sample["net_input"])[0]
    expected, extra = own_path(stock.model)(**sample["net_input"])
    output, twin_extra = twin.model(**sample["net_input"])
    assert torch.equal(output, expected)
    torch.testing.assert_close(output, expected_fused, rtol=0, atol=3e-6)
    if extra["attn"][0] is not None:
        assert torch.equal(twin_extra["attn"][0], extra["attn"][0])
    for given in (sample, None):
        probs, twin_probs = (
            side.model.get_normalized_probs((x.clone(),), log_probs=True, sample=given)
            for side, x in ((stock, expected), (twin, output))
        )
        rows = slice(None) if given is None else sample["target"].ne(1)
        target = sample["target"].unsqueeze(-1)
        if given is not None:
            probs, twin_probs = probs.gather(-1, target), twin_probs.gather(-1, target)
        assert torch.equal(twin_probs[rows], probs[rows])


def test_incremental_decoding(pair):
    stock, twin = pair
    if hasattr(stock.model, "encoder"):  # the decoder is never fused here, the encoder is
        own_path(stock.model.encoder)
    sample = batch(stock.task)
    assert torch.equal(incremental(twin.model, sample), incremental(stock.model, sample))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalizer", ALSO_IDENTITY)
def test_other_identities(build, name, normalizer):
    stock, twin = build(name), build(f"multimax_{name}", *normalizers(normalizer, normalizer))
    sample = batch(stock.task)["net_input"]
    expected = own_path(stock.model)(**sample)[0]
    output = twin.model(**sample)[0]
    if normalizer.startswith("softmax"):
        assert torch.equal(output, expected)
    else:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def translate(side, sample, beam=5):
    generator = SequenceGenerator([side.model], side.task.target_dictionary, beam, max_len_b=12)
    found = generator.generate([side.model], sample)
    return [[(h["tokens"].tolist(), h["score"].item()) for h in sentence] for sentence in found]


def test_beam_search(build):
    """Cross-attention shares the source among hypotheses here."""
    name = "transformer_iwslt_de_en"
    stock, twin = build(name), build(f"multimax_{name}", *IDENTITY)
    own_path(stock.model)
    sample = batch(stock.task)
    expected = translate(stock, sample)
    assert translate(twin, sample) == expected
    assert any(len(set(map(str, sentence))) > 1 for sentence in expected)
    changed = perturb(build(f"multimax_{name}", *IDENTITY).model)
    twin.model = changed
    assert translate(twin, sample) != expected


@pytest.mark.parametrize("name", MODELS)
def test_softmax_is_the_stock_model_itself(build, name):
    stock = build(name).model
    twin = build(f"multimax_{name}", *normalizers("softmax", "softmax")).model
    assert [type(m) for m in stock.modules()][1:] == [type(m) for m in twin.modules()][1:]
    assert FLAGS[name] == [] or stock.decoder.share_input_output_embed
