"""See what attention heads do while a model trains.

    from attention_monitor import AttentionMonitor
    Trainer(callbacks=[AttentionMonitor(every_n_steps=100)])

Names are imported when they are first used: ``import attention_monitor`` loads neither torch nor Lightning. No module
or folder of the package may have the name of one of them: importing it would put the module in the name's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    # a training run
    "AttentionMonitor": "monitoring.lightning_callback",
    "AttentionTrainerCallback": "monitoring.huggingface_callback",
    "AttentionRecorder": "monitoring.recorder",
    "Options": "monitoring.options",
    # a model, once
    "capture": "capturing.capture_mode",
    "summarize": "statistics.totals",
    "run_probe": "monitoring.probing",
    "AttentionMaps": "analysis",
    "attention_maps": "analysis",
    "head_kinds": "analysis",
    "ranking": "analysis",
    "top_attended": "analysis",
    # pictures
    "animate_head": "plots.figures",
    "plot_difference": "plots.figures",
    "plot_differences": "plots.figures",
    "plot_flow": "plots.values",
    "plot_head": "plots.figures",
    "plot_heads": "plots.figures",
    "plot_layers": "plots.figures",
    "plot_matrix": "plots.values",
    # what is seen
    "AttentionCall": "capturing.attention_call",
    "RowBlock": "statistics.row_blocks",
    "Rows": "statistics.rows",
    "Snapshot": "snapshots",
    "Finding": "diagnosis.finding",
    # what can be added
    "Recogniser": "capturing.recognisers.base",
    "STATISTICS": "statistics.catalogue",
    "statistic": "statistics.catalogue",
    "Detector": "diagnosis.detector",
    "Sink": "writers.sinks",
    "Probe": "probes.base",
    "EncodedProbe": "probes.base",
    "ProbeBatch": "probes.base",
    "HeadScore": "snapshots",
    "BatchProbe": "probes.batch",
    "LayerProbe": "probes.text",
    "RelationProbe": "probes.relation",
    "RepeatedTokensProbe": "probes.repeated",
    "TextProbe": "probes.text",
    # what goes wrong
    "AttentionMonitorError": "errors",
    "AttentionWarning": "errors",
    "NoAttentionError": "errors",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .analysis import AttentionMaps, attention_maps, head_kinds, ranking, top_attended
    from .capturing.attention_call import AttentionCall
    from .capturing.capture_mode import capture
    from .capturing.recognisers.base import Recogniser
    from .diagnosis.detector import Detector
    from .diagnosis.finding import Finding
    from .errors import AttentionMonitorError, AttentionWarning, NoAttentionError
    from .monitoring.huggingface_callback import AttentionTrainerCallback
    from .monitoring.lightning_callback import AttentionMonitor
    from .monitoring.options import Options
    from .monitoring.probing import run_probe
    from .monitoring.recorder import AttentionRecorder
    from .plots.figures import animate_head, plot_difference, plot_differences, plot_head, plot_heads, plot_layers
    from .plots.values import plot_flow, plot_matrix
    from .probes.base import EncodedProbe, Probe, ProbeBatch
    from .probes.batch import BatchProbe
    from .probes.relation import RelationProbe
    from .probes.repeated import RepeatedTokensProbe
    from .probes.text import LayerProbe, TextProbe
    from .snapshots import HeadScore, Snapshot
    from .statistics.catalogue import STATISTICS, statistic
    from .statistics.row_blocks import RowBlock
    from .statistics.rows import Rows
    from .statistics.totals import summarize
    from .writers.sinks import Sink


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
