"""Attention of `torch.nn`, and of torchvision, which is built of it."""

from torch import nn

from multimax.replacement.classes import AttentionClass

CLASSES = {"torch.nn.modules.activation.MultiheadAttention": AttentionClass()}
# They have a fused form in evaluation that does not call their attention modules.
FUSED: tuple[type[nn.Module], ...] = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
