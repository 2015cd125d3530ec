"""Tiny models of x-transformers with random weights, and what they are called with."""

from typing import Any

import torch
from torch import nn

from experiments.drop_in.stirring import stirred

VOCABULARY = 32
FLASH = {"attn_flash": True}
ALIBI = {"alibi_pos_bias": True}
# Options of a Decoder of two layers.
DECODERS = {
    "Decoder": {},
    "Decoder, flash": FLASH,
    "Decoder, rotary": {"rotary_pos_emb": True, "attn_dim_head": 32},
    "Decoder, ALiBi": ALIBI,
    "Decoder, ALiBi, flash": {**ALIBI, **FLASH},
    "Decoder, relative positions, memory": {"rel_pos_bias": True, "attn_num_mem_kv": 3},
    "Decoder, grouped heads, normalized, flash": {
        "attn_kv_heads": 2,
        "attn_qk_norm": True,
        **FLASH,
    },
    "Decoder, one key head, window": {"attn_one_kv_head": True, "attn_max_attend_past": 4},
    "Decoder, zero key": {"attn_add_zero_kv": True, **ALIBI},
    "Decoder, talking heads": {
        "attn_pre_talking_heads": True,
        "attn_post_talking_heads": True,
        **ALIBI,
    },
    "Decoder, forgetting": {"attn_data_dependent_alibi": True},
    "Decoder, laser, distances": {"attn_laser": True, "attn_l2_distance": True},
}
REFUSED = {
    "Decoder, top-k": {"attn_sparse_topk": 2},
    "Decoder, hard": {"attn_hard": True},
    "Decoder, sigmoid": {"attn_sigmoid": True},
    "Decoder, Gumbel": {"attn_gumbel_softmax": True},
    "Decoder, selective": {"attn_selective": True},
    "Decoder, signed": {"attn_cog_signed": True},
    "Decoder, sink": {"attn_head_learned_sink": True},
    "Decoder, residual": {"residual_attn": True},
}
# They read the scores with a bias in them.
BEFORE = {
    "Decoder, clamped": {"attn_softclamp_logits": True, **ALIBI},
    "Decoder, CoPE": {"attn_use_cope": True, **ALIBI},
}
OTHERS = ("Encoder, ALiBi", "XTransformer", "ViTransformerWrapper")
MODELS = (*DECODERS, *BEFORE, *OTHERS, *REFUSED)


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model in evaluation mode, and the arguments of a forward pass with padding."""
    import x_transformers

    x, mask = tokens()
    if name == "ViTransformerWrapper":
        torch.manual_seed(0)
        layers = x_transformers.Encoder(dim=32, depth=2, heads=4)
        sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_classes": 5}
        model = x_transformers.ViTransformerWrapper(**sizes, attn_layers=layers)
        return stirred(model).eval(), (torch.randn(2, 3, 16, 16),), {}
    if name == "XTransformer":
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dim": 32}
        for side in ("enc", "dec"):
            sizes |= {f"{side}_num_tokens": VOCABULARY, f"{side}_max_seq_len": 32}
            sizes |= {f"{side}_depth": 1, f"{side}_heads": 4}
        return stirred(x_transformers.XTransformer(**sizes)).eval(), (x, x), {"mask": mask}
    if name == "Encoder, ALiBi":
        return wrapped("Encoder", **ALIBI), (x,), {"mask": mask}
    return wrapped(**{**DECODERS, **BEFORE, **REFUSED}[name]), (x,), {"mask": mask}


def wrapped(layers: str = "Decoder", **options: Any) -> nn.Module:
    """A language model of two layers, in evaluation mode."""
    import x_transformers

    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, **options}
    inside = getattr(x_transformers, layers)(**sizes)
    model = x_transformers.TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=32, attn_layers=inside
    )
    return stirred(model).eval()


def tokens(padding: slice = slice(-3, None)) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 12) tokens, and a mask by which some of the second row are padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, padding] = False
    return torch.randint(0, VOCABULARY, (2, 12), generator=generator), mask
