"""Probes, run through a model."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..capturing.capture_mode import captures_paused
from ..errors import AttentionMonitorError
from ..probes.base import EncodedProbe, Probe, ProbeBatch
from ..probes.layer_measures import LayerOutputs, with_layers
from ..snapshots import Snapshot
from ..statistics.catalogue import resolve_statistics
from .measuring import Recording
from .options import check_model, check_options


def run_probe(
    model: nn.Module,
    probe: str | Probe,
    tokenizer: Any = None,
    *,
    statistics: Sequence[str] = (),
    sites: str | Sequence[str] | None = None,
) -> Snapshot:
    """What the heads of a model do with a probe.

    Args:
        model: called in evaluation mode, without gradients; left as it was.
        probe: a text, or a ``Probe``.
        tokenizer: for a probe without one of its own.
        statistics: names from ``STATISTICS``, taken beside the probe's scores.
        sites: patterns for the module paths to look at; None: all.

    Raises:
        AttentionMonitorError: when the probe cannot be encoded, or the model does not take it.
        NoAttentionError: when the model runs it without an attention call.
    """
    options = check_options(1, probe, statistics, 1, None, sites)
    if len(options["probe"]) != 1:
        raise AttentionMonitorError(f"run_probe takes one probe, got {probe!r}; call it for each.")
    check_model(model, "run_probe runs")
    encoded = options["probe"][0].encode(tokenizer)
    recording = Recording(model, resolve_statistics(statistics), sites=options["sites"], with_patterns=True)
    return run_encoded(recording, encoded, step=0)


def run_encoded(recording: Recording, probe: EncodedProbe, step: int) -> Snapshot:
    def watch(batch: ProbeBatch) -> None:
        recording.score = batch.score

    outputs = LayerOutputs(recording.model, len(probe.labels or ())) if probe.with_layers else None
    with captures_paused(), outputs or nullcontext(), recording:
        probe.run(recording.model, watch)
    recording.require_attention()
    snapshot = recording.snapshot(step, probe)
    return with_layers(snapshot, outputs) if outputs else snapshot
