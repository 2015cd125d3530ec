"""Modules that are not known here: refused by name, or taken because the user vouches for them."""

import pytest
import torch
from torch import nn

from multimax import MultiMax, replace_softmax, verify_replacement


class Own(nn.Module):
    """Attention as people write it, with one SoftMax."""

    def __init__(self, softmax=None, times=1):
        super().__init__()
        self.projection = nn.Linear(8, 24)
        self.softmax = softmax
        self.times = times

    def forward(self, x, mask=None):
        query, key, value = self.projection(x).chunk(3, -1)
        scores = query @ key.mT / 8**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        for _ in range(self.times):
            weights = scores.softmax(-1) if self.softmax is None else self.softmax(scores)
        return weights @ value


class Processor:
    """Attention outside of the module that has it."""

    def __call__(self, module, x):
        return module.scores(x).softmax(-1) @ x


class Processed(nn.Module):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def scores(self, x):
        return x @ x.mT

    def forward(self, x):
        return self.processor(self, x)


def beside(module):
    return nn.Sequential(module, nn.TransformerEncoderLayer(8, 2))


@pytest.mark.parametrize("module", [Own(), Own(nn.Softmax(-1)), Processed()])
def test_what_is_not_known_is_refused_and_nothing_is_changed(module):
    model = beside(module)
    with pytest.raises(ValueError, match=r"0.*the class is not known: name the module in skip="):
        replace_softmax(model)
    assert not any(isinstance(m, MultiMax) for m in model.modules())
    report = replace_softmax(model, skip="0*")
    assert [entry.name for entry in report.attention] == ["1.self_attn"]
    assert len(report.left) == 1


@pytest.mark.parametrize("softmax", [None, nn.Softmax(-1)])
def test_a_class_that_the_user_vouches_for(softmax):
    torch.manual_seed(0)
    model, x = Own(softmax), torch.randn(2, 5, 8)
    mask = torch.ones(5, 5).tril().bool()
    expected = model(x, mask)
    report = replace_softmax(model, also=[Own])
    assert len(report.attention) == 1
    torch.testing.assert_close(model(x, mask), expected, atol=1e-6, rtol=1e-5)
    assert verify_replacement(model, x, mask).called == 1
    with torch.no_grad():
        model.normalizer.ts.fill_(0.5)
    out = model(x, mask)
    weights = model.normalizer(torch.zeros(2, 5, 5))  # masked entries stay masked
    assert weights.shape == (2, 5, 5)
    again = model(torch.cat([x[:, :4], torch.randn(2, 1, 8)], 1), mask)
    torch.testing.assert_close(again[:, :4], out[:, :4])  # none looks ahead


def test_two_softmax_in_one_forward_are_an_error():
    model = Own(times=2)
    replace_softmax(model, also=[Own])
    with pytest.raises(RuntimeError, match="normalized 2 times in one forward pass"):
        model(torch.randn(2, 5, 8))


def test_a_forward_that_a_hook_exchanged_is_refused():
    model = nn.TransformerEncoderLayer(8, 2)
    model.self_attn.forward = model.self_attn.forward  # of the instance, not of its class
    with pytest.raises(ValueError, match=r"self_attn.*its forward was exchanged"):
        replace_softmax(model)
    del model.self_attn.forward
    assert len(replace_softmax(model).attention) == 1


def test_a_second_replacement_and_bad_names_are_refused():
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="is no module that normalizes"):
        replace_softmax(nn.TransformerEncoderLayer(8, 2), skip="decoder.*")
    with pytest.raises(ValueError, match="'after' or 'before'"):
        replace_softmax(model, bias_place="inside")
    with pytest.raises(ValueError, match="nothing to replace"):
        replace_softmax(model, attention=False)
    with pytest.raises(ValueError, match="unknown normalizer 'multimx'"):
        replace_softmax(model, "multimx")
    replace_softmax(model)
    with pytest.raises(ValueError, match="another normalizer already"):
        replace_softmax(model, "sparsemax")
    with pytest.raises(ValueError, match="no attention layer"):
        replace_softmax(nn.Linear(2, 2))
