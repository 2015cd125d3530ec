"""Tiny Transformers with weights that are not those of the start, and tokens for them."""

import torch

from multimax import registered_normalizers
from multimax.models.transformer import LanguageModel, TranslationModel

PAD, WORDS, SOURCE_WORDS = 1, 30, 20
SOFTMAX = {"name": "softmax"}
MULTIMAX = {"name": "multimax"}
TINY = dict(embed_dim=16, ffn_dim=24, num_heads=4)
# Of what may be an output layer too: softpick and sigmoid have no loss.
BOTH = [name for name in registered_normalizers() if name not in ("softpick", "sigmoid")]
MAPPINGS = {name: {"name": name} for name in BOTH} | {
    "topk": {"name": "topk", "k": 3},
    "entmax": {"name": "entmax", "alpha": 1.3, "learned": True},
}


def language_model(attention=SOFTMAX, output=SOFTMAX, **options):
    torch.manual_seed(0)
    settings = {**TINY, "depth": 2, "attention": attention, "output": output, **options}
    return randomize(LanguageModel(WORDS, PAD, **settings))


def translation_model(attention=SOFTMAX, output=SOFTMAX, **options):
    torch.manual_seed(0)
    sizes = {**TINY, "encoder_depth": 2, "decoder_depth": 2}
    settings = {**sizes, "attention": attention, "output": output, **options}
    return randomize(TranslationModel(SOURCE_WORDS, WORDS, PAD, **settings))


def randomize(model):
    """fp64, and vectors away from their start, so that a forgotten bias or norm shows."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "normalizer" not in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise)
    return model


def draw(rows=3, length=6, words=WORDS, seed=2):
    return torch.randint(2, words, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
