"""Normalizers with scalars for each head, in models with another number of heads."""

import pytest
import torch
from tiny_transformers import language_model

from multimax.models.vision import build_vision_transformer

ENTMAX = {"name": "entmax", "learned": True}
VISION = dict(output={"name": "softmax"}, num_classes=5, image_size=32, patch_size=8, depth=1)


def vision(heads):
    architecture = "deit_tiny_patch16_224"  # of 3 heads
    return build_vision_transformer(architecture, attention=ENTMAX | {"heads": heads}, **VISION)


@pytest.mark.parametrize(("build", "there"), [(vision, 3), (None, 4)])
def test_heads_of_the_normalizer_are_those_of_the_model(build, there):
    build = build or (lambda heads: language_model(ENTMAX | {"heads": heads}))
    with pytest.raises(ValueError, match=rf"heads=2 .* num_heads={there}: use heads={there}"):
        build(2)
    for heads in (None, 1, there):
        model = build(heads).eval()
        x = torch.randn(2, 3, 32, 32) if there == 3 else torch.tensor([[2, 3, 4]])
        assert model(x).isfinite().all()
