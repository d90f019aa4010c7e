"""Probes, run through a model: once for all, or beside training when they are due."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from ..errors import AttentionMonitorError, Once
from ..probes.base import EncodedProbe, Probe
from ..snapshots import Snapshot
from ..statistics.registry import Statistic
from ..statistics.sites import build_snapshot, column_of
from .measuring import Measurement
from .options import Options


def run_probe(
    model: nn.Module,
    probe: str | Probe,
    tokenizer: Any = None,
    *,
    statistics: Sequence[str] = (),
    sites: str | Sequence[str] | None = None,
) -> Snapshot:
    """Find out what the heads of a model do with a probe.

    Args:
        model: model that is called in evaluation mode, without gradients; left as it was.
        probe: a text, or a ``Probe``.
        tokenizer: tokenizer for a probe without one of its own.
        statistics: names from ``STATISTICS``, taken beside the probe's scores.
        sites: shell patterns for the module paths to look at; None: all.

    Example:
        >>> from torch import nn
        >>> from attention_monitor import RepeatedTokensProbe
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.layer = nn.Embedding(50, 8), nn.TransformerEncoderLayer(8, 2)
        ...
        ...     def forward(self, tokens):
        ...         return self.layer(self.embed(tokens))
        >>> snapshot = run_probe(Model(), RepeatedTokensProbe(vocab_size=50))
        >>> snapshot.sites, snapshot.values[0]["induction"].shape
        (['layer.self_attn'], (2,))

    Raises:
        AttentionMonitorError: when the probe cannot be encoded, or the model does not take it.
        NoAttentionError: when the model runs it without an attention call.
    """
    options = Options(probe=probe, statistics=statistics, sites=sites)
    if len(options.probes) != 1:
        raise AttentionMonitorError(f"run_probe takes one probe, got {probe!r}; call it for each.")
    require_module(model, "run_probe runs")
    encoded = options.probes[0].encode(tokenizer)
    return measure_probe(model, encoded, options.resolved_statistics, with_patterns=True, sites=options.site_patterns)


def measure_probe(
    model: nn.Module,
    probe: EncodedProbe,
    statistics: Sequence[Statistic],
    *,
    step: int = 0,
    with_patterns: bool,
    sites: Sequence[str] | None,
    once: Once | None = None,
) -> Snapshot:
    """Run a probe through a model and make a Snapshot of what its heads do.

    Args:
        model: model to call.
        probe: probe to run.
        statistics: statistics to take beside the probe's scores.
        step: number of optimizer steps done before.
        with_patterns: whether maps are kept.
        sites: patterns for the module paths to look at; None: all.
        once: what has been warned of.

    Raises:
        AttentionMonitorError: when the model does not take the probe.
        NoAttentionError: when the model runs it without an attention call.
    """
    measurement = Measurement(
        model,
        statistics,
        with_patterns=with_patterns,
        sites=sites,
        once=once,
        layers_of=len(probe.labels or ()) if probe.with_layers else None,
        must_see=True,
    )
    probe.run(model, measurement, measurement.expect)
    declared = {score.name for score in probe.scores}
    if unknown := sorted({name for site in measurement.sites.values() for name in site.scores} - declared):
        raise AttentionMonitorError(
            f"The probe {probe.name!r} scores {unknown[0]!r}, which is not among its scores; add "
            f"HeadScore({unknown[0]!r}) to them."
        )
    columns = [*map(column_of, statistics), *probe.scores]
    tokens = None if measurement.pooled else probe.labels
    return build_snapshot(step, probe.name, measurement.sites, columns, tokens, measurement.modules)


class ProbeRunner:
    """Runs the probes of a recorder when they are due.

    Args:
        model: model to call.
        probes: probes to run.
        statistics: statistics to take of probes that ask for those of training.
        sites: patterns for the module paths to look at; None: all.
        once: what has been warned of.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[EncodedProbe],
        statistics: Sequence[Statistic],
        sites: Sequence[str] | None,
        once: Once,
    ) -> None:
        self.model, self.probes, self.statistics, self.sites, self._once = model, probes, statistics, sites, once
        self._accepted: set[str] = set()  # probes that the model has taken

    @property
    def draws(self) -> bool:
        """Whether maps of a probe are drawn, so that those of training need not be."""
        return any(probe.is_drawn for probe in self.probes)

    def check(self, precision: AbstractContextManager[Any] | None = None) -> None:
        """Try all probes, so that one that does not fit is refused before training.

        Args:
            precision: context to run them in.

        Raises:
            AttentionMonitorError: when the model does not take a probe.
            NoAttentionError: when the model runs one without an attention call.
        """
        with precision or nullcontext():  # once: a context may not be entered again
            for probe in self.probes:
                self._run(probe, 0)

    def run_due(
        self, step: int, sample: int, precision: AbstractContextManager[Any] | None = None, *, is_last: bool = False
    ) -> list[Snapshot]:
        """Run the probes that are due.

        Args:
            step: number of optimizer steps done so far.
            sample: number of sampled steps done so far; every ``probe.every``-th one has the probe.
            precision: context to run them in.
            is_last: whether no step follows, so that all are due.

        Raises:
            AttentionMonitorError: when the model does not take a probe that it has never taken.
        """
        due = [probe for probe in self.probes if is_last or sample % probe.every == 0]
        return self._try(due, step, precision)

    def run_final(
        self, step: int, kept: Mapping[str, Snapshot], precision: AbstractContextManager[Any] | None = None
    ) -> list[Snapshot]:
        """Run the probes once more after training, but for those of which the step before was kept.

        Args:
            step: number of optimizer steps done.
            kept: newest Snapshot of each probe that has one.
            precision: context to run them in.
        """
        due = [probe for probe in self.probes if probe.name not in kept or kept[probe.name].step != step - 1]
        return self._try(due, step, precision)

    def _try(
        self, probes: Sequence[EncodedProbe], step: int, precision: AbstractContextManager[Any] | None
    ) -> list[Snapshot]:
        """Run probes; one that fails although it has been taken before is no reason to stop training."""
        snapshots = []
        with precision or nullcontext():
            for probe in probes:
                try:
                    snapshots.append(self._run(probe, step))
                except AttentionMonitorError as error:
                    if probe.name not in self._accepted:
                        raise
                    self._once.warn("probe", str(error), f"AttentionMonitor at step {step}: {error}", stacklevel=4)
        return snapshots

    def _run(self, probe: EncodedProbe, step: int) -> Snapshot:
        snapshot = measure_probe(
            self.model,
            probe,
            self.statistics if probe.with_statistics else (),
            step=step,
            with_patterns=probe.is_drawn,
            sites=self.sites,
            once=self._once,
        )
        self._accepted.add(probe.name)
        return snapshot


def require_module(model: Any, what: str) -> None:
    """Raise AttentionMonitorError when a model is none; ``what`` begins the sentence."""
    if not isinstance(model, nn.Module):
        raise AttentionMonitorError(f"{what} a torch.nn.Module, got {model!r}.")
