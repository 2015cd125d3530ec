import math

import pytest
import torch

from multimax import registered_normalizers
from multimax.decoding import beam_search
from multimax.models.transformer import TranslationModel

PAD, EOS, WORDS, SOURCE_WORDS = 1, 2, 12, 20
SOFTMAX = {"name": "softmax"}
SPARSEMAX = {"name": "sparsemax"}
# Of what may be an output layer too: softpick and sigmoid have no loss.
BOTH = [name for name in registered_normalizers() if name not in ("softpick", "sigmoid")]
MAPPINGS = {name: {"name": name} for name in BOTH} | {"topk": {"name": "topk", "k": 3}}
SIZES = dict(embed_dim=16, ffn_dim=24, num_heads=4)


def translation_model(attention=SOFTMAX, output=SOFTMAX, seed=0):
    torch.manual_seed(seed)
    options = dict(attention=attention, output=output, encoder_depth=1, decoder_depth=2, **SIZES)
    options |= dict(tie_embeddings=False)
    model = TranslationModel(SOURCE_WORDS, WORDS, PAD, **options).double().eval()
    norm = model.decoder.layers[-1].final_layer_norm
    with torch.no_grad():  # words of very different probability, eos neither common nor rare
        norm.bias.normal_(std=0.5)
        model.output.weight.mul_(1.5)
        model.output.weight[EOS] += norm.bias / norm.bias.square().sum()
    return model


def sources():
    """Five sentences of different lengths, with padding on either side."""
    tokens = torch.randint(3, SOURCE_WORDS, (5, 6), generator=torch.Generator().manual_seed(1))
    tokens[0, :3] = PAD
    tokens[1, 4:] = PAD
    tokens[4, 1:] = PAD
    return tokens


@torch.no_grad()
def reference(model, source, beam, length_penalty=1.0, max_len=8, min_len=1, bos=EOS):
    """Beam search of one sentence without batch, cache or tensors: (tokens, score) pairs."""
    memory = model.encode(source[source != PAD].unsqueeze(0))
    live, finished = [([], 0.0)], []
    for step in range(max_len + 1):
        candidates = []
        for tokens, score in live:
            begun = torch.tensor([[bos, *tokens]])
            features = model.decoder(begun, model.new_cache(memory))[0, -1]
            for word, value in enumerate(model.output.log_probabilities(features).tolist()):
                must_not = step < min_len if word == EOS else step == max_len or word == PAD
                candidates.append(([*tokens, word], -math.inf if must_not else score + value))
        candidates.sort(key=lambda candidate: -candidate[1])
        candidates = [c for c in candidates[: 2 * beam] if c[1] > -math.inf]
        for tokens, score in candidates[:beam]:
            if tokens[-1] == EOS and len(finished) < beam:
                finished.append((tokens, score / len(tokens) ** length_penalty))
        going_on = [c for c in candidates if c[0][-1] != EOS][:beam]
        if not going_on or len(finished) == beam:
            break
        live = going_on
    finished = finished or [([*live[0][0], EOS], -math.inf)]
    return sorted(finished, key=lambda hypothesis: -hypothesis[1])


def check(found, expected):
    assert len(found) == len(expected)
    for hypotheses, pairs in zip(found, expected, strict=True):
        assert [h.tokens for h in hypotheses] == [tokens for tokens, _ in pairs]
        for hypothesis, (_, score) in zip(hypotheses, pairs, strict=True):
            assert hypothesis.score == pytest.approx(score, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("name", MAPPINGS)
def test_beam_search_is_that_of_the_reference(name, beam):
    lengths, best = set(), set()
    for seed in (0, 1):
        model = translation_model(MAPPINGS[name], MAPPINGS[name], seed)
        found = beam_search(model, sources(), eos=EOS, beam=beam, max_len_b=8)
        check(found, [reference(model, source, beam) for source in sources()])
        lengths |= {len(h.tokens) for hypotheses in found for h in hypotheses}
        best |= {tuple(hypotheses[0].tokens) for hypotheses in found}
    assert len(lengths) > 2  # else the test shows little
    assert len(best) > 2


@pytest.mark.slow
@pytest.mark.parametrize("output", [SOFTMAX, SPARSEMAX])
@pytest.mark.parametrize(
    "options",
    [
        dict(length_penalty=0.0),
        dict(length_penalty=2.0),
        dict(min_len=0),
        dict(min_len=4),
        dict(bos=5),
    ],
)
def test_options_of_beam_search(options, output):
    model = translation_model(output=output)
    found = beam_search(model, sources(), eos=EOS, beam=3, max_len_b=8, **options)
    check(found, [reference(model, source, 3, **options) for source in sources()])
    plain = beam_search(model, sources(), eos=EOS, beam=3, max_len_b=8)
    assert found != plain
    assert min(len(h.tokens) for row in found for h in row) > options.get("min_len", 1)


def test_maximum_length_depends_on_the_sentence_alone():
    model = translation_model()
    found = beam_search(model, sources(), eos=EOS, beam=3, max_len_a=1.5, max_len_b=1)
    longest = [int(1.5 * int((source != PAD).sum()) + 1) for source in sources()]
    assert longest == [5, 7, 10, 10, 2]
    expected = [
        reference(model, source, 3, max_len=length)
        for source, length in zip(sources(), longest, strict=True)
    ]
    check(found, expected)
    assert any(
        len(h.tokens) == length + 1 for row, length in zip(found, longest, strict=True) for h in row
    )


def test_a_sparse_output_may_leave_fewer_hypotheses_than_beams():
    model = translation_model(SOFTMAX, SPARSEMAX)
    with torch.no_grad():
        model.output.weight.mul_(3)
    found = beam_search(model, sources(), eos=EOS, beam=5, max_len_b=8)
    check(found, [reference(model, source, 5) for source in sources()])
    assert min(len(hypotheses) for hypotheses in found) < 5
    assert all(h.tokens.count(EOS) == 1 and PAD not in h.tokens for row in found for h in row)


def test_words_without_probability_are_chosen_if_there_is_nothing_else():
    model = translation_model(SOFTMAX, SPARSEMAX)
    bias = model.decoder.layers[-1].final_layer_norm.bias
    with torch.no_grad():
        model.output.weight[EOS] = -50 * bias / bias.square().sum()
    found = beam_search(model, sources(), eos=EOS, beam=3, max_len_b=4)
    assert len(found) == len(sources()) > 0
    for (hypothesis,) in found:
        assert hypothesis.score == -math.inf
        assert len(hypothesis.tokens) == 5
        assert hypothesis.tokens.index(EOS) == 4
    with torch.no_grad():
        model.output.weight[EOS] *= -1  # all mass on eos, which min_len does not allow yet
    for (hypothesis,) in beam_search(model, sources(), eos=EOS, beam=3, max_len_b=4):
        assert (hypothesis.tokens, hypothesis.score) == ([EOS], -math.inf)
    for (hypothesis,) in beam_search(model, sources(), eos=EOS, beam=3, min_len=0):
        assert (hypothesis.tokens, hypothesis.score) == ([EOS], 0.0)


def test_sentences_that_are_done_leave_the_batch():
    model, rows = translation_model(), []
    model.decoder.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].size(0)))
    found = beam_search(model, sources(), eos=EOS, beam=2, max_len_b=8)
    assert rows[:2] == [5, 10]
    assert rows == sorted(rows[:1]) + sorted(rows[1:], reverse=True)
    assert rows[-1] < 10
    assert len(rows) <= max(len(h.tokens) for row in found for h in row)


def test_beam_search_of_no_sentences():
    assert beam_search(translation_model(), sources()[:0], eos=EOS) == []


def test_beam_search_errors():
    model = translation_model()
    for beam in (0, WORDS):
        with pytest.raises(ValueError, match=rf"beam must be in \[1, 12\).*, got {beam}"):
            beam_search(model, sources(), eos=EOS, beam=beam)
    with pytest.raises(ValueError, match=r"min_len=3 must be in \[0, maximum length\], which is 2"):
        beam_search(model, sources(), eos=EOS, min_len=3, max_len_b=2)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        beam_search(model.train(), sources(), eos=EOS)
    with torch.no_grad():
        model.eval().output.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="NaN as a probability of word 1"):
        beam_search(model, sources(), eos=EOS)
