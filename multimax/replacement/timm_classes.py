"""What is known of the modules of timm that normalize."""

from multimax.replacement.classes import AttentionClass

LAYERS, MODELS = "timm.layers.", "timm.models."

# One SoftMax of scores over keys. Those with a bias give it to torch's attention apart.
ATTENTION = {
    LAYERS: (
        "attention.Attention",
        "attention.AttentionRope",
        "attention2d.Attention2d",
        "attention2d.MultiQueryAttention2d",
        "attention2d.MultiQueryAttentionV2",
        "attention_pool.AttentionPoolLatent",
        "attention_pool.AttentionPoolPrr",
        "attention_pool2d.AttentionPool2d",
        "attention_pool2d.RotAttentionPool2d",
        "non_local_attn.NonLocalAttn",
        "other_pool.SimPool1d",
        "other_pool.SimPool2d",
    ),
    MODELS: (
        "beit.Attention",
        "cait.ClassAttn",
        "cait.TalkingHeadAttn",
        "convit.MHSA",
        "cpubone.ConvAttention",
        "crossvit.CrossAttention",
        "davit.ChannelAttention",
        "davit.ChannelAttentionV2",
        "davit.WindowAttention",
        "edgenext.CrossCovarianceAttn",
        "eva.EvaAttention",
        "fastvit.Attention",
        "gemma4_vit.Gemma4Attention",
        "hiera.MaskUnitAttention",
        "hieradet_sam2.MultiScaleAttention",
        "iformer.SHMA",
        "lowformer.ConvAttention",
        "maxxvit.Attention2d",
        "maxxvit.AttentionCl",
        "metaformer.Attention",
        "nest.Attention",
        "nextvit.EfficientAttention",
        "pvt_v2.Attention",
        "shvit.SHSA",
        "tiny_vit.Attention",
        "tnt.Attention",
        "twins.GlobalSubSampleAttn",
        "twins.LocallyGroupedAttn",
        "visformer.Attention",
        "vision_transformer.ParallelScalingBlock",
        "vision_transformer_relpos.RelPosAttention",
        "vision_transformer_sam.Attention",
        "volo.Attention",
        "volo.ClassAttention",
        "volo.OutlookAttention",
        "xcit.XCA",
    ),
}
# SoftMax of scores that have a bias in them.
BIASED = {
    LAYERS: ("bottleneck_attn.BottleneckAttn", "halo_attn.HaloAttn"),
    MODELS: (
        "efficientformer.Attention",
        "efficientformer_v2.Attention2d",
        "efficientformer_v2.Attention2dDownsample",
        "gcvit.WindowAttentionGlobal",
        "levit.Attention",
        "levit.AttentionDownsample",
        "mvitv2.MultiScaleAttention",
        "mvitv2.MultiScaleAttentionPoolFirst",
    ),
}
# They shift windows, and mask what does not belong together by -100.
SHIFTED = {
    "swin_transformer.WindowAttention": AttentionClass(finite_mask=True),
    "swin_transformer_v2.WindowAttention": AttentionClass(biased_scores=True, finite_mask=True),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": AttentionClass(
        biased_scores=True, finite_mask=True
    ),
}
TWO = "it mixes two SoftMax distributions"
REFUSED = {
    LAYERS: {"diff_attention.DiffAttention": TWO},
    MODELS: {
        "convit.GPSA": TWO,
        "efficientvit_msra.CascadedGroupAttention": "it normalizes once for each head, in turn",
        "vision_transformer.DiffParallelScalingBlock": TWO,
    },
}
BRANCHES = "it weighs branches of a convolution"
STAGES = "it weighs the features of stages"
POSITIONS = "it weighs positions, without a query"
NOT_ATTENTION = {
    LAYERS: {
        "global_context.GlobalContext": POSITIONS,
        "lambda_layer.LambdaLayer": POSITIONS,
        "selective_kernel.SelectiveKernelAttn": BRANCHES,
        "split_attn.RadixSoftmax": BRANCHES,
    },
    MODELS: {
        "coat.FactorAttnConvRelPosEnc": POSITIONS,
        "csatv2.SpatialTransformerBlock": "it compares the images of a batch with each other",
        "efficientvim.EfficientViM": STAGES,
        "efficientvim.EfficientViMDistilled": STAGES,
        "efficientvim.HSMSSD": POSITIONS,
        "mobilevit.LinearSelfAttention": POSITIONS,
    },
}

CLASSES = {
    **{MODELS + name: kind for name, kind in SHIFTED.items()},
    **{p + name: AttentionClass() for p, names in ATTENTION.items() for name in names},
    **{
        p + name: AttentionClass(biased_scores=True)
        for p, names in BIASED.items()
        for name in names
    },
    **{
        p + n: AttentionClass(refused=why)
        for p, names in REFUSED.items()
        for n, why in names.items()
    },
    **{
        prefix + name: AttentionClass(not_attention=what)
        for prefix, names in NOT_ATTENTION.items()
        for name, what in names.items()
    },
}
