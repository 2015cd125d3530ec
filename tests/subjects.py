"""What is exported, compiled, transformed and copied: every normalizer, attention, every model.

A subject is a module with a function that draws its inputs for sizes (batch, queries, keys). A
normalizer is one from the day it is registered; a model needs a line in MODELS, or a test fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from normalizer_cases import CASES, build_case
from torch import nn
from torch.export import Dim

from multimax.attention import attention
from multimax.models import registry
from multimax.models.adaptive import AdaptiveOutput
from multimax.models.transformer_layers import MultiheadAttention
from multimax.models.transformer_stacks import Cache
from multimax.models.vision import NormalizedAttention
from multimax.normalizers import EntMax, MultiMax, build_normalizer, registered_normalizers

HEADS, PADDING, WORDS, SOURCE_WORDS = 4, 1, 30, 20
# The first are the example's, from which nothing may be taken for granted: topk keeps 100.
SIZES = [(2, 4, 7), (3, 5, 130), (1, 3, 5)]
ANY = Dim.DYNAMIC
ROWS, TOKENS = {0: ANY, 2: ANY, 3: ANY}, {0: ANY, 1: ANY}

OVER_QUERIES = [f"{name}-over-queries" for name in ("topk-3", "sparsemax")]
# Their code is that of entmax-heads, multimax, softmax, multimax-steps and entmax.
REPEATED = (
    "entmax-learned", "entmax-1.2", "multimax-identity", "softmax-cold", "multimax-scaled",
    "asentmax",
)  # fmt: skip
NORMALIZERS = [*(c for c in CASES if c not in REPEATED), "entmax-heads", *OVER_QUERIES]
# Those in layers and behind models; entmax has the code of the two that are left out.
OPTIONS = {name: {} for name in registered_normalizers() if name not in ("entmax15", "asentmax")}
OPTIONS["topk"] = {"k": 3}
LANGUAGE = dict(vocabulary_size=WORDS, padding_index=PADDING, ffn_dim=24, depth=len(OPTIONS))
IMAGES = dict(num_classes=9, image_size=16, patch_size=8, depth=len(OPTIONS))
MODELS: dict[str, dict[str, Any]] = {
    "vision_transformer": IMAGES,
    "vision_transformer-class-token": IMAGES | dict(class_token=True, depth=1),
    "transformer_lm": LANGUAGE,
    "transformer_lm-adaptive": LANGUAGE
    | dict(adaptive_cutoffs=[10, 20], adaptive_factor=2, depth=1),
    "transformer": dict(
        source_vocabulary_size=SOURCE_WORDS, target_vocabulary_size=WORDS, padding_index=PADDING,
        ffn_dim=24, encoder_depth=len(OPTIONS) - 4, decoder_depth=2,
    ),
}  # fmt: skip
REGISTERED = registry.IMAGE_CLASSIFIERS | registry.LANGUAGE_MODELS | registry.TRANSLATION_MODELS
SUBJECTS = [*NORMALIZERS, "attention", *MODELS, "step"]


@dataclass
class Subject:
    """A module, what draws its inputs, and which of their dimensions may change."""

    module: nn.Module
    draw: Callable[[int, int, int], tuple[torch.Tensor, ...]]
    dynamic: tuple[dict[int, Any], ...]


class Normalized(nn.Module):
    """Probabilities along a dimension."""

    def __init__(self, normalizer, dim=-1):
        super().__init__()
        self.normalizer, self.dim = normalizer, dim

    def forward(self, scores, mask):
        return self.normalizer(scores, self.dim, mask)


class Attended(nn.Module):
    """Attention with a mask, with a causal one, with both, and with grouped heads."""

    def __init__(self, normalizer):
        super().__init__()
        self.normalizer = normalizer

    def forward(self, query, key, value, mask):
        few = key[:, :2], value[:, :2]
        return (
            attention(query, key, value, self.normalizer, mask=mask),
            attention(query, key, value, self.normalizer, causal=True),
            attention(query, *few, self.normalizer, mask=mask, causal=True),
        )


class WithOutput(nn.Module):
    """A model, its output, and what every normalizer makes of its scores."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.normalizers = nn.ModuleList(build_each())

    def forward(self, *inputs):
        y = self.model(*inputs)
        if isinstance(self.model.output, AdaptiveOutput):
            return y, self.model.output.probabilities(y)
        scores = self.model.output.scores(y) if hasattr(self.model.output, "scores") else y
        return y, *(normalizer(scores) for normalizer in self.normalizers)


class Step(nn.Module):
    """Decoding of a word: its probabilities, and keys and values with it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token, token_mask, keys, values):
        cache = Cache(1)
        cache.past, cache.token_mask = [(keys, values)], token_mask
        features = self.model.step(token, cache)
        return self.model.output.probabilities(features), *cache.past[0]


def build_each():
    return [build_normalizer(name, **options) for name, options in OPTIONS.items()]


def build_model(name):
    """A model; that without an option has each registered normalizer in a layer of attention."""
    softmax = {"name": "softmax"}
    options = dict(embed_dim=16, num_heads=HEADS, attention=softmax, output=softmax)
    kind = name.removesuffix("-class-token").removesuffix("-adaptive")
    model = REGISTERED[kind](**options | MODELS[name])
    kinds = (MultiheadAttention, NormalizedAttention)
    attentions = [part for part in model.modules() if isinstance(part, kinds)]
    assert len(attentions) >= len(OPTIONS) or kind != name
    for part, (own, settings) in zip(attentions, cycle(reversed(OPTIONS.items())), strict=False):
        part.normalizer = build_normalizer(own, **settings)
    if "adaptive" in name:
        model.output.normalizers = nn.ModuleList(build_each()[-len(model.output.bands) :])
    return model


def subject(name: str) -> Subject:
    torch.manual_seed(0)
    if name.endswith("-over-queries"):
        return Subject(Normalized(build_case(name[:-13]), -2), draw_scores, (ROWS, ROWS))
    if name in CASES:
        return Subject(Normalized(build_case(name)), draw_scores, (ROWS, ROWS))
    if name == "entmax-heads":
        normalizer = EntMax(1.4, learned=True, heads=HEADS)
        nn.init.normal_(normalizer.alpha_logit)
        return Subject(Normalized(normalizer), draw_scores, (ROWS, ROWS))
    if name == "attention":
        tokens = {0: ANY, 2: ANY}
        return Subject(Attended(MultiMax()), draw_attention, (tokens, tokens, tokens, ROWS))
    if name == "step":
        model = REGISTERED["transformer_lm"](
            **LANGUAGE | dict(embed_dim=16, num_heads=HEADS, depth=1),
            attention={"name": "multimax"}, output={"name": "sparsemax"},
        )  # fmt: skip
        past = {0: ANY, 2: ANY}
        return Subject(Step(model).eval(), draw_step, ({0: ANY}, TOKENS, past, past))
    module = WithOutput(build_model(name)).eval()
    if "vision" in name:
        return Subject(module, draw_images, (({0: ANY},),))
    if name == "transformer":
        return Subject(module, draw_pairs, ((TOKENS, TOKENS),))
    return Subject(module, lambda b, q, k: (draw_tokens(b, k, WORDS),), ((TOKENS,),))


def draw_mask(batch, queries, keys):
    """One row is masked completely."""
    mask = torch.rand(batch, 1, queries, keys) < 0.6
    mask[..., 0], mask[0, 0, 1] = True, False
    return mask


def draw_scores(batch, queries, keys):
    scores = 2 * torch.randn(batch, HEADS, queries, keys)
    scores[..., 2], scores[..., 0, 1] = -torch.inf, -1e9
    return scores, draw_mask(batch, queries, keys)


def draw_attention(batch, queries, keys):
    shapes = [(batch, HEADS, n, 8) for n in (queries, keys, keys)]
    return *(torch.randn(shape) for shape in shapes), draw_mask(batch, queries, keys)


def draw_tokens(batch, length, words):
    """The last sentence ends with padding."""
    tokens = torch.randint(2, words, (batch, length))
    tokens[-1, -(length // 3) :] = PADDING
    return tokens


def draw_pairs(batch, queries, keys):
    return draw_tokens(batch, keys, SOURCE_WORDS), draw_tokens(batch, queries, WORDS)


def draw_step(batch, queries, keys):
    past = [torch.randn(batch, HEADS, keys, 4) for _ in range(2)]
    return torch.randint(2, WORDS, (batch, 1)), torch.ones(batch, keys, dtype=torch.bool), *past


def draw_images(batch, queries, keys):
    return (torch.randn(batch, 3, 16, 16),)
