"""Attention classes of transformers that do not ask its interface for their attention."""

from multimax.replacement.classes import AttentionClass

PLAIN = """
bark.modeling_bark.BarkSelfAttention
blip.modeling_blip.BlipAttention
canine.modeling_canine.CanineSelfAttention
data2vec.modeling_data2vec_vision.Data2VecVisionSdpaSelfAttention
flaubert.modeling_flaubert.MultiHeadAttention
flava.modeling_flava.FlavaSelfAttention
fsmt.modeling_fsmt.Attention
git.modeling_git.GitSelfAttention
gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention
groupvit.modeling_groupvit.GroupViTAttention
luke.modeling_luke.LukeSelfAttention
megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention
mobilevit.modeling_mobilevit.MobileViTSelfAttention
openai.modeling_openai.Attention
pvt.modeling_pvt.PvtEfficientSelfAttention
rembert.modeling_rembert.RemBertSelfAttention
roformer.modeling_roformer.RoFormerSelfAttention
squeezebert.modeling_squeezebert.SqueezeBertSelfAttention
tapas.modeling_tapas.TapasSelfAttention
timesformer.modeling_timesformer.TimesformerSelfAttention
trocr.modeling_trocr.TrOCRAttention
visual_bert.modeling_visual_bert.VisualBertSelfAttention
wavlm.modeling_wavlm.WavLMAttention
xglm.modeling_xglm.XGLMAttention
xlm.modeling_xlm.MultiHeadAttention
"""
# Relative positions or ALiBi (Falcon: in some models) are in the scores already.
BIASED = """
bloom.modeling_bloom.BloomAttention
data2vec.modeling_data2vec_vision.Data2VecVisionSelfAttention
deberta.modeling_deberta.DisentangledSelfAttention
deberta_v2.modeling_deberta_v2.DisentangledSelfAttention
falcon.modeling_falcon.FalconAttention
funnel.modeling_funnel.FunnelRelMultiheadAttention
mpnet.modeling_mpnet.MPNetSelfAttention
mpt.modeling_mpt.MptAttention
vitdet.modeling_vitdet.VitDetAttention
"""
# Shifted windows: they add -100 where nothing belongs together, to the scores themselves ...
SHIFTED = """
clap.modeling_clap.ClapAudioSelfAttention
donut.modeling_donut_swin.DonutSwinSelfAttention
maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention
swin2sr.modeling_swin2sr.Swin2SRSelfAttention
swinv2.modeling_swinv2.Swinv2SelfAttention
"""
# ... or to the mask that they give the interface.
SHIFTED_MASK = "swin.modeling_swin.SwinAttention"
REFUSED = {
    "big_bird.modeling_big_bird.BigBirdBlockSparseAttention": "it has a SoftMax for each kind of "
    "block",
    "convbert.modeling_convbert.ConvBertSelfAttention": "it normalizes the kernels of its "
    "convolution too",
    "ibert.modeling_ibert.IBertSelfAttention": "its SoftMax is one of integers",
    "led.modeling_led.LEDEncoderSelfAttention": "global tokens have a SoftMax of their own",
    "longformer.modeling_longformer.LongformerSelfAttention": "global tokens have a SoftMax of "
    "their own",
    "nystromformer.modeling_nystromformer.NystromformerSelfAttention": "it approximates SoftMax by "
    "three of them",
    "xlnet.modeling_xlnet.XLNetRelativeAttention": "its two streams have a SoftMax each",
}

_FOUND = [
    *((name, AttentionClass()) for name in PLAIN.split()),
    *((name, AttentionClass(biased_scores=True)) for name in BIASED.split()),
    *((name, AttentionClass(biased_scores=True, finite_mask=True)) for name in SHIFTED.split()),
    (SHIFTED_MASK, AttentionClass(finite_mask=True)),
    *((name, AttentionClass(refused=reason)) for name, reason in REFUSED.items()),
]
CLASSES = {f"transformers.models.{name}": known for name, known in _FOUND}
