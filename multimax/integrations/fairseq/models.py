"""fairseq's Transformers for languages and translation with any normalizer, as registered models.

Every architecture of `transformer_lm` and `transformer` gets a twin with the prefix `multimax_`.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_INV_REGISTRY,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.modules import MultiheadAttention
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from multimax.integrations.fairseq.attention import normalize_attention
from multimax.integrations.fairseq.output import decoder_output, has_likelihood, normalize_output
from multimax.integrations.fairseq.safe_globals import SAFE_GLOBALS
from multimax.integrations.fairseq.specification import (
    check_supported,
    format_normalizer,
    parse_normalizer,
)

logger: logging.Logger = logging.getLogger(__name__)

# fairseq loads with torch's defaults, which refuse its own checkpoints of translation models.
torch.serialization.add_safe_globals(SAFE_GLOBALS)

ATTENTION_HELP = "normalizer of all attention, such as multimax, softmax or topk:k=100"
OUTPUT_HELP = (
    "normalizer of the output layer; a sparse one (topk, sparsemax, entmax, evsoftmax) needs "
    "--criterion multimax_output_loss"
)
MISMATCH_HELP = (
    "as the official code does, use plain SoftMax in incremental decoding and in cross-attention"
)


@dataclass
class MultiMaxLanguageModelConfig(TransformerLanguageModelConfig):
    """The options of `transformer_lm`, and the normalizers."""

    attention_normalizer: str = field(default="multimax", metadata={"help": ATTENTION_HELP})
    output_normalizer: str = field(default="multimax", metadata={"help": OUTPUT_HELP})
    official_mismatch: bool = field(default=False, metadata={"help": MISMATCH_HELP})


class NormalizedModel:
    """What the models add to their stock base class."""

    decoder: nn.Module

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """The stock model of a seed, weight by weight, with the normalizers of `args`."""
        model = super().build_model(args, task)
        install_normalizers(model, args)
        return model

    def get_normalized_probs(
        self, net_output: tuple[Any, ...], log_probs: bool, sample: dict[str, Tensor] | None = None
    ) -> Tensor:
        """As the stock method.

        Raises:
            ValueError: the likelihood of a target is wanted of an output that is sparse.
        """
        if sample is not None and not has_likelihood(decoder_output(self.decoder)):
            raise ValueError(
                "the perplexity of a sparse output is not defined: fairseq-validate gives its loss"
            )
        return super().get_normalized_probs(net_output, log_probs, sample)


def install_normalizers(model: nn.Module, args: Any) -> None:
    """Put the normalizers that `args` name into a stock model, in place.

    Raises:
        ValueError: a normalizer or a combination is not valid.
    """
    chosen = chosen_normalizers(args)
    mismatch = safe_getattr(args, "official_mismatch", False)
    attentions = [(k, m) for k, m in model.named_modules() if type(m) is MultiheadAttention]
    used = {}
    # What the normalizers draw must not change what the run draws next.
    with torch.random.fork_rng(devices=[]):
        for name, attention in attentions:
            place = "cross" if attention.encoder_decoder_attention else name.split(".")[0]
            normalize_attention(attention, chosen[place], mismatch and place == "decoder")
            used[place] = chosen[place]
        normalize_output(model.decoder, chosen["output"])
        used["output"] = chosen["output"]
    shown = ", ".join(f"{place} {format_normalizer(options)}" for place, options in used.items())
    logger.info(f"normalizers: {shown}" + (", official mismatch" if mismatch else ""))


def chosen_normalizers(args: Any) -> dict[str, dict[str, Any]]:
    """Name and options of the normalizer of each place: encoder, decoder, cross and output.

    Raises:
        ValueError: a normalizer is not valid or has an option that is not supported, or one of
            cross-attention is chosen together with the official mismatch.
    """
    attention = safe_getattr(args, "attention_normalizer", "multimax")
    chosen = {
        place: safe_getattr(args, f"{place}_attention_normalizer", None) or attention
        for place in ("encoder", "decoder")
    }
    cross = safe_getattr(args, "cross_attention_normalizer", None)
    if safe_getattr(args, "official_mismatch", False):
        if cross is not None:
            raise ValueError(
                "--official-mismatch makes cross-attention plain SoftMax: leave "
                "--cross-attention-normalizer out"
            )
        cross = "softmax"
    chosen["cross"] = cross or attention
    chosen["output"] = safe_getattr(args, "output_normalizer", "multimax")
    parsed = {place: parse_normalizer(text) for place, text in chosen.items()}
    for place, options in parsed.items():
        check_supported(place, options)
        options.pop("shared", None)  # false
    return parsed


@register_model("multimax_transformer_lm", dataclass=MultiMaxLanguageModelConfig)
class MultiMaxLanguageModel(NormalizedModel, TransformerLanguageModel):
    """`transformer_lm` with any normalizer in attention and in the output layer."""


@register_model("multimax_transformer")
class MultiMaxTranslationModel(NormalizedModel, TransformerModel):
    """`transformer` with any normalizer in each kind of attention and in the output layer."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the arguments of the stock model, and those of the normalizers."""
        super().add_args(parser)
        parser.add_argument("--attention-normalizer", default="multimax", help=ATTENTION_HELP)
        for place in ("encoder", "decoder", "cross"):
            kind = "cross-attention" if place == "cross" else f"self-attention of the {place}"
            parser.add_argument(
                f"--{place}-attention-normalizer",
                default=None,
                help=f"normalizer of {kind}, if not that of all attention",
            )
        parser.add_argument("--output-normalizer", default="multimax", help=OUTPUT_HELP)
        parser.add_argument("--official-mismatch", action="store_true", help=MISMATCH_HELP)


for _stock in ("transformer_lm", "transformer"):
    for _architecture in ARCH_MODEL_INV_REGISTRY[_stock]:
        if f"multimax_{_architecture}" not in ARCH_CONFIG_REGISTRY:
            register_model_architecture(f"multimax_{_stock}", f"multimax_{_architecture}")(
                ARCH_CONFIG_REGISTRY[_architecture]
            )
