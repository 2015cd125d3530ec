"""Attention of `torch.nn`, and of torchvision, which is built of it."""

from torch import nn

from multimax.replacement.classes import AttentionClass

VISION = "torchvision.models."
CLASSES = {
    "torch.nn.modules.activation.MultiheadAttention": AttentionClass(),
    VISION + "maxvit.RelativePositionalMultiHeadAttention": AttentionClass(biased_scores=True),
    VISION + "swin_transformer.ShiftedWindowAttention": AttentionClass(
        biased_scores=True, finite_mask=True
    ),
    VISION + "swin_transformer.ShiftedWindowAttentionV2": AttentionClass(
        biased_scores=True, finite_mask=True
    ),
}
# They have a fused form in evaluation that does not call their attention modules.
FUSED: tuple[type[nn.Module], ...] = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
