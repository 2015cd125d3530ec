"""What is known of the modules of diffusers that normalize, and of their processors."""

from multimax.replacement.classes import AttentionClass

KERNEL = "it normalizes inside a kernel: use model.set_attn_processor(AttnProcessor2_0())"
# Processors by their names, and why they are refused.
REFUSED = {
    "Sliced": "it normalizes slice by slice: use model.set_attention_slice(None)",
    "XFormers": "it normalizes inside a kernel: use "
    "model.disable_xformers_memory_efficient_attention()",
    "XLA|NPU": KERNEL,
    "IPAdapter": "text and images have a SoftMax each: use pipeline.unload_ip_adapter()",
    "MochiAttn": "it normalizes sample by sample",
    "PAG(CFG)?Joint": "guided and perturbed samples have a SoftMax each",
    "Flux2KV": "text and references have a SoftMax each",
    "Cosmos3": "understanding and generation have a SoftMax each",
    "QwenImage21AttnProcessor": "it normalizes segment by segment",
    "QwenImage21Flex|WanAnimate2AttnProcessor": "flex_attention normalizes inside its kernel",
}
LINEAR = "Linear|SanaMultiscale"
# They attend to images too where there is a projection for them.
IMAGES = "Wan|SkyReelsV2|CosmosAttnProcessor2_5"
# Backends of `dispatch_attention_fn` that call torch's attention.
BACKENDS = {"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"}

MODELS = "diffusers.models."
# Without a processor: one SoftMax of scores over keys.
PLAIN = """
autoencoders.autoencoder_kl_hunyuanimage.HunyuanImageAttentionBlock
autoencoders.autoencoder_kl_hunyuanimage_refiner.HunyuanImageRefinerAttnBlock
autoencoders.autoencoder_kl_hunyuanvideo15.HunyuanVideo15AttnBlock
autoencoders.autoencoder_kl_ltx2_audio.LTX2AudioAttnBlock
autoencoders.autoencoder_kl_qwenimage.QwenImageAttentionBlock
autoencoders.autoencoder_kl_qwenimage21.QwenImage21AttentionBlock
autoencoders.autoencoder_kl_wan.WanAttentionBlock
autoencoders.autoencoder_vidtok.VidTokAttnBlock
embeddings.AttentionPooling
embeddings.HunyuanDiTAttentionPool
embeddings.IPAdapterTimeImageProjectionBlock
embeddings.MochiAttentionPool
transformers.consisid_transformer_3d.PerceiverAttention
transformers.consisid_transformer_3d.PerceiverCrossAttention
transformers.transformer_sana_wm.SanaWMSoftmaxAttention
transformers.transformer_sana_wm.SanaWMSoftmaxCamAttention
unets.unet_1d_blocks.SelfAttention1d
"""
EXPERTS = "it chooses experts"
NOT_ATTENTION = {
    "condition_embedders.condition_embedder_minimax_music3.MiniMaxMusic3ConditionEncoder": "it "
    "weighs layers",
    "transformers.transformer_hidream_image.MoEGate": EXPERTS,
    "transformers.transformer_nucleusmoe_image.NucleusMoELayer": EXPERTS,
}
CLASSES = {
    **{MODELS + name: AttentionClass() for name in PLAIN.split()},
    **{MODELS + name: AttentionClass(not_attention=use) for name, use in NOT_ATTENTION.items()},
}
