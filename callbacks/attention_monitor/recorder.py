"""What a sampled step does, for any training loop: probe, live statistics, diagnosis, writing."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capturing import AttentionCall, Capture, NoAttentionError, captures_paused, describe_no_attention, layer_labels
from .diagnosis import Diagnosis
from .errors import AttentionMonitorError
from .probes import TokenProbe
from .statistics import HeadTotals, Snapshot, Statistic, resolve_statistics
from .writers import Writer

MAX_MAP_SIZE = 96  # positions in a picture; longer patterns are pooled


class AttentionWarning(UserWarning):
    """Something is wrong with a head."""


class Recording:
    """Context that takes the statistics of every attention call under ``model``.

    Args:
        model: whose calls are looked at.
        statistics: to take.
        max_sequences: of each call; None: all.
        with_patterns: keep the pattern of each site's first sequence too.
    """

    def __init__(
        self, model: nn.Module, statistics: Sequence[Statistic], max_sequences: int | None, with_patterns: bool
    ) -> None:
        self.statistics, self.max_sequences, self.with_patterns = statistics, max_sequences, with_patterns
        self._capture = Capture(model, self._on_call)
        self._totals: dict[str, HeadTotals] = {}
        self._patterns: dict[str, Tensor] = {}
        self._pooled = False

    def __enter__(self) -> "Recording":
        self._capture.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._capture.__exit__(*exception)

    def _on_call(self, call: AttentionCall) -> None:
        if self.max_sequences is not None:
            call = call.first(self.max_sequences)
        totals = self._totals.setdefault(call.site, HeadTotals(self.statistics))
        if self.with_patterns and call.site not in self._patterns:
            self._patterns[call.site] = picture(call.first(1))[0].cpu()
            self._pooled |= max(call.query.shape[2], call.key.shape[2]) > MAX_MAP_SIZE
        totals.add(call)

    @property
    def saw_attention(self) -> bool:
        return bool(self._capture.sites)

    def snapshot(self, step: int, source: str, tokens: list[str] | None = None) -> Snapshot:
        """What has been seen; sites in order of execution."""
        sites = [self._capture.final_site(site) for site in self._totals]
        return Snapshot(
            step=step,
            source=source,
            labels=layer_labels(sites),
            sites=sites,
            values=[totals.values() for totals in self._totals.values()],
            patterns=list(self._patterns.values()),
            tokens=None if self._pooled else tokens,
        )


def picture(call: AttentionCall) -> Tensor:
    """The pattern (B, H, Q, K), or its largest weights over a grid of at most MAX_MAP_SIZE positions a side.

    Only for looking at. Built a band of rows at a time: memory is O(K), not O(Q x K).
    """
    Q, K = call.query.shape[2], call.key.shape[2]
    if max(Q, K) <= MAX_MAP_SIZE:
        return call.pattern()
    rows, columns = min(Q, MAX_MAP_SIZE), min(K, MAX_MAP_SIZE)
    edges = [Q * i // rows for i in range(rows + 1)]
    bands = [F.adaptive_max_pool2d(call.pattern(start, stop), (1, columns)) for start, stop in pairwise(edges)]
    return torch.cat(bands, dim=2)


class AttentionRecorder:
    """Records one sampled step after another.

    The caller says when: ``begin(step)`` before the forward, ``end_forward()`` before the backward pass, ``finish()``
    after the step, ``abort()`` when it failed.

    Args:
        model: the module to watch; probes are run by calling it.
        statistics: names from the registry, which are written.
        probe: run before the forward, at the same step.
        max_sequences: of the live batch that are looked at.
        writer: gets the snapshots.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[str],
        probe: TokenProbe | None = None,
        max_sequences: int = 4,
        writer: Writer | None = None,
    ) -> None:
        self.model, self.probe, self.max_sequences, self.writer = model, probe, max_sequences, writer
        self.diagnosis = Diagnosis()
        self._live_statistics = resolve_statistics(list(dict.fromkeys([*statistics, *self.diagnosis.statistics])))
        self._live: Recording | None = None
        self._probed: Snapshot | None = None
        self._step = 0
        self.snapshots: dict[str, Snapshot] = {}  # the newest of each source

    def check_probe(self, precision: AbstractContextManager[Any] | None = None) -> None:
        """Try the probe, so that one that does not fit is refused before training.

        Raises:
            AttentionMonitorError: when the model does not take the probe.
            NoAttentionError: when the model runs it without an attention call.
        """
        self._run_probe(0, precision or nullcontext())

    def begin(self, step: int, precision: AbstractContextManager[Any] | None = None) -> None:
        """Run the probe (under ``precision``, e.g. an autocast context), then watch what the model does."""
        self.abort()  # a step that was begun and never finished
        self._step = step
        self._probed = self._try_probe(step, precision or nullcontext())
        self._live = Recording(self.model, self._live_statistics, self.max_sequences, with_patterns=self.probe is None)
        self._live.__enter__()

    def sample_probe(self, step: int, precision: AbstractContextManager[Any] | None = None) -> None:
        """Run the probe alone."""
        self._keep(self._try_probe(step, precision or nullcontext()))

    def end_forward(self) -> None:
        """Stop watching: a forward that is recomputed in the backward pass must not count twice.

        Goes on watching if there was no attention yet: this may be the backward of another part of the model.
        """
        if self._live is not None and self._live.saw_attention:
            self._live.__exit__()

    def finish(self) -> Snapshot:
        """Diagnose and write what was seen.

        Raises:
            NoAttentionError: when no attention call was seen in this step, by its probe, or before it.
        """
        live = self._live
        assert live is not None, "begin() comes first"
        self.abort()
        if not live.saw_attention and not self.snapshots and self._probed is None:
            raise NoAttentionError(describe_no_attention(self.model))
        snapshot = live.snapshot(self._step, "live")
        # not before: drawing would compete with the step
        self._keep(self._probed)
        self._keep(snapshot)
        for message in self.diagnosis.explain(self.diagnosis.update(snapshot)):
            warnings.warn(f"AttentionMonitor: {message}", AttentionWarning, stacklevel=2)
        return snapshot

    def abort(self) -> None:
        """Stop watching and forget the step."""
        if self._live is not None:
            self._live.__exit__()
            self._live = None

    def _try_probe(self, step: int, precision: AbstractContextManager[Any]) -> Snapshot | None:
        """None when the probe fails: it fitted before training, so that it does not now is no reason to stop."""
        try:
            return self._run_probe(step, precision)
        except AttentionMonitorError as error:
            warnings.warn(f"AttentionMonitor at step {step}: {error}", stacklevel=2)
            return None

    def _run_probe(self, step: int, precision: AbstractContextManager[Any]) -> Snapshot | None:
        if self.probe is None:
            return None
        with precision, captures_paused(), Recording(self.model, (), None, with_patterns=True) as recording:
            self.probe.run(self.model)
        if not recording.saw_attention:
            raise NoAttentionError(describe_no_attention(self.model))
        return recording.snapshot(step, self.probe.name, self.probe.labels)

    def _keep(self, snapshot: Snapshot | None) -> None:
        if snapshot is None:
            return
        self.snapshots[snapshot.source] = snapshot
        if self.writer is not None:
            self.writer.write(snapshot)
