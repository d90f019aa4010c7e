"""See what attention heads do while a model trains.

    from attention_monitor import AttentionMonitor
    Trainer(callbacks=[AttentionMonitor(every_n_steps=100)])

Names are imported when they are first used: ``import attention_monitor`` loads neither torch nor Lightning. No module
of the package may have the name of one of them: importing it would put the module in the name's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "AttentionCall": "capturing.attention_call",
    "AttentionMaps": "analysis",
    "AttentionMonitor": "monitoring.lightning_callback",
    "AttentionMonitorError": "errors",
    "AttentionRecorder": "monitoring.recorder",
    "AttentionTrainerCallback": "monitoring.huggingface_callback",
    "AttentionWarning": "errors",
    "NoAttentionError": "errors",
    "STATISTICS": "statistics.catalogue",
    "RowBlock": "statistics.row_blocks",
    "Rows": "statistics.row_blocks",
    "Snapshot": "snapshots",
    "BatchProbe": "probes.batch",
    "Probe": "probes.base",
    "LayerProbe": "probes.text",
    "RelationProbe": "probes.relation",
    "RepeatedTokensProbe": "probes.repeated",
    "TextProbe": "probes.text",
    "run_probe": "monitoring.probing",
    "attention_maps": "analysis",
    "capture": "capturing.capture_mode",
    "head_kinds": "analysis",
    "ranking": "analysis",
    "top_attended": "analysis",
    "animate_head": "plots.figures",
    "plot_difference": "plots.figures",
    "plot_differences": "plots.figures",
    "plot_flow": "plots.figures",
    "plot_head": "plots.figures",
    "plot_heads": "plots.figures",
    "plot_layers": "plots.figures",
    "plot_matrix": "plots.figures",
    "statistic": "statistics.catalogue",
    "summarize": "statistics.totals",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .analysis import AttentionMaps, attention_maps, head_kinds, ranking, top_attended
    from .capturing.attention_call import AttentionCall
    from .capturing.capture_mode import capture
    from .errors import AttentionMonitorError, AttentionWarning, NoAttentionError
    from .monitoring.huggingface_callback import AttentionTrainerCallback
    from .monitoring.lightning_callback import AttentionMonitor
    from .monitoring.probing import run_probe
    from .monitoring.recorder import AttentionRecorder
    from .plots.figures import (
        animate_head,
        plot_difference,
        plot_differences,
        plot_flow,
        plot_head,
        plot_heads,
        plot_layers,
        plot_matrix,
    )
    from .probes.base import Probe
    from .probes.batch import BatchProbe
    from .probes.relation import RelationProbe
    from .probes.repeated import RepeatedTokensProbe
    from .probes.text import LayerProbe, TextProbe
    from .snapshots import Snapshot
    from .statistics.catalogue import STATISTICS, statistic
    from .statistics.row_blocks import RowBlock, Rows
    from .statistics.totals import summarize


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
