"""Tiny models of transformers with random weights, and what they are called with."""

import torch

from multimax import MultiMax

VOCABULARY = 96
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
SIZES = {**WIDE, "num_attention_heads": 4, "intermediate_size": 48}
ROPE = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64}
BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
BART |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
BART |= {"max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 2}
IMAGES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2}
IMAGES |= {"num_attention_heads": 4, "intermediate_size": 48}
CLIP = {**SIZES, "max_position_embeddings": 16, "eos_token_id": VOCABULARY - 1}
CLIP = {"vision_config": IMAGES, "text_config": CLIP}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}

# Model class, configuration class, its options, and how many attention layers there are.
MODELS = {
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES, 2),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", SIZES, 2),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        2,
    ),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SIZES, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
        2,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 0, "eos_token_id": 0},
        2,
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", ROPE, 2),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**ROPE, "head_dim": 8}, 2),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**ROPE, "head_dim": 8}, 2),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**ROPE, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
        2,
    ),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**ROPE, "sliding_window": 4}, 2),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**ROPE, "num_local_experts": 2}, 2),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**WIDE, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
        2,
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES, 2),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "num_heads": 4, "decoder_start_token_id": 0},
        6,
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART, 6),
    "Marian": ("MarianMTModel", "MarianConfig", BART, 6),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, 6),
    "ViT": ("ViTForImageClassification", "ViTConfig", IMAGES, 2),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGES, 2),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4},
        4,
    ),
    "BEiT": (
        "BeitForImageClassification",
        "BeitConfig",
        {**IMAGES, "use_relative_position_bias": True},
        2,
    ),
    "CLIP": ("CLIPModel", "CLIPConfig", CLIP, 4),
}
# Their classes do not ask the interface; with where their biases are added.
INTERCEPTED = {
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "before",
    ),
    "MPNet": ("MPNetForMaskedLM", "MPNetConfig", SIZES, "before"),
    "DeBERTa v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "before",
    ),
    "Falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**WIDE, "num_attention_heads": 4, "alibi": True},
        "before",
    ),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "after",
    ),
    "GIT": ("GitForCausalLM", "GitConfig", {**SIZES, "vision_config": IMAGES}, "after"),
}
REFUSED = {
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**ROPE, "head_dim": 8, "num_local_experts": 2},
        "learned sink",
    ),
    "XLNet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "two streams",
    ),
    "Swin v2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2]}
        | {"window_size": 4},
        "adding -100",
    ),
    "Longformer": ("LongformerModel", "LongformerConfig", SIZES, "global tokens"),
}
EAGER = ("Gemma 2", "BLOOM", "Falcon", "GPT-Neo", "GIT")  # of those with causal masks
GENERATING = ("GPT-2", "Llama", "Qwen3", "Mistral", "Gemma 2", "T5", "BART", "Marian")


def build(name, seed=0, **more):
    """A model in evaluation mode; `more` is for its configuration."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, config, options, *_ = {**MODELS, **INTERCEPTED, **REFUSED}[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**{**options, **more})).eval()


def inputs(name, model):
    """Keyword arguments of a forward pass, with padding where there is any."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.long)
    # Of eager attention, tokens that see nothing get the mean of all values: no such tokens.
    mask[1, slice(-3, None) if name in EAGER else slice(3)] = 0
    if name in ("ViT", "DINOv2", "Swin", "BEiT"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "Whisper":
        features = torch.randn(2, 8, 32, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens[:, :5]}
    arguments = {"input_ids": tokens, "attention_mask": mask}
    if name == "DeBERTa v2":  # its mask is of queries too
        del arguments["attention_mask"]
    tokens[:, -1] = VOCABULARY - 1  # CLIP reads the end
    if name in ("CLIP", "GIT"):
        arguments["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens[:, :5]
    return arguments


def first(output):
    """The first tensor of an output that is not its loss."""
    return output[0] if output[0].dim() else output[1]  # not the loss


def move(model, size=0.3):
    """Let the normalizers differ from SoftMax."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiMax):
                module.ts.copy_(torch.randn(module.ts.shape, generator=generator) * size)
