"""Training with every normalizer, its checkpoints, and the loss of sparse outputs."""

import math

import pytest
import torch
from conftest import MODELS, NORMALIZERS, batch, normalizers, perturb, train
from fairseq.checkpoint_utils import load_model_ensemble_and_task

from multimax.integrations.fairseq.convert import build_model, to_multimax
from multimax.integrations.fairseq.output import decoder_output

SPARSE = ["topk:k=3", "sparsemax", "entmax15", "entmax:alpha=1.3,learned=true", "evsoftmax"]
OUTPUT_LOSS = ["--criterion", "multimax_output_loss"]


def options_of(module):
    """What tells two normalizers apart."""
    return type(module).__name__, module.extra_repr()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_two_updates(monkeypatch, build, data, tmp_path, name, normalizer):
    chosen = normalizers(normalizer, normalizer)
    criterion = OUTPUT_LOSS if normalizer in SPARSE else []
    folder = data / ("mt" if "iwslt" in name else "lm")
    path = train(monkeypatch, folder, tmp_path, f"multimax_{name}", *chosen, *criterion)
    state = torch.load(path, weights_only=True)
    assert math.isfinite(state["extra_state"]["val_loss"])
    assert state["optimizer_history"][-1]["num_updates"] == 2

    # The checkpoint alone says which normalizers to build.
    (model,), _, _ = load_model_ensemble_and_task([str(path)])
    fresh = build(f"multimax_{name}", *chosen, *criterion).model
    for (where, module), (_, other) in zip(
        model.named_modules(), fresh.named_modules(), strict=True
    ):
        assert type(module) is type(other)
        if "normalizer" in where and not where.endswith("normalizers"):
            assert options_of(module) == options_of(other)
    initial = dict(fresh.named_parameters())
    for key, parameter in model.named_parameters():
        if "normalizer" in key:
            assert not torch.equal(parameter, initial[key]), f"{key} was not trained"


@pytest.mark.parametrize("normalizer", SPARSE)
@pytest.mark.parametrize("name", MODELS)
def test_sparse_output_needs_its_own_loss(build, name, normalizer):
    side = build(f"multimax_{name}", *normalizers("softmax", normalizer))
    sample = batch(side.task)
    with pytest.raises(ValueError, match="--criterion multimax_output_loss"):
        side.criterion(side.model.train(), sample)
    with pytest.raises(ValueError, match="perplexity of a sparse output is not defined"):
        side.model.eval().get_normalized_probs((None,), log_probs=True, sample=sample)


def test_no_normalizer_no_output_loss(build):
    side = build("multimax_transformer_lm", *normalizers("multimax", "softmax"), *OUTPUT_LOSS)
    with pytest.raises(ValueError, match="choose --output-normalizer"):
        side.criterion(side.model, batch(side.task))


def test_adaptive_softmax_has_no_label_smoothing(build):
    chosen = [*normalizers("softmax", "sparsemax"), *OUTPUT_LOSS, "--label-smoothing", "0.1"]
    side = build("multimax_transformer_lm_wiki103", *chosen)
    with pytest.raises(ValueError, match=r"no label smoothing, got 0\.1"):
        side.criterion(side.model, batch(side.task))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_output_loss_is_ours(build, name, normalizer):
    smoothing = 0.1 if "iwslt" in name else 0.0
    chosen = [*normalizers("softmax", normalizer), *OUTPUT_LOSS, "--label-smoothing", smoothing]
    side = build(f"multimax_{name}", *map(str, chosen))
    sample, model = batch(side.task), perturb(side.model)
    assert sample["target"].eq(1).any() or "lm" in name
    loss, size, logged = side.criterion(model, sample)
    assert size == sample["ntokens"] == logged["ntokens"]

    settings = vars(side.model_config) if "iwslt" in name else side.model_config
    ours = build_model(to_multimax({"cfg": {"model": settings}, "model": model.state_dict()}))
    tokens = [sample["net_input"]["src_tokens"]]
    tokens += [sample["net_input"]["prev_output_tokens"]] if "iwslt" in name else []
    options = dict(label_smoothing=smoothing, reduction="sum")
    expected = ours.output.loss(ours(*tokens), sample["target"], **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(loss, ours.output.loss(ours(*tokens), sample["target"] - 1, **options))


def test_likelihood_criterion_agrees_with_output_loss(build):
    """For MultiMax, fairseq's cross-entropy and the output's own loss are one number."""
    chosen = normalizers("multimax", "multimax:order=3")
    side = build("multimax_transformer_lm", *chosen)
    own = build("multimax_transformer_lm", *chosen, *OUTPUT_LOSS)
    sample = batch(side.task)
    loss, own_loss = (s.criterion(s.model, sample)[0] for s in (side, own))
    torch.testing.assert_close(own_loss, loss)
    assert decoder_output(side.model.decoder).normalizer.order == 3
