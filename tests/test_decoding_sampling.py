import pytest
import torch

from multimax.decoding import sample
from multimax.models.transformer import LanguageModel

PAD, EOS, WORDS = 1, 2, 12
SOFTMAX = {"name": "softmax"}
SPARSEMAX = {"name": "sparsemax"}
PROMPT = torch.tensor([3, 4, 5])


def language_model(output=SOFTMAX):
    torch.manual_seed(0)
    sizes = dict(embed_dim=16, ffn_dim=24, num_heads=4, depth=1)
    options = dict(attention=SOFTMAX, output=output, pre_norm=False, tie_embeddings=False)
    model = LanguageModel(WORDS, PAD, **sizes, **options).double().eval()
    with torch.no_grad():
        model.output.weight.mul_(0.6)
    return model


def probabilities(model, tokens):
    with torch.no_grad():
        return model.output.probabilities(model(tokens.unsqueeze(0)))[0, -1]


@pytest.fixture
def drawn_from(monkeypatch):
    """The distributions that words were drawn from."""
    distributions, multinomial = [], torch.multinomial

    def spy(distribution, *arguments, **options):
        distributions.append(distribution)
        return multinomial(distribution, *arguments, **options)

    monkeypatch.setattr(torch, "multinomial", spy)
    return distributions


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=3.0),
        dict(top_k=3),
        dict(top_p=0.9),
        dict(top_p=1.0),
        dict(top_k=3, top_p=0.7, temperature=3.0),
        dict(exclude=[EOS, 7]),
    ],
)
@pytest.mark.parametrize("output", [SOFTMAX, SPARSEMAX, {"name": "multimax"}])
def test_sample_draws_from_the_distribution_of_the_model(output, options, drawn_from):
    """Written out in plain Python."""
    model = language_model(output)
    weights = {
        word: p ** (1 / options.get("temperature", 1.0))
        for word, p in enumerate(probabilities(model, PROMPT).tolist())
        if word not in (PAD, *options.get("exclude", ())) and p > 0
    }
    kept = sorted(weights, key=lambda word: -weights[word])[: options.get("top_k", WORDS)]
    total, nucleus = sum(weights[word] for word in kept), []
    while kept and sum(weights[word] for word in nucleus) < options.get("top_p", 1.0) * total:
        nucleus.append(kept.pop(0))
    total = sum(weights[word] for word in nucleus)
    expected = [weights[word] / total if word in nucleus else 0.0 for word in range(WORDS)]
    (token,) = sample(model, PROMPT, max_tokens=1, **options)
    (found,) = drawn_from
    assert (found / found.sum()).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[token] > 0
    assert len(nucleus) > 1


def test_sample_draws_every_word_now_and_then():
    model, generator = language_model(SPARSEMAX), torch.Generator().manual_seed(0)
    options = dict(max_tokens=1, generator=generator)
    tokens = {token for _ in range(100) for token in sample(model, PROMPT, **options)}
    expected = probabilities(model, PROMPT).index_fill(0, torch.tensor([PAD]), 0.0)
    assert tokens == set(expected.nonzero().flatten().tolist())
    assert len(tokens) > 1


def test_sample_of_the_best_word_follows_the_text():
    model = language_model()
    text = PROMPT
    for token in sample(model, PROMPT, max_tokens=12, top_k=1):
        distribution = probabilities(model, text)
        distribution[PAD] = 0
        assert token == distribution.argmax()
        text = torch.cat([text, torch.tensor([token])])
    assert len(text) == 15
    assert len(text.unique()) > 4


def test_sample_repeats_with_the_generator():
    model = language_model()
    texts = [
        list(sample(model, PROMPT, max_tokens=20, generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sample_ends_after_eos():
    model = language_model()
    generator = torch.Generator().manual_seed(0)
    texts = [
        list(sample(model, PROMPT, max_tokens=30, eos=EOS, generator=generator)) for _ in range(20)
    ]
    assert any(text[-1] == EOS for text in texts)
    assert all(EOS not in text[:-1] for text in texts)
    assert all(len(text) == 30 or text[-1] == EOS for text in texts)


def test_sample_yields_each_token_when_it_is_drawn():
    model, steps = language_model(), []
    model.decoder.register_forward_hook(lambda _, inputs, __: steps.append(inputs[0].size(1)))
    tokens = sample(model, PROMPT, max_tokens=5)
    assert steps == []
    next(tokens)
    next(tokens)
    assert steps == [3, 1]  # the prompt at once, then each token with the cache
    assert not torch.is_inference_mode_enabled()
    assert len(list(tokens)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0.0), "temperature must be a finite number > 0, got 0.0: for the best"),
        (dict(temperature=float("inf")), "temperature must be a finite number > 0, got inf"),
        (dict(top_k=0), "top_k must be >= 1, got 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(prompt=torch.tensor([], dtype=torch.int64)), r"prompt must be \(tokens,\)"),
        (dict(prompt=torch.tensor([[3]])), r"prompt must be \(tokens,\)"),
        (dict(exclude=range(WORDS)), "no word that may be drawn has any probability"),
    ],
)
def test_sample_errors(options, message):
    with pytest.raises(ValueError, match=message):
        list(sample(language_model(), **(dict(prompt=PROMPT, max_tokens=2) | options)))


def test_sample_refuses_a_model_in_training_at_once():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        sample(language_model().train(), PROMPT, max_tokens=2)
