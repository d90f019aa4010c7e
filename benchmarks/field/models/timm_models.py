"""timm: image models of about every kind, with few channels, few layers and small images."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..expectation import FieldModel, Kind
from .building import IMAGES, images

MODELS: list[FieldModel] = []


def _build(fused: bool | None, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model: by scaled_dot_product_attention, with the softmax written out, or as timm likes."""
    if fused is None:
        return make()
    config: Any = importlib.import_module("timm.layers.config")
    before = config._USE_FUSED_ATTN
    config.set_fused_attn(fused)
    try:
        return make()
    finally:
        config._USE_FUSED_ATTN = before


def _listed(name: str, options: dict[str, Any]) -> nn.Module:
    """Build a model of timm's list."""
    return importlib.import_module("timm").create_model(name, num_classes=5, **options)


def _of_class(path: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    """Build a model of which timm's list has no small one: its sizes are not arguments there."""
    return make(importlib.import_module(f"timm.models.{path}"))


def _ways(both: bool) -> list[tuple[str, bool | None]]:
    return [("", True), (" written out", False)] if both else [("", None)]


def _add(
    name: str,
    *kinds: Kind,
    sites: int,
    size: int = 64,
    both: bool = False,
    fused: bool | None = None,
    label: str = "",
    inputs: Callable[[], Any] | None = None,
    **options: Any,
) -> None:
    for suffix, is_fused in _ways(both):
        build = partial(_build, fused if is_fused is None else is_fused, partial(_listed, name, options))
        inputs = inputs or images(size)
        MODELS.append(FieldModel("timm", (label or name) + suffix, build, inputs, kinds, sites))


def _add_class(
    name: str, path: str, make: Callable[[Any], nn.Module], *kinds: Kind, sites: int, size: int = 64, both: bool = False
) -> None:
    for suffix, fused in _ways(both):
        build = partial(_build, fused, partial(_of_class, path, make))
        MODELS.append(FieldModel("timm", name + suffix, build, images(size), kinds, sites))


# Plain attention (B, H, Q, K), also where windows are sequences of a batch.
ATTENTION = Kind("Attention")
WINDOWS = Kind("WindowAttention")
# A class token that looks at all: position 0.
CLASS_TOKEN = Kind("ClassAttn", offset=0)
# Queries of a parameter.
LATENT = Kind("AttentionPoolLatent", is_self=False)

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}

_add("vit_tiny_patch16_224", ATTENTION, sites=2, size=32, both=True, **VIT)
_add("deit_tiny_distilled_patch16_224", ATTENTION, sites=2, size=32, **VIT)
_add("deit3_small_patch16_224", ATTENTION, sites=2, size=32, both=True, **VIT)
_add("vit_base_patch16_siglip_224", ATTENTION, LATENT, sites=3, size=32, both=True, **VIT)
_add("vit_small_patch16_18x2_224", ATTENTION, sites=4, size=32, **VIT)
_add("vit_relpos_small_patch16_224", Kind("RelPosAttention"), sites=2, size=32, both=True, **VIT)
_add("vit_wee_patch16_reg1_gap_256", ATTENTION, sites=2, size=32, both=True, **VIT)
_add("vit_pwee_patch16_reg1_gap_256", Kind("ParallelScalingBlock"), sites=2, size=32, both=True, **VIT)
_add("beit_base_patch16_224", ATTENTION, sites=2, size=32, both=True, **VIT)
_add("eva02_tiny_patch14_224", Kind("EvaAttention"), sites=2, size=32, both=True, **VIT)
_add("vit_base_patch16_rope_reg1_gap_256", Kind("EvaAttention"), sites=2, size=32, both=True, **VIT)
_add("vit_small_patch16_rope_mixed_224", Kind("AttentionRope"), sites=2, size=32, both=True, **VIT)
# Two softmaxes, of which the second is taken away from the first: fused, these are two calls of the same heads.
for block, kind in (
    ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
    ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock"),
):
    _add(block, Kind(kind), sites=4, size=32, fused=True, **VIT)
    _add(block, Kind(kind, shows="nothing"), sites=0, size=32, fused=False, label=f"{block} written out", **VIT)
_add("flexivit_small", ATTENTION, sites=2, size=32, **VIT)
_add("vitamin_small_224", ATTENTION, sites=1, size=64, depth=1, img_size=64)
_add("naflexvit_base_patch16_gap", ATTENTION, sites=2, size=32, both=True, **{**VIT, "img_size": None})
_add("naflexvit_base_patch16_map", ATTENTION, LATENT, sites=3, size=32, **{**VIT, "img_size": None})


def _patches() -> tuple[dict[str, torch.Tensor]]:
    """Images of different sizes: patches of 8 x 8, padded to the same number."""
    n = torch.tensor([16, 12, 9])
    places = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], dim=-1)  # (N, 2)
    return (
        {
            "patches": torch.randn(IMAGES, 16, 8 * 8 * 3),
            "patch_coord": places.expand(IMAGES, -1, -1),
            "patch_valid": torch.arange(16) < n[:, None],  # (B, N)
        },
    )


_add(
    "naflexvit_base_patch16_gap",
    ATTENTION,
    sites=2,
    both=True,
    label="naflexvit_base_patch16_gap padded",
    inputs=_patches,
    **{**VIT, "img_size": None},
)

SWIN: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2)}
SWIN["num_heads"] = (2, 4)
_add("swin_tiny_patch4_window7_224", WINDOWS, sites=4, size=32, both=True, **SWIN)
_add("swinv2_tiny_window8_256", WINDOWS, sites=4, size=32, **SWIN)
_add("swinv2_cr_tiny_224", Kind("WindowMultiHeadAttention"), sites=4, size=32, **SWIN)

TWINS: dict[str, Any] = {"img_size": 64, "embed_dims": (16, 32), "num_heads": (2, 4), "depths": (2, 2)}
TWINS |= {"sr_ratios": (4, 2), "mlp_ratios": (2, 2)}
SUBSAMPLED = Kind("GlobalSubSampleAttn")
_add("twins_svt_small", Kind("LocallyGroupedAttn", "b w h q k"), SUBSAMPLED, sites=4, both=True, wss=(4, 4), **TWINS)
_add("twins_pcpvt_small", SUBSAMPLED, sites=4, both=True, **TWINS)
PVT: dict[str, Any] = {"embed_dims": (16, 32), "num_heads": (2, 4), "depths": (1, 1), "mlp_ratios": (2, 2)}
_add("pvt_v2_b0", ATTENTION, sites=2, both=True, sr_ratios=(4, 2), **PVT)
_add("pvt_v2_b2_li", ATTENTION, sites=2, both=True, **PVT)

# queries are pooled where a stage begins
MASK_UNITS = Kind("MaskUnitAttention", "b h w q k | b h q k", heads="heads")
POOLED = replace(MASK_UNITS, where="blocks.[123].attn", offset="none")
HIERA: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "stages": (1, 1, 1, 1)}
_add("hiera_tiny_224", POOLED, MASK_UNITS, sites=4, both=True, **HIERA)
_add(
    "hieradet_small",
    Kind("MultiScaleAttention", where="blocks.[124].attn", offset="none"),
    Kind("MultiScaleAttention"),
    sites=5,
    both=True,
    embed_dim=16,
    num_heads=2,
    stages=(1, 1, 2, 1),
    global_att_blocks=(3,),
    window_spec=(8, 4, 4, 2),
)
_add_class(
    "nest",
    "nest",
    lambda m: m.Nest(
        img_size=32, patch_size=4, num_levels=2, embed_dims=(16, 32), num_heads=(2, 4), depths=(1, 1), num_classes=5
    ),
    Kind("Attention", "b h w q k"),
    sites=2,
    size=32,
    both=True,
)
_add(
    "samvit_base_patch16",
    Kind("Attention", "(b h) q k"),
    sites=2,
    both=True,
    **{**VIT, "img_size": 64},
    window_size=4,
    global_attn_indexes=(1,),
    neck_chans=16,
)
_add_class(
    "mvitv2",
    "mvitv2",
    lambda m: m.MultiScaleVit(
        m.MultiScaleVitCfg(
            depths=(1, 1),
            embed_dim=16,
            num_heads=2,
            stride_q=((1, 1), (2, 2)),
            stride_kv=None,
            stride_kv_adaptive=(2, 2),
        ),
        img_size=(64, 64),
        num_classes=5,
    ),
    Kind("MultiScaleAttention", where="stages.1.*", offset="none"),
    Kind("MultiScaleAttention"),
    sites=2,
)
_add_class(
    "mvitv2 with class token",
    "mvitv2",
    lambda m: m.MultiScaleVit(
        m.MultiScaleVitCfg(
            depths=(1, 1),
            embed_dim=16,
            num_heads=2,
            stride_q=((1, 1), (2, 2)),
            stride_kv=None,
            stride_kv_adaptive=(2, 2),
            use_cls_token=True,
        ),
        img_size=(64, 64),
        num_classes=5,
    ),
    Kind("MultiScaleAttention", where="stages.1.*", offset="none"),
    Kind("MultiScaleAttention"),
    sites=2,
)
_add(
    "davit_tiny",
    WINDOWS,
    Kind("ChannelAttention", shows="channels"),
    sites=4,
    both=True,
    embed_dims=(16, 32),
    num_heads=(2, 4),
    depths=(1, 1),
    window_size=4,
)
_add(
    "davit_tiny",
    WINDOWS,
    Kind("ChannelAttentionV2", heads="groups", shows="channels"),
    sites=4,
    embed_dims=(16, 32),
    num_heads=(2, 4),
    depths=(1, 1),
    window_size=4,
    label="davit_tiny channels v2",
    channel_attn_v2=True,
)
_add(
    "edgenext_xx_small",
    Kind("CrossCovarianceAttn", shows="channels"),
    sites=3,
    dims=(24, 32, 48, 64),
    heads=(4, 4, 4, 4),
    depths=(1, 1, 1, 1),
)
_add(
    "xcit_nano_12_p16_224",
    Kind("XCA", shows="channels"),
    CLASS_TOKEN,
    sites=4,
    both=True,
    **{**VIT, "img_size": 64, "patch_size": 16},
)
_add(
    "cait_xxs24_224",
    Kind("TalkingHeadAttn", weights="attn_drop.input"),
    CLASS_TOKEN,
    sites=4,
    size=32,
    both=True,
    **VIT,
)
_add(
    "crossvit_tiny_240",
    ATTENTION,
    Kind("CrossAttention", is_self=None, offset=0),
    sites=4,
    size=60,
    img_size=60,
    img_scale=(1.0, 48 / 60),
    embed_dim=(16, 32),
    num_heads=(2, 4),
    depth=((1, 1, 0),),
)
LEVIT: dict[str, Any] = {"img_size": 64, "embed_dim": (32, 48), "num_heads": (2, 4), "key_dim": 8, "depth": (1, 1)}
PICKED = Kind("AttentionDownsample", offset=0)  # query (a, b) is at key (2 a, 2 b)
_add("levit_128s", ATTENTION, PICKED, sites=3, **LEVIT)
_add("levit_conv_128s", ATTENTION, PICKED, sites=3, **LEVIT)
_add(
    "efficientvit_m0",
    Kind("CascadedGroupAttention", "b q k", loop="h"),
    sites=3,
    size=128,
    img_size=128,
    embed_dim=(32, 48, 64),
    depth=(1, 1, 1),
    num_heads=(4, 4, 4),
    window_size=(4, 4, 4),
)
_add("efficientvit_b0", Kind("LiteMLA", shows="silence"), sites=0)
_add("efficientformer_l1", ATTENTION, sites=1, size=224, depths=(1, 1, 1, 2), embed_dims=(16, 24, 32, 48))
_add(
    "efficientformerv2_s0",
    Kind("Attention2d", weights="talking_head2.output"),
    Kind("Attention2dDownsample", is_self=None, offset="none"),
    sites=3,
    size=128,
    img_size=128,
    depths=(1, 1, 2, 2),
    embed_dims=(16, 24, 32, 48),
    mlp_ratios=2,
    num_vit=1,
)
_add_class(
    "volo",
    "volo",
    lambda m: m.VOLO(
        layers=(1, 1, 1),
        img_size=32,
        patch_size=4,
        embed_dims=(16, 32, 32),
        num_heads=(2, 4, 4),
        downsamples=(True, False, False),
        outlook_attention=(True, False, False),
        stem_hidden_dim=16,
        num_classes=5,
    ),
    ATTENTION,
    Kind("OutlookAttention", "b h w q k", is_self=None),
    Kind("ClassAttention", offset=0),
    sites=5,
    size=32,
    both=True,
)
_add(
    "coat_lite_tiny",
    Kind("FactorAttnConvRelPosEnc", shows="nothing"),
    sites=0,
    img_size=64,
    embed_dims=(16, 16, 32, 32),
    serial_depths=(1, 1, 1, 1),
)
_add(
    "convit_tiny",
    Kind("GPSA", weights="attn_drop.input"),
    Kind("MHSA"),
    sites=2,
    local_up_to_layer=1,
    img_size=64,
    embed_dim=8,
    depth=2,
    num_heads=4,
)
_add(
    "tnt_s_legacy_patch16_224",
    ATTENTION,
    sites=4,
    img_size=64,
    embed_dim=32,
    inner_dim=16,
    depth=2,
    num_heads_outer=4,
    num_heads_inner=2,
)
_add("visformer_tiny", ATTENTION, sites=2, both=True, img_size=64, embed_dim=32, depth=(1, 1, 1), num_heads=4)
_add("pit_ti_224", ATTENTION, sites=2, both=True, img_size=64, base_dims=(8, 8), depth=(1, 1), heads=(2, 4))
_add("mobilevit_xxs", ATTENTION, sites=9, size=128, both=True)
_add("mobilevitv2_050", Kind("LinearSelfAttention", shows="nothing"), sites=0)
_add("botnet26t_256", Kind("BottleneckAttn", "(b h) q k"), sites=3, img_size=64)
# blocks of 8 x 8 look at 12 x 12: the first query is in the third row, at the third key
_add("halonet26t", Kind("HaloAttn", "(b h) w q k", offset=26), sites=3, size=256)
_add("lambda_resnet26t", Kind("LambdaLayer", shows="silence"), sites=0)
_add_class(
    "gcvit",
    "gcvit",
    lambda m: m.GlobalContextVit(
        img_size=64, window_size=(4, 4), embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
    ),
    Kind("WindowAttentionGlobal", is_self=None),
    sites=4,
)
_add("fastvit_sa12", ATTENTION, sites=1, both=True, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128))
_add("fastvit_t8", sites=0, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128))
_add(
    "tiny_vit_5m_224",
    ATTENTION,
    sites=3,
    both=True,
    embed_dims=(16, 24, 32, 48),
    depths=(1, 1, 1, 1),
    num_heads=(2, 2, 4, 4),
    window_sizes=(4, 4, 4, 2),
)
_add("nextvit_small", Kind("EfficientAttention"), sites=3, both=True, depths=(1, 1, 5, 1))
PARTITIONS = (Kind("AttentionCl"), Kind("Attention2d"))
_add("test_maxvit", *PARTITIONS, sites=8, both=True, img_size=64)
_add("test_coatnet", *PARTITIONS, sites=3, both=True, img_size=64)
_add(
    "iformer_s",
    Kind("SHMA", "b h q k | b q k", heads=1),
    sites=2,
    both=True,
    dims=(16, 16, 32, 32),
    depths=(1, 1, 3, 3),
    attn_groups=(0, 0, 1, 1),
)
_add("shvit_s1", Kind("SHSA", "b q k", heads=1), sites=2, size=128, depth=(1, 1, 1))
_add("lowformer_b0", Kind("ConvAttention"), sites=2, both=True, depth_list=(0, 1, 1, 1, 1))
_add("cpubone_nano", Kind("ConvAttention"), sites=2, both=True, depth_list=(0, 1, 1, 1, 1))
_add("swiftformer_xs", Kind("EfficientAdditiveAttention", shows="nothing"), sites=0, layers=(1, 1, 1, 1))
_add_class(
    "caformer",
    "metaformer",
    lambda m: m.MetaFormer(
        depths=(1, 1),
        dims=(32, 64),
        token_mixers=[m.SepConv, m.Attention],
        norm_layers=[m.LayerNorm2dNoBias, m.LayerNormNoBias],
    ),
    ATTENTION,
    sites=1,
    both=True,
)
_add("deepseek_vit_412m_enc", Kind("AttentionRope"), sites=2, size=42, both=True, embed_dim=64, depth=2, num_heads=4)
_add_class("poolformer", "metaformer", lambda m: m.MetaFormer(depths=(1, 1), dims=(16, 32)), sites=0)
_add_class("focalnet", "focalnet", lambda m: m.FocalNet(embed_dim=16, depths=(1, 1)), sites=0)
_add("repvit_m0_9", sites=0, embed_dim=(16, 24, 32, 48), depth=(1, 1, 1, 1))
_add("mobilenetv4_hybrid_medium", Kind("MultiQueryAttention2d"), sites=8, both=True)
_add("resnet50_clip", Kind("AttentionPool2d"), sites=1, img_size=64)
_add("resnest14d", sites=0)
_add("efficientvim_m1", sites=0)
_add("maxxvit_rmlp_nano_rw_256", *PARTITIONS, sites=14, img_size=64)
_add("qwen3_vit_416m_enc", Kind("AttentionRope"), sites=2, img_size=64, embed_dim=64, depth=2, num_heads=4)
_add("gemma4_vit_167m_enc", Kind("Gemma4Attention"), sites=2, size=96, img_size=96, embed_dim=64, depth=2, num_heads=4)
_add("sebotnet33ts_256", Kind("BottleneckAttn", "(b h) q k"), sites=4, img_size=64)
_add("vit_tiny_r_s16_p8_224", ATTENTION, sites=1, img_size=64, embed_dim=32, depth=1, num_heads=4)
# softmaxes that are no attention of queries to keys: a place for each channel, a path for each channel
_add("gcresnet33ts", Kind("GlobalContext", shows="silence"), sites=0)
_add("skresnet18", Kind("SelectiveKernelAttn", shows="silence"), sites=0)
