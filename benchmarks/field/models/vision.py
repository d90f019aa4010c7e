"""Images beyond timm: torchvision, vit-pytorch, open_clip, segment_anything, monai, diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..expectation import FieldModel, Kind
from .building import IMAGES, images, load, made, token_ids

MODELS: list[FieldModel] = []


def _add(
    package: str,
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    *kinds: Kind,
    sites: int,
) -> None:
    MODELS.append(FieldModel(package, name, build, inputs, kinds, sites))


# torchvision

MHA = Kind("MultiheadAttention", "b h q k | (b h) q k")
_add(
    "torchvision",
    "VisionTransformer",
    made("torchvision.models.VisionTransformer", 32, 8, 2, 4, 32, 32, num_classes=5),
    images(32),
    MHA,
    sites=2,
)
SWIN = ([4, 4], 16, [2, 2], [2, 4], [4, 4])
_add(
    "torchvision",
    "SwinTransformer",
    made("torchvision.models.SwinTransformer", *SWIN, stochastic_depth_prob=0.0, num_classes=5),
    images(64),
    Kind("ShiftedWindowAttention"),
    sites=4,
)
_add(
    "torchvision",
    "SwinTransformer v2",
    lambda: load("torchvision.models.SwinTransformer")(
        *SWIN,
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=load("torchvision.models.swin_transformer.SwinTransformerBlockV2"),
        downsample_layer=load("torchvision.models.swin_transformer.PatchMergingV2"),
    ),
    images(64),
    Kind("ShiftedWindowAttentionV2"),
    sites=4,
)
_add(
    "torchvision",
    "MaxVit",
    made("torchvision.models.MaxVit", (64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=5),
    images(64),
    Kind("RelativePositionalMultiHeadAttention", "b w h q k", "n_heads"),
    sites=4,
)

# vit-pytorch

ATTENTION = Kind("Attention", heads="heads")
MERGED = Kind("Attention", "(b h) q k", "heads")
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4}
VIT |= {"mlp_dim": 32, "dim_head": 8}


def _vit(name: str, *kinds: Kind, sites: int, size: int = 32, label: str = "", **options: Any) -> None:
    build = made(f"vit_pytorch.{name}", **options)
    _add("vit_pytorch", (label or name), build, images(size), *kinds, sites=sites)


_vit("vit.ViT", ATTENTION, sites=2, **VIT)
_vit("simple_vit.SimpleViT", ATTENTION, sites=2, **VIT)
_vit("simple_vit_with_register_tokens.SimpleViT", ATTENTION, sites=2, **VIT)
_vit("simple_vit_with_qk_norm.SimpleViT", ATTENTION, sites=2, **VIT)
_vit("simple_vit_with_value_residual.SimpleViT", ATTENTION, sites=2, **VIT)
_vit("simple_flash_attn_vit.SimpleViT", Kind("Attention", heads="heads"), sites=2, **VIT)
_vit("vit_for_small_dataset.ViT", Kind("LSA", heads="heads"), sites=2, **VIT)
_vit("parallel_vit.ViT", ATTENTION, sites=4, num_parallel_branches=2, **VIT)
_vit("normalized_vit.nViT", Kind("Attention", heads=4), sites=2, **VIT)
_vit("rvt.RvT", MERGED, sites=2, **VIT)
_vit("deepvit.DeepViT", Kind("Attention", heads="heads", weights="reattn_norm.output"), sites=2, **VIT)
_vit(
    "cait.CaiT",
    Kind(
        "Attention",
        heads="heads",
        where="patch_transformer.*",
        after=lambda m, p: torch.einsum("bhij,hg->bgij", p, m.mix_heads_post_attn.double()),
    ),
    Kind(
        "Attention",
        heads="heads",
        is_self=None,
        offset=0,
        after=lambda m, p: torch.einsum("bhij,hg->bgij", p, m.mix_heads_post_attn.double()),
    ),
    sites=4,
    cls_depth=2,
    **VIT,
)
_vit(
    "xcit.XCiT",
    Kind("XCAttention", heads="heads", shows="channels"),
    Kind("Attention", heads="heads", is_self=None, offset=0),
    sites=4,
    cls_depth=2,
    **VIT,
)
_vit(
    "vit_with_patch_merger.ViT",
    ATTENTION,
    Kind("PatchMerger", "b q k", 1, is_self=False),
    sites=3,
    patch_merge_layer=1,
    patch_merge_num_tokens=4,
    **VIT,
)
_vit(
    "cross_vit.CrossViT",
    Kind("Attention", heads="heads", where="*.fn", is_self=None, offset=0),
    ATTENTION,
    sites=4,
    size=48,
    image_size=48,
    num_classes=5,
    depth=1,
    sm_dim=16,
    lg_dim=32,
    sm_patch_size=12,
    sm_enc_depth=1,
    sm_enc_heads=4,
    sm_enc_dim_head=8,
    sm_enc_mlp_dim=32,
    lg_patch_size=16,
    lg_enc_depth=1,
    lg_enc_heads=4,
    lg_enc_dim_head=8,
    lg_enc_mlp_dim=32,
    cross_attn_depth=1,
    cross_attn_heads=2,
    cross_attn_dim_head=8,
)
MAX: dict[str, Any] = {"num_classes": 5, "dim_conv_stem": 16, "dim": 32, "dim_head": 8, "depth": (1, 1)}
_vit("max_vit.MaxViT", ATTENTION, sites=4, size=64, window_size=4, **MAX)
_vit("max_vit_with_registers.MaxViT", ATTENTION, sites=4, size=64, window_size=4, **MAX)
_vit(
    "mobile_vit.MobileViT",
    Kind("Attention", "b p h q k", "heads"),
    sites=3,
    size=96,
    image_size=(96, 96),
    dims=[32, 32, 32],
    channels=[16, 16, 24, 24, 32, 32, 32, 32, 32, 32, 48],
    num_classes=5,
    depths=(1, 1, 1),
    patch_size=(1, 3),
)
_vit(
    "nest.NesT",
    ATTENTION,
    sites=2,
    image_size=32,
    patch_size=4,
    num_classes=5,
    dim=32,
    heads=4,
    num_hierarchies=2,
    block_repeats=(1, 1),
)
_vit(
    "t2t.T2TViT",
    ATTENTION,
    sites=2,
    image_size=32,
    num_classes=5,
    dim=32,
    depth=1,
    heads=4,
    dim_head=8,
    mlp_dim=32,
    t2t_layers=((7, 4), (3, 2)),
)
TWINS: dict[str, Any] = {"num_classes": 5, "peg_kernel_size": 3}
for stage, patch, local, pooled in ((1, 4, 4, 4), (2, 2, 4, 4), (3, 2, 2, 2), (4, 1, 2, 2)):
    TWINS |= {f"s{stage}_emb_dim": 16, f"s{stage}_patch_size": patch, f"s{stage}_local_patch_size": local}
    TWINS |= {f"s{stage}_global_k": pooled, f"s{stage}_depth": 1}
_vit(
    "twins_svt.TwinsSVT",
    Kind("LocalAttention", "(b h) q k", "heads"),
    Kind("GlobalAttention", "(b h) q k", "heads"),
    sites=14,
    size=64,
    **TWINS,
)
_vit(
    "regionvit.RegionViT",
    ATTENTION,
    sites=8,
    size=64,
    dim=(16, 16, 32, 32),
    depth=(1, 1, 1, 1),
    window_size=2,
    num_classes=5,
    tokenize_local_3_conv=False,
)
_vit(
    "crossformer.CrossFormer",
    ATTENTION,
    sites=8,
    size=64,
    num_classes=5,
    dim=(32, 32, 32, 32),
    depth=(1, 1, 1, 1),
    global_window_size=(4, 4, 2, 1),
    local_window_size=(4, 4, 2, 1),
)
_vit(
    "scalable_vit.ScalableViT",
    Kind("ScalableSelfAttention", heads="heads"),
    Kind("InteractiveWindowedSelfAttention", heads="heads"),
    sites=4,
    size=64,
    num_classes=5,
    dim=16,
    heads=(2, 4),
    depth=(1, 1),
    ssa_dim_key=(8, 8),
    reduction_factor=(4, 2),
    window_size=(8, None),
)
# windows look at themselves, and then their tokens at one another
_vit(
    "sep_vit.SepViT",
    Kind("DSSA", heads="heads"),
    sites=4,
    size=112,
    num_classes=5,
    dim=16,
    dim_head=8,
    heads=(2, 4),
    depth=(1, 1),
    window_size=7,
)
_vit(
    "cvt.CvT",
    MERGED,
    sites=3,
    size=64,
    num_classes=5,
    s1_emb_dim=16,
    s1_heads=1,
    s1_depth=1,
    s2_emb_dim=32,
    s2_heads=2,
    s2_depth=1,
    s3_emb_dim=32,
    s3_heads=4,
    s3_depth=1,
)
_vit(
    "levit.LeViT",
    Kind("Attention", heads="heads", where="backbone.1.*", offset="none"),
    ATTENTION,
    sites=3,
    size=64,
    image_size=64,
    num_classes=5,
    stages=2,
    dim=(32, 48),
    depth=1,
    heads=(2, 4),
    mlp_mult=2,
    dim_key=8,
    dim_value=8,
)
_vit(
    "pit.PiT",
    ATTENTION,
    sites=2,
    image_size=32,
    patch_size=8,
    dim=32,
    num_classes=5,
    depth=(1, 1),
    heads=4,
    mlp_dim=32,
    dim_head=8,
)
_vit(
    "cct.CCT",
    ATTENTION,
    sites=2,
    img_size=32,
    embedding_dim=32,
    n_conv_layers=1,
    num_layers=2,
    num_heads=4,
    mlp_ratio=2,
    num_classes=5,
)
_vit(
    "look_vit.LookViT",
    Kind("Attention", heads="heads", where="*.0"),
    Kind("Attention", heads="heads", is_self=None),
    sites=3,
    dim=32,
    image_size=32,
    patch_size=8,
    num_classes=5,
    depth=1,
    heads=4,
    dim_head=8,
    highres_patch_size=4,
    cross_attn_heads=2,
    cross_attn_dim_head=8,
)
_add(
    "vit_pytorch",
    "na_vit.NaViT",
    made("vit_pytorch.na_vit.NaViT", **VIT),
    lambda: ([[torch.randn(3, 16, 32), torch.randn(3, 32, 16)], [torch.randn(3, 32, 32)], [torch.randn(3, 24, 16)]],),
    Kind("Attention", heads="heads", where="attn_pool", is_self=False),
    ATTENTION,
    sites=3,
)

# open_clip

CLIP_VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
CLIP_TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
POOL = Kind("MultiheadAttention", "b h q k | (b h) q k", where="*attn_pool.attn", is_self=False)


def _image_and_text() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(IMAGES, 3, 32, 32), token_ids(12)


def _clip(name: str, *kinds: Kind, sites: int, text: dict[str, Any] | None = None, **vision: Any) -> None:
    build = made(
        "open_clip.model.CLIP", embed_dim=32, vision_cfg=CLIP_VISION | vision, text_cfg=CLIP_TEXT | (text or {})
    )
    _add("open_clip", name, build, _image_and_text, *kinds, sites=sites)


_clip("CLIP", MHA, sites=4)
_clip("CLIP custom block", Kind("Attention"), MHA, sites=4, block_type="custom", qk_norm=True)
_clip("CLIP attentional pool", POOL, MHA, sites=5, attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6)
# the mean of all places stands first among the keys, and is the only query
_clip("CLIP ResNet", Kind("AttentionPool2d", offset=0), MHA, sites=3, layers=(1, 1, 1, 1), width=16, head_width=8)
_add(
    "open_clip",
    "CoCa",
    made(
        "open_clip.coca_model.CoCa",
        embed_dim=32,
        vision_cfg=CLIP_VISION | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        text_cfg=CLIP_TEXT | {"embed_cls": True, "output_tokens": True},
        multimodal_cfg=CLIP_TEXT,
    ),
    _image_and_text,
    POOL,
    Kind("MultiheadAttention", "b h q k | (b h) q k", where="*.cross_attn.*", is_self=False),
    MHA,
    sites=9,
)

# segment_anything

_add(
    "segment_anything",
    "ImageEncoderViT",
    made(
        "segment_anything.modeling.ImageEncoderViT",
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        out_chans=16,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    ),
    images(64),
    Kind("Attention", "(b h) q k"),
    sites=2,
)
_add(
    "segment_anything",
    "TwoWayTransformer",
    made("segment_anything.modeling.TwoWayTransformer", depth=1, embedding_dim=32, num_heads=4, mlp_dim=32),
    lambda: (torch.randn(IMAGES, 32, 4, 4), torch.randn(IMAGES, 32, 4, 4), torch.randn(IMAGES, 5, 32)),
    Kind("Attention", where="*.self_attn"),
    Kind("Attention", is_self=False),
    sites=4,
)

# monai

BLOCK = Kind("SABlock")
_add(
    "monai",
    "ViT",
    made(
        "monai.networks.nets.ViT",
        in_channels=1,
        img_size=(16, 16),
        patch_size=(4, 4),
        hidden_size=32,
        mlp_dim=32,
        num_layers=2,
        num_heads=4,
        classification=True,
        num_classes=5,
        spatial_dims=2,
    ),
    images(16, 1),
    BLOCK,
    sites=2,
)
_add(
    "monai",
    "SwinUNETR",
    made(
        "monai.networks.nets.SwinUNETR",
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
        spatial_dims=2,
    ),
    images(64, 1),
    Kind("WindowAttention"),
    sites=4,
)
_add(
    "monai",
    "DiffusionModelUNet",
    made(
        "monai.networks.nets.DiffusionModelUNet",
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=(16, 32),
        attention_levels=(False, True),
        num_head_channels=8,
        norm_num_groups=8,
        with_conditioning=True,
        cross_attention_dim=16,
    ),
    lambda: (torch.randn(IMAGES, 1, 16, 16), torch.randint(10, (IMAGES,)), torch.randn(IMAGES, 5, 16)),
    BLOCK,
    Kind("CrossAttentionBlock", is_self=False),
    sites=8,
)
_add(
    "monai",
    "Restormer",
    made(
        "monai.networks.nets.restormer.Restormer",
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        dim=16,
        num_blocks=(1, 1, 1, 1),
        heads=(2, 2, 4, 4),
        num_refinement_blocks=1,
    ),
    images(32, 1),
    Kind("CABlock", shows="channels"),
    sites=8,
)
_add(
    "monai",
    "AttentionUnet",
    made("monai.networks.nets.AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2)),
    images(32, 1),
    sites=0,
)

# diffusers

UNET: dict[str, Any] = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
UNET |= {"attention_head_dim": 8}
HEADS = Kind("Attention", "b h q k | (b h) q k", "heads")
CROSS = Kind("Attention", "b h q k | (b h) q k", "heads", where="*.attn2", is_self=False)


def _unet(processor: Callable[[], Any] | None = None) -> nn.Module:
    """Build a UNet, with another way of computing its attention."""
    model: Any = load("diffusers.UNet2DModel")(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **UNET,
    )
    if processor is not None:
        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(processor())
    return model


def _image_and_time() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(IMAGES, 3, 16, 16), torch.tensor(3)


PROCESSORS = "diffusers.models.attention_processor"
_add("diffusers", "UNet2D", _unet, _image_and_time, HEADS, sites=4)
_add(
    "diffusers",
    "UNet2D written out",
    lambda: _unet(load(f"{PROCESSORS}.AttnProcessor")),
    _image_and_time,
    HEADS,
    sites=4,
)
_add(
    "diffusers",
    "UNet2D sliced",
    lambda: _unet(lambda: load(f"{PROCESSORS}.SlicedAttnProcessor")(1)),
    _image_and_time,
    Kind("Attention", "(b h) q k", "heads", loop="slices"),
    sites=4,
)
_add(
    "diffusers",
    "UNet2DCondition",
    made(
        "diffusers.UNet2DConditionModel",
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        **UNET,
    ),
    lambda: (torch.randn(IMAGES, 4, 16, 16), torch.tensor(3), torch.randn(IMAGES, 5, 24)),
    CROSS,
    HEADS,
    sites=8,
)
_add(
    "diffusers",
    "DiT",
    made(
        "diffusers.DiTTransformer2DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=8,
        num_embeds_ada_norm=10,
    ),
    lambda: {
        "hidden_states": torch.randn(IMAGES, 4, 8, 8),
        "timestep": torch.randint(10, (IMAGES,)),
        "class_labels": torch.randint(10, (IMAGES,)),
    },
    HEADS,
    sites=2,
)
_add(
    "diffusers",
    "Sana",
    made(
        "diffusers.SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    ),
    lambda: {
        "hidden_states": torch.randn(IMAGES, 4, 8, 8),
        "encoder_hidden_states": torch.randn(IMAGES, 5, 16),
        "timestep": torch.randint(10, (IMAGES,)),
    },
    CROSS,
    Kind("Attention", where="*.attn1", shows="nothing"),
    sites=1,
)
_add(
    "diffusers",
    "Flux",
    made(
        "diffusers.FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ),
    lambda: {
        "hidden_states": torch.randn(IMAGES, 16, 4),
        "encoder_hidden_states": torch.randn(IMAGES, 5, 24),
        "pooled_projections": torch.randn(IMAGES, 8),
        "timestep": torch.rand(IMAGES),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    },
    Kind("FluxAttention", heads="heads"),
    sites=2,
)
_add(
    "diffusers",
    "TransformerTemporal",
    made(
        "diffusers.models.transformers.transformer_temporal.TransformerTemporalModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=32,
        norm_num_groups=8,
    ),
    lambda: {"hidden_states": torch.randn(9, 32, 4, 4), "num_frames": 3},
    HEADS,
    sites=2,
)
