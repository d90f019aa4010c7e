"""Series and signals: pytorch-forecasting, darts, neuralforecast, braindecode, speechbrain, recbole."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from ..expectation import FieldModel, Kind
from .building import IMAGES, load, made, vectors

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


# pytorch-forecasting and darts: heads in a loop, and queries that are the last positions


def _series() -> Any:
    """Two series in the form that pytorch-forecasting takes."""
    frame = load("pandas.DataFrame")(
        {
            "time": [*range(30)] * 2,
            "group": ["a"] * 30 + ["b"] * 30,
            "target": torch.randn(60).tolist(),
            "known": torch.randn(60).tolist(),
        }
    )
    return load("pytorch_forecasting.TimeSeriesDataSet")(
        frame,
        time_idx="time",
        target="target",
        group_ids=["group"],
        max_encoder_length=8,
        max_prediction_length=4,
        time_varying_unknown_reals=["target"],
        time_varying_known_reals=["known"],
    )


def _forecaster() -> nn.Module:
    model: nn.Module = load("pytorch_forecasting.TemporalFusionTransformer").from_dataset(
        _series(), hidden_size=16, attention_head_size=4, dropout=0.0, hidden_continuous_size=8
    )
    return model


_add(
    "pytorch_forecasting",
    "TemporalFusionTransformer",
    _forecaster,
    lambda: (next(iter(_series().to_dataloader(train=True, batch_size=IMAGES)))[0],),
    Kind("InterpretableMultiHeadAttention", "b q k", "n_head", offset=8, loop="h"),
    sites=1,
)


def _darts() -> nn.Module:
    """Build a model of darts, which makes its module when it is fitted."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    forecaster = load("darts.models.TFTModel")(
        input_chunk_length=8,
        output_chunk_length=4,
        hidden_size=16,
        num_attention_heads=4,
        n_epochs=1,
        dropout=0.0,
        add_relative_index=True,
        batch_size=IMAGES,
        pl_trainer_kwargs={**quiet, "enable_model_summary": False, "accelerator": "cpu"},
    )
    with redirect_stdout(io.StringIO()):
        forecaster.fit(load("darts.TimeSeries").from_values(torch.randn(20).numpy()))
    model: nn.Module = forecaster.model
    return model


_add(
    "darts",
    "TFTModel",
    _darts,
    lambda: ((torch.randn(IMAGES, 8, 1), None, None),),
    Kind("_InterpretableMultiHeadAttention", "b q k", "n_head", offset=8, loop="h"),
    sites=1,
)

# neuralforecast


def _windows(series: int = 1) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        known = {"insample_y": torch.randn(IMAGES, 12, series), "insample_mask": torch.ones(IMAGES, 12, series)}
        return {"windows_batch": known | {"futr_exog": None, "hist_exog": None, "stat_exog": None}}

    return make


def _neural(name: str, *kinds: Kind, sites: int, series: int = 1, **options: Any) -> None:
    build = made(f"neuralforecast.models.{name}", h=6, input_size=12, max_steps=1, **options)
    _add("neuralforecast", name, build, _windows(series), *kinds, sites=sites)


FULL = Kind("FullAttention", heads=4)
_neural(
    "PatchTST",
    Kind("_ScaledDotProductAttention", heads=4),
    sites=2,
    encoder_layers=2,
    n_heads=4,
    hidden_size=32,
    linear_hidden_size=32,
    patch_len=4,
    stride=2,
    dropout=0.0,
)
_neural(
    "VanillaTransformer",
    Kind("FullAttention", heads=4, where="*cross_attention*", is_self=False),
    FULL,
    sites=3,
    encoder_layers=1,
    decoder_layers=1,
    n_head=4,
    hidden_size=32,
)
# queries are picked by what they and the keys are
_neural(
    "Informer",
    Kind("ProbAttention", heads=4, where="*cross_attention*", is_self=False),
    Kind("ProbAttention", heads=4, offset="none"),
    sites=4,
    encoder_layers=2,
    decoder_layers=1,
    n_head=4,
    hidden_size=32,
    factor=1,
)
_neural(
    "Autoformer",
    Kind("AutoCorrelation", shows="silence"),
    sites=0,
    encoder_layers=1,
    decoder_layers=1,
    n_head=4,
    hidden_size=32,
)
# tokens are series
_neural("iTransformer", FULL, sites=2, series=5, n_series=5, n_heads=4, hidden_size=32, e_layers=2, d_ff=32)
_neural("TFT", Kind("InterpretableMultiHeadAttention", heads="n_head"), sites=1, n_head=4, hidden_size=32, dropout=0.0)

# braindecode


def _signal(name: str, *kinds: Kind, sites: int, chans: int = 8, times: int = 512, **options: Any) -> None:
    build = made(f"braindecode.models.{name}", n_outputs=4, n_chans=chans, n_times=times, **options)
    _add("braindecode", name, build, vectors(chans, times), *kinds, sites=sites)


_signal("EEGConformer", Kind("MultiHeadAttention"), sites=2, num_layers=2, num_heads=10)
# queries go through one more layer than keys
_signal("AttnSleep", Kind("_MultiHeadedAttention", heads="h"), sites=2, chans=1, times=3000, sfreq=100, n_tce=2)
_signal("ATCNet", Kind("_MHA", "(h b) q k", 2), sites=2, times=1000, sfreq=250, n_windows=2)
_signal("CTNet", Kind("MultiHeadAttention"), sites=2, times=1000, sfreq=250, num_layers=2, num_heads=4)
_signal("CBraMod", Kind("MultiheadAttention"), sites=4, times=400, sfreq=200, n_layer=2)
_signal(
    "BIOT",
    Kind("SelfAttention", shows="nothing"),
    sites=0,
    times=1000,
    sfreq=200,
    embed_dim=64,
    num_heads=4,
    num_layers=2,
)

# speechbrain

MHA = "b h q k | (b h) q k"
SPEECH = (
    Kind("MultiheadAttention", MHA, where="*.multihead_attn.att", is_self=False),
    Kind("MultiheadAttention", MHA, where="*.att"),
    Kind("RelPosMHAXL"),
    Kind("RoPEMHA"),
)


def _speech(name: str, **options: Any) -> None:
    build = made(
        "speechbrain.lobes.models.transformer.TransformerASR.TransformerASR",
        tgt_vocab=20,
        input_size=16,
        d_model=32,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        d_ffn=32,
        dropout=0.0,
        normalize_before=True,
        causal=False,
        **options,
    )
    _add(
        "speechbrain",
        name,
        build,
        lambda: (torch.randn(IMAGES, 10, 16), torch.randint(1, 20, (IMAGES, 6)), torch.ones(IMAGES)),
        *SPEECH,
        sites=3,
    )


_speech("TransformerASR")
_speech("Conformer", encoder_module="conformer", attention_type="RelPosMHAXL", kernel_size=3)
_speech("Conformer rotary", encoder_module="conformer", attention_type="RoPEMHA", kernel_size=3)
_speech(
    "Branchformer", encoder_module="branchformer", attention_type="RelPosMHAXL", csgu_linear_units=32, kernel_size=3
)
for attention in ("content", "location"):
    # a step of the decoder is a query
    _add(
        "speechbrain",
        f"AttentionalRNNDecoder {attention}",
        made(
            "speechbrain.nnet.RNN.AttentionalRNNDecoder",
            rnn_type="gru",
            attn_type=attention,
            hidden_size=16,
            attn_dim=16,
            num_layers=1,
            enc_dim=16,
            input_size=16,
            channels=4,
            kernel_size=3,
        ),
        lambda: (torch.randn(IMAGES, 5, 16), torch.randn(IMAGES, 9, 16), torch.ones(IMAGES)),
        Kind("AttentionalRNNDecoder", "b k", 1, is_self=False, loop="q"),
        sites=1,
    )
# each channel has weights of its own over time
_add(
    "speechbrain",
    "ECAPA_TDNN",
    made(
        "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
        16,
        channels=[16, 16, 16],
        kernel_sizes=[3, 3, 1],
        dilations=[1, 1, 1],
        attention_channels=8,
        lin_neurons=8,
        res2net_scale=2,
        se_channels=8,
        groups=[1, 1, 1],
    ),
    vectors(12, 16),
    Kind("AttentiveStatisticsPooling", shows="silence"),
    sites=0,
)

# recbole

RECBOLE: dict[str, Any] = {"n_heads": 4, "hidden_size": 32, "inner_size": 32}
RECBOLE |= {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
_add(
    "recbole",
    "SASRec layers",
    made("recbole.model.layers.TransformerEncoder", n_layers=2, **RECBOLE),
    lambda: (torch.randn(IMAGES, 9, 32), torch.zeros(IMAGES, 1, 9, 9)),
    Kind("MultiHeadAttention", heads="num_attention_heads"),
    sites=2,
)
# its softmaxes are over the queries
_add(
    "recbole",
    "LightSANs layers",
    made("recbole.model.layers.LightTransformerEncoder", n_layers=1, k_interests=3, seq_len=9, **RECBOLE),
    lambda: (torch.randn(IMAGES, 9, 32), torch.randn(9, 32)),
    Kind("LightMultiHeadAttention", shows="nothing"),
    sites=0,
)
