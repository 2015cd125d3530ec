"""Output layers of models of transformers whose scores are modulated."""

import pytest
import torch

from experiments.drop_in.transformers_models import build, inputs, move
from multimax import replace_softmax, restore_softmax

transformers = pytest.importorskip("transformers")


def test_the_output_layer_of_a_language_model():
    model = build("Llama")
    arguments = inputs("Llama", model)
    logits = model(**arguments).logits
    replace_softmax(model, attention=False, output=True)
    torch.testing.assert_close(model(**arguments).logits, logits, atol=1e-6, rtol=1e-6)
    move(model)
    expected = model.lm_head.normalizer.modulate(logits)
    torch.testing.assert_close(model(**arguments).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Gemma 2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
        ("Gemma 2", {"final_logit_softcapping": None}, None),
        ("ViT", {"problem_type": "multi_label_classification"}, "cross-entropy"),
        ("ViT", {"num_labels": 5}, None),
    ],
)
def test_output_layers_whose_scores_are_changed_later_are_refused(name, options, reason):
    model = build(name, **options)
    if reason is None:
        assert len(replace_softmax(model, attention=False, output=True).output) == 1
        return
    with pytest.raises(ValueError, match=reason):
        replace_softmax(model, output=True)


def test_a_bias_of_the_final_scores_is_refused():
    model = build("Marian")
    replace_softmax(model, attention=False, output=True)
    restore_softmax(model)
    model.final_logits_bias[0, 3] = 1.0
    with pytest.raises(ValueError, match="final_logits_bias"):
        replace_softmax(model, attention=False, output=True)


def test_loss_and_generation_are_those_of_the_output_normalizer():
    model = build("GPT-2")
    arguments = inputs("GPT-2", model)
    replace_softmax(model, attention=False, output=True)
    move(model, 2.0)
    tokens = arguments["input_ids"]
    out = model(tokens, labels=tokens)
    hidden = model.transformer(tokens).last_hidden_state
    scores = hidden @ model.lm_head.weight.T
    probabilities = model.lm_head.normalizer(scores[:, :-1])
    expected = -probabilities.gather(-1, tokens[:, 1:, None]).log().mean()
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)
    word = model.generate(tokens, max_new_tokens=1, do_sample=False)[:, -1]
    assert word.equal(model.lm_head.normalizer(scores[:, -1]).argmax(-1))
