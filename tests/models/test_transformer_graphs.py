"""The Transformers as one graph: torch.compile with fullgraph=True."""

import pytest
import torch
from tiny_transformers import MULTIMAX, PAD, SOURCE_WORDS, draw, language_model, translation_model
from torch import nn

ADAPTIVE = dict(adaptive_cutoffs=[10, 20], adaptive_factor=2, positions="nape")
SPARSE = ({"name": "entmax", "alpha": 1.3}, {"name": "sparsemax"})

pytestmark = pytest.mark.slow


class Probabilities(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tokens):
        return self.model.output.probabilities(self.model(*tokens))


def padded(words=30, length=6):
    tokens = draw(length=length, words=words)
    tokens[1, -2:] = PAD
    return tokens


MODELS = {
    "language": lambda: (language_model(MULTIMAX, MULTIMAX), (padded(),)),
    "sparse": lambda: (language_model(*SPARSE, positions="rotary"), (padded(),)),
    "adaptive": lambda: (language_model(MULTIMAX, MULTIMAX, **ADAPTIVE), (padded(),)),
    "translation": lambda: (
        translation_model(MULTIMAX, MULTIMAX),
        (padded(SOURCE_WORDS), padded(length=4)),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_compile_to_one_graph(name):
    torch._dynamo.reset()
    model, tokens = MODELS[name]()
    module = Probabilities(model)
    weights = torch.rand_like(module(*tokens))
    parameters = list(module.parameters())

    def run(function):
        p = function(*tokens)
        return p, *torch.autograd.grad((p * weights).sum(), parameters, allow_unused=True)

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(module))


@each_model
def test_a_compiled_token_outside_the_vocabulary_is_an_error(name):
    torch._dynamo.reset()
    model, tokens = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for wrong in (30, -1):
        bad = [t.clone().index_fill_(1, torch.tensor([0]), wrong) for t in tokens]
        with pytest.raises(IndexError):
            compiled(*bad)
