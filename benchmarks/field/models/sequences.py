"""Sequences of tokens: transformers, x-transformers, fair-esm, and attention that is local, linear or axial."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..expectation import FieldModel, Kind
from .building import IMAGES, images, load, made, token_ids, tokens, vectors

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


# transformers


def _hf(
    name: str, config: str, inputs: Callable[[], Any], *kinds: Kind, sites: int, label: str = "", **options: Any
) -> None:
    def build() -> nn.Module:
        model: nn.Module = load(f"transformers.{name}")(load(f"transformers.{config}")(**options))
        return model

    _add("transformers", label or name, build, inputs, *kinds, sites=sites)


def _ids() -> dict[str, Any]:
    return {"input_ids": token_ids(12)}


def _pixels(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(IMAGES, 3, size, size)}


BERT: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 64}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
N_HEADS = "num_attention_heads"
for way in ("sdpa", "eager"):
    _hf(
        "BertModel",
        "BertConfig",
        _ids,
        Kind("BertSelfAttention", heads=N_HEADS),
        sites=2,
        label=f"BertModel {way}",
        attn_implementation=way,
        **BERT,
    )
    _hf(
        "LlamaModel",
        "LlamaConfig",
        _ids,
        Kind("LlamaAttention", heads="config.num_attention_heads"),
        sites=2,
        label=f"LlamaModel {way}",
        attn_implementation=way,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
    )
T5: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
T5 |= {"dropout_rate": 0.0}
_hf(
    "T5Model",
    "T5Config",
    lambda: {"input_ids": token_ids(12), "decoder_input_ids": token_ids(7)},
    Kind("T5Attention", heads="n_heads", where="*.EncDecAttention", is_self=False),
    Kind("T5Attention", heads="n_heads"),
    sites=3,
    **T5,
)
_hf(
    "LongT5EncoderModel",
    "LongT5Config",
    _ids,
    Kind("LongT5LocalAttention", "b w h q k", "n_heads", offset=4),
    sites=1,
    local_radius=3,
    **T5,
)
# the last keys are summaries of blocks
_hf(
    "LongT5EncoderModel",
    "LongT5Config",
    _ids,
    Kind("LongT5TransientGlobalAttention", "b w h q k", "n_heads", offset=4),
    sites=1,
    label="LongT5EncoderModel transient-global",
    local_radius=3,
    encoder_attention_type="transient-global",
    global_block_size=4,
    **T5,
)
# its products are of chunks that overlap
_hf(
    "LongformerModel",
    "LongformerConfig",
    _ids,
    Kind("LongformerSelfAttention", shows="nothing"),
    sites=0,
    attention_window=4,
    pad_token_id=1,
    **BERT,
)
# a softmax that is written with exp
_hf(
    "ReformerModel",
    "ReformerConfig",
    lambda: {"input_ids": token_ids(16)},
    Kind("LocalSelfAttention", shows="nothing"),
    Kind("LSHSelfAttention", shows="nothing"),
    sites=0,
    vocab_size=50,
    attention_head_size=8,
    attn_layers=["local", "lsh"],
    axial_pos_embds=False,
    hidden_size=32,
    max_position_embeddings=64,
    num_attention_heads=4,
    feed_forward_size=32,
    lsh_attn_chunk_length=4,
    local_attn_chunk_length=4,
    num_buckets=4,
    is_decoder=False,
    hidden_dropout_prob=0.0,
    local_attention_probs_dropout_prob=0.0,
    hash_seed=0,
)
_hf(
    "XLNetModel",
    "XLNetConfig",
    _ids,
    Kind("XLNetRelativeAttention", heads="n_head"),
    sites=2,
    vocab_size=50,
    d_model=32,
    n_layer=2,
    n_head=4,
    d_inner=32,
    dropout=0.0,
)
_hf(
    "FunnelModel",
    "FunnelConfig",
    _ids,
    Kind("FunnelRelMultiheadAttention", heads="config.n_head", where="*blocks.1.*", offset="none"),
    Kind("FunnelRelMultiheadAttention", heads="config.n_head"),
    sites=3,
    vocab_size=50,
    block_sizes=[1, 1],
    num_decoder_layers=1,
    d_model=32,
    n_head=4,
    d_head=8,
    d_inner=32,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)
_hf(
    "DebertaV2Model",
    "DebertaV2Config",
    _ids,
    Kind("DisentangledSelfAttention", heads=N_HEADS),
    sites=2,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    **BERT,
)
_hf(
    "EsmModel",
    "EsmConfig",
    _ids,
    Kind("EsmSelfAttention", heads=N_HEADS),
    sites=2,
    pad_token_id=1,
    mask_token_id=2,
    **BERT,
)
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SWIN |= {"window_size": 4, "drop_path_rate": 0.0}
_hf("SwinModel", "SwinConfig", _pixels(32), Kind("SwinAttention", heads=N_HEADS), sites=4, **SWIN)
_hf("Swinv2Model", "Swinv2Config", _pixels(32), Kind("Swinv2SelfAttention", heads=N_HEADS), sites=4, **SWIN)
_hf(
    "MobileViTModel",
    "MobileViTConfig",
    _pixels(96),
    Kind("MobileViTSelfAttention", heads=N_HEADS),
    sites=9,
    image_size=96,
    hidden_sizes=[32, 40, 48],
    neck_hidden_sizes=[8, 8, 16, 16, 32, 32, 32],
    num_attention_heads=4,
    hidden_dropout_prob=0.0,
)
_hf(
    "SegformerModel",
    "SegformerConfig",
    _pixels(64),
    Kind("SegformerAttention", heads=N_HEADS),
    sites=2,
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[4, 2],
    hidden_sizes=[16, 32],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[2, 4],
    mlp_ratios=[2, 2],
    drop_path_rate=0.0,
)


def _detr(name: str, *kinds: Kind, **options: Any) -> None:
    def build() -> nn.Module:
        backbone = load("transformers.ResNetConfig")(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        config = load(f"transformers.{name}Config")(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            num_queries=5,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            dropout=0.0,
            **options,
        )
        model: nn.Module = load(f"transformers.{name}Model")(config)
        return model

    sites = sum(kind.has_pattern for kind in kinds)
    _add("transformers", f"{name}Model", build, _pixels(64), *kinds, sites=sites)


# positions are added to queries and keys in one layer, and to values nowhere
_detr(
    "Detr",
    Kind("DetrSelfAttention", heads=4, where="encoder.*"),
    Kind("DetrSelfAttention", heads=4, where="decoder.*"),
    Kind("DetrCrossAttention", heads=4, is_self=False),
)
_detr(
    "ConditionalDetr",
    Kind("ConditionalDetrSelfAttention", heads=4),
    Kind("ConditionalDetrDecoderSelfAttention", heads=4),
    Kind("ConditionalDetrDecoderCrossAttention", heads=4, is_self=False),
)
_detr(
    "DeformableDetr",
    Kind("DeformableDetrMultiscaleDeformableAttention", shows="nothing"),
    Kind("DeformableDetrSelfAttention", heads=4),
    num_feature_levels=1,
)
_hf(
    "PerceiverModel",
    "PerceiverConfig",
    lambda: {"inputs": torch.randn(IMAGES, 9, 16)},
    Kind("PerceiverSelfAttention", where="*cross_attention*", is_self=False),
    Kind("PerceiverSelfAttention"),
    sites=2,
    num_latents=5,
    d_latents=32,
    d_model=16,
    num_blocks=1,
    num_self_attends_per_block=1,
    num_self_attention_heads=4,
    num_cross_attention_heads=2,
    attention_probs_dropout_prob=0.0,
)
_hf(
    "WhisperModel",
    "WhisperConfig",
    lambda: {"input_features": torch.randn(IMAGES, 8, 20), "decoder_input_ids": token_ids(7)},
    Kind("WhisperAttention", where="*.encoder_attn", is_self=False),
    Kind("WhisperAttention"),
    sites=3,
    vocab_size=50,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_mel_bins=8,
    max_source_positions=10,
    max_target_positions=16,
    pad_token_id=1,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
_hf(
    "TimesformerModel",
    "TimesformerConfig",
    lambda: {"pixel_values": torch.randn(2, 3, 3, 16, 16)},
    Kind("TimesformerSelfAttention"),
    sites=2,
    image_size=16,
    patch_size=8,
    num_frames=3,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=32,
    drop_path_rate=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_hf(
    "InformerModel",
    "InformerConfig",
    lambda: {
        "past_values": torch.randn(IMAGES, 13),
        "past_time_features": torch.randn(IMAGES, 13, 1),
        "past_observed_mask": torch.ones(IMAGES, 13),
        "future_values": torch.randn(IMAGES, 4),
        "future_time_features": torch.randn(IMAGES, 4, 1),
    },
    Kind("InformerProbSparseAttention", "(b h) q k", offset="none"),
    Kind("InformerAttention", is_self=False),
    sites=3,
    prediction_length=4,
    context_length=12,
    lags_sequence=[1],
    input_size=1,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    dropout=0.0,
    num_time_features=1,
    sampling_factor=1,
)
_hf(
    "PatchTSTModel",
    "PatchTSTConfig",
    lambda: {"past_values": torch.randn(IMAGES, 16, 2)},
    Kind("PatchTSTAttention"),
    sites=2,
    num_input_channels=2,
    context_length=16,
    patch_length=4,
    patch_stride=4,
    d_model=32,
    num_attention_heads=4,
    num_hidden_layers=2,
    ffn_dim=32,
)
# image patches are given to groups: a softmax over the queries, and hard
_hf(
    "GroupViTVisionModel",
    "GroupViTVisionConfig",
    _pixels(32),
    Kind("GroupViTAttention", "(b h) q k", where="*.pre_assign_attn.*", is_self=None),
    Kind("GroupViTAttention", "(b h) q k"),
    Kind("GroupViTAssignAttention", shows="nothing"),
    sites=3,
    hidden_size=32,
    intermediate_size=32,
    depths=[1, 1],
    num_hidden_layers=2,
    num_group_tokens=[4, 0],
    num_output_groups=[4, 0],
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
_hf(
    "FNetModel",
    "FNetConfig",
    _ids,
    sites=0,
    **{name: value for name, value in BERT.items() if "attention" not in name},
)

# x-transformers

X: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
X_ATTENTION = Kind("Attention", heads="heads")
MIXED = Kind("Attention", heads="heads", weights="attend.post_softmax_talking_heads.output")


def _x(name: str, *kinds: Kind, layers: str = "Decoder", **options: Any) -> None:
    def build() -> nn.Module:
        attn_layers = load(f"x_transformers.{layers}")(**X, **options)
        model: nn.Module = load("x_transformers.TransformerWrapper")(
            num_tokens=50, max_seq_len=32, attn_layers=attn_layers
        )
        return model

    _add("x_transformers", name, build, tokens(12), *kinds, sites=2)


_x("Encoder", X_ATTENTION, layers="Encoder")
_x("Decoder", X_ATTENTION)
_x("Decoder fused", X_ATTENTION, attn_flash=True)
_x("Decoder grouped queries", X_ATTENTION, attn_kv_heads=2)
_x("Decoder grouped queries, fused", X_ATTENTION, attn_kv_heads=2, attn_flash=True)
_x("Decoder one key head", X_ATTENTION, attn_one_kv_head=True)
_x("Decoder talking heads", MIXED, attn_pre_talking_heads=True, attn_post_talking_heads=True)
_x("Decoder talking heads before", X_ATTENTION, attn_pre_talking_heads=True)
_x("Decoder memory", Kind("Attention", heads="heads", offset=3), attn_num_mem_kv=3)
_x("Decoder ALiBi", X_ATTENTION, alibi_pos_bias=True)
_x("Decoder normalised", X_ATTENTION, attn_qk_norm=True)
_x("Decoder sparse", X_ATTENTION, attn_sparse_topk=4)
_x("Decoder gated values", X_ATTENTION, attn_gate_values=True)
_x("Decoder scaled heads", X_ATTENTION, attn_head_scale=True)
_x("Decoder soft clamp", X_ATTENTION, attn_softclamp_logits=True)
_x("Decoder selective", X_ATTENTION, attn_selective=True)
_add(
    "x_transformers",
    "XTransformer",
    made(
        "x_transformers.XTransformer",
        dim=32,
        enc_num_tokens=50,
        enc_depth=1,
        enc_heads=4,
        enc_max_seq_len=32,
        dec_num_tokens=50,
        dec_depth=1,
        dec_heads=4,
        dec_max_seq_len=32,
        enc_attn_dim_head=8,
        dec_attn_dim_head=8,
    ),
    lambda: (token_ids(12), token_ids(9)),
    Kind("Attention", heads="heads", where="decoder.*.layers.1.1", is_self=False),
    X_ATTENTION,
    sites=3,
)

# fair-esm

_add(
    "esm",
    "ESM2",
    made("esm.ESM2", num_layers=2, embed_dim=32, attention_heads=4, alphabet="ESM-1b", token_dropout=False),
    lambda: (torch.randint(4, 20, (IMAGES, 10)),),
    Kind("MultiheadAttention", "(b h) q k"),
    sites=2,
)


def _esm(name: str, alphabet: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        namespace = load("argparse.Namespace")
        letters = load("esm.Alphabet").from_architecture(alphabet)
        sizes = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 32, "attention_heads": 4, "max_positions": 64}
        model: nn.Module = load(f"esm.{name}")(namespace(**sizes, **options), letters)
        return model

    return build


_add(
    "esm",
    "ProteinBertModel",
    _esm(
        "ProteinBertModel",
        "ESM-1b",
        arch="roberta_large",
        emb_layer_norm_before=True,
        token_dropout=False,
        final_bias=True,
    ),
    lambda: (torch.randint(4, 20, (IMAGES, 9)),),
    Kind("MultiheadAttention", "(b h) q k"),
    sites=2,
)
# one pattern for all rows of an alignment; one for each of its columns
_add(
    "esm",
    "MSATransformer",
    _esm(
        "MSATransformer",
        "msa_transformer",
        arch="msa_transformer",
        num_layers=2,
        logit_bias=True,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_tokens=2**14,
        embed_positions_msa=True,
        embed_positions_msa_dim=32,
        max_tokens_per_msa=2**14,
    ),
    lambda: (torch.randint(4, 20, (IMAGES, 5, 9)),),
    Kind("RowSelfAttention", "h b q k"),
    Kind("ColumnSelfAttention", "h c b q k"),
    sites=4,
)

# attention in windows

LOCAL: dict[str, Any] = {"num_tokens": 50, "max_seq_len": 40, "dim": 32, "depth": 2, "heads": 4, "dim_head": 8}
for causal, label in ((True, "causal"), (False, "both sides")):
    # keys are the window before, the window itself, and the window after where that is allowed
    _add(
        "local_attention",
        f"LocalTransformer {label}",
        made("local_attention.LocalTransformer", causal=causal, local_attn_window_size=8, **LOCAL),
        tokens(40),
        Kind("LocalMHA", "(b h) w q k", "heads", offset=8),
        sites=2,
    )
_add(
    "routing_transformer",
    "RoutingTransformer",
    made(
        "routing_transformer.RoutingTransformer",
        dim=32,
        depth=1,
        heads=4,
        dim_head=8,
        max_seq_len=32,
        window_size=8,
        n_local_attn_heads=2,
        local_attn_window_size=8,
        causal=True,
    ),
    vectors(32, 32),
    Kind("LocalAttention", "(b h) w q k", 2, offset=8),
    Kind("KmeansAttention", "b h w q k", offset="none"),
    sites=2,
)
_add(
    "sinkhorn_transformer",
    "SinkhornTransformer",
    made(
        "sinkhorn_transformer.SinkhornTransformer", dim=32, depth=1, heads=4, dim_head=8, bucket_size=8, max_seq_len=40
    ),
    vectors(40, 32),
    Kind("SinkhornAttention", "(b h) w q k", "heads", offset=8),
    sites=1,
)
_add(
    "axial_attention",
    "AxialAttention",
    made("axial_attention.AxialAttention", dim=32, dim_index=1, heads=4, num_dimensions=2),
    vectors(32, 5, 6),
    Kind("SelfAttention", "(b h) q k", "heads"),
    sites=2,
)

# linear attention, and softmaxes that are written with exp

_add(
    "performer_pytorch",
    "Performer",
    made("performer_pytorch.Performer", dim=32, depth=2, heads=4, dim_head=8),
    vectors(12, 32),
    Kind("SelfAttention", shows="nothing"),
    sites=0,
)
_add(
    "performer_pytorch",
    "Performer with local heads",
    made("performer_pytorch.Performer", dim=32, depth=2, heads=4, dim_head=8, local_attn_heads=2, local_window_size=4),
    vectors(12, 32),
    Kind("FastAttention", shows="nothing"),
    Kind("LocalAttention", "(b h) w q k", 2, offset=4),
    sites=2,
)
_add(
    "linear_attention_transformer",
    "LinearAttentionTransformer",
    made(
        "linear_attention_transformer.LinearAttentionTransformer",
        dim=32,
        heads=4,
        depth=1,
        max_seq_len=32,
        n_local_attn_heads=2,
        local_attn_window_size=8,
    ),
    vectors(32, 32),
    Kind("SelfAttention", shows="nothing"),
    Kind("LocalAttention", "(b h) w q k", 2, offset=8),
    sites=1,
)
_add(
    "reformer_pytorch",
    "Reformer",
    made("reformer_pytorch.Reformer", dim=32, depth=1, heads=4, bucket_size=4, n_hashes=2),
    lambda: (torch.randn(IMAGES, 16, 32).requires_grad_(),),
    Kind("LSHAttention", shows="nothing"),
    sites=0,
)
_add(
    "memory_efficient_attention_pytorch",
    "Attention in blocks",
    made(
        "memory_efficient_attention_pytorch.Attention",
        dim=32,
        heads=4,
        dim_head=8,
        memory_efficient=True,
        q_bucket_size=4,
        k_bucket_size=4,
    ),
    vectors(12, 32),
    Kind("Attention", shows="nothing"),
    sites=0,
)
_add(
    "memory_efficient_attention_pytorch",
    "Attention",
    made("memory_efficient_attention_pytorch.Attention", dim=32, heads=4, dim_head=8),
    vectors(12, 32),
    Kind("Attention", heads="heads"),
    sites=1,
)
# keys are mixtures of all positions
_add(
    "linformer",
    "Linformer",
    made("linformer.Linformer", dim=32, seq_len=16, depth=2, heads=4, k=6),
    vectors(16, 32),
    Kind("LinformerSelfAttention", heads="heads", is_self=None),
    sites=2,
)

# latents

PERCEIVER: dict[str, Any] = {"num_latents": 7, "latent_dim": 32, "cross_heads": 2, "latent_heads": 4}
PERCEIVER |= {"cross_dim_head": 8, "latent_dim_head": 8}
LATENTS = (
    Kind("Attention", "(b h) q k", "heads", where="*cross_att*", is_self=False),
    Kind("Attention", "(b h) q k", "heads"),
)
_add(
    "perceiver_pytorch",
    "Perceiver",
    made(
        "perceiver_pytorch.Perceiver",
        num_freq_bands=2,
        depth=1,
        max_freq=4,
        input_channels=3,
        input_axis=2,
        num_classes=5,
        self_per_cross_attn=1,
        **PERCEIVER,
    ),
    vectors(6, 6, 3),
    *LATENTS,
    sites=2,
)
_add(
    "perceiver_pytorch",
    "PerceiverIO",
    made("perceiver_pytorch.PerceiverIO", depth=1, dim=16, queries_dim=16, logits_dim=5, **PERCEIVER),
    lambda: {"data": torch.randn(IMAGES, 9, 16), "queries": torch.randn(5, 16)},
    Kind("Attention", "(b h) q k", "heads", where="decoder_cross_attn*", is_self=False),
    *LATENTS,
    sites=3,
)

# tables, speech, images with texts

TAB: dict[str, Any] = {"categories": (5, 4, 3), "num_continuous": 2, "dim": 32, "depth": 2, "heads": 4}
TAB |= {"dim_head": 8, "dim_out": 1}


def _row() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, (IMAGES, 3)), torch.randn(IMAGES, 2)


_add(
    "tab_transformer_pytorch",
    "TabTransformer",
    lambda: load("tab_transformer_pytorch.TabTransformer")(mlp_act=nn.ReLU(), **TAB),
    _row,
    Kind("Attention", heads="heads"),
    sites=2,
)
_add(
    "tab_transformer_pytorch",
    "FTTransformer",
    made("tab_transformer_pytorch.FTTransformer", **TAB),
    _row,
    Kind("Attention", heads="heads"),
    sites=2,
)


def _tabpfn() -> nn.Module:
    v2 = "tabpfn.architectures.tabpfn_v2"
    config = load(f"{v2}.TabPFNV2Config")(max_num_classes=3, num_buckets=0, emsize=32, nlayers=1, nhead=4)
    model: nn.Module = load(f"{v2}.get_architecture")(config)
    return model


# the features of each row look at one another, and the rows of each feature; new rows look at known ones
_add(
    "tabpfn",
    "TabPFNV2",
    _tabpfn,
    lambda: (torch.randn(9, IMAGES, 6), torch.randint(3, (5, IMAGES)).float()),
    Kind("AlongRowAttention"),
    Kind("AlongColumnAttention", is_self=None),
    sites=3,
)
_add(
    "conformer",
    "Conformer",
    made("conformer.Conformer", dim=32, depth=2, heads=4, dim_head=8, conv_kernel_size=3),
    vectors(12, 32),
    Kind("Attention", heads="heads"),
    sites=2,
)
_add(
    "x_clip",
    "CLIP",
    made(
        "x_clip.CLIP",
        dim_text=32,
        dim_image=32,
        dim_latent=16,
        num_text_tokens=50,
        text_enc_depth=1,
        text_seq_len=12,
        text_heads=4,
        text_dim_head=8,
        visual_enc_depth=1,
        visual_image_size=32,
        visual_patch_size=8,
        visual_heads=4,
        visual_dim_head=8,
        visual_patch_dropout=0.0,
    ),
    lambda: (token_ids(12), *images(32)()),
    Kind("Attention", heads="heads"),
    sites=2,
)
