"""What a sampled step does, for any training loop: probes, live statistics, diagnosis, writing."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from ..diagnosis.roles import HeadRoles
from ..diagnosis.runner import Diagnosis
from ..errors import AttentionMonitorError, AttentionWarning, NoAttentionError, Once, is_whole
from ..naming import listed
from ..snapshots import Snapshot
from ..statistics.catalogue import STATISTICS, resolve_statistics
from ..statistics.sites import build_snapshot, column_of
from ..writers import tags
from ..writers.sinks import sinks_for
from ..writers.writer import Writer
from .measuring import Measurement
from .options import HasOptions, RecorderOptions, takes_after_one
from .probing import ProbeRunner, require_module


class AttentionRecorder(HasOptions):
    """Watches every attention head in a training loop of your own.

    At step 0 and every ``every_n_steps`` steps it takes per-head statistics of what the model does in the context, runs
    the probes before it, writes both and warns when a head is in trouble. In the other steps the context does nothing.

    A loop that cannot put its forward into one context says itself when a step begins and ends, as the callbacks do:
    ``begin`` and ``end_forward``, or ``prepare`` and the context ``watch_forward``; then ``finish`` or ``abort``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.TransformerEncoderLayer(8, 2)
        >>> with AttentionRecorder(model, every_n_steps=100) as recorder:
        ...     for step in range(3):
        ...         with recorder.step(step):
        ...             loss = model(torch.randn(5, 1, 8)).square().mean()
        ...         loss.backward()
        >>> recorder.snapshots["live"].step, recorder.snapshots["live"].values[0]["entropy"].shape
        (0, (2,))

    Attributes:
        snapshots: newest Snapshot of each source, ``live`` and the probes' names.

    Raises:
        AttentionMonitorError: on an option that makes no sense.
    """

    _options: RecorderOptions

    @takes_after_one(RecorderOptions)
    def __init__(self, model: nn.Module, options: RecorderOptions) -> None:
        require_module(model, "AttentionRecorder watches")
        if options.all_ranks and not (dist.is_available() and dist.is_initialized()):
            raise AttentionMonitorError(
                "all_ranks=True needs torch.distributed's process group: call init_process_group() before, or leave it "
                "out."
            )
        self.model, self._options = model, options
        self.is_rank_zero = not options.all_ranks or dist.get_rank() == 0
        self.snapshots: dict[str, Snapshot] = {}
        self.diagnosis = Diagnosis()
        for detector in self.diagnosis.detectors:
            if unknown := [name for name in detector.statistics if name not in STATISTICS]:
                raise AttentionMonitorError(
                    f"The detector {type(detector).__name__} reads a statistic {unknown[0]!r}, which there is not; "
                    f"known are {', '.join(sorted(STATISTICS))}."
                )
        self._once = Once()
        written = options.resolved_statistics
        self._written = [statistic.name for statistic in written]
        self._statistics = resolve_statistics(list(dict.fromkeys([*self._written, *self.diagnosis.statistics])))
        probes = [probe.encode(options.tokenizer) for probe in options.probes]
        tags.require_distinct(
            {"live": self._written}
            | {
                probe.name: [score.name for score in probe.scores] + (self._written if probe.with_statistics else [])
                for probe in probes
            }
        )
        self._probes = ProbeRunner(model, probes, written, options.site_patterns, self._once)
        self.writer = Writer(sinks_for(_opened(options.log_to)) if self.is_rank_zero else [])
        self._roles = HeadRoles() if options.roles is None else options.roles
        self._live: Measurement | None = None
        self._live_sites: set[str] = set()
        self._probed: list[Snapshot] = []
        self._step = self._sampled_step = -1
        self._closed = False

    @contextmanager
    def step(self, step: int, precision: AbstractContextManager[Any] | None = None) -> Iterator[None]:
        """Watch one step if it is due: put the model's forward in this context.

        Args:
            step: number of optimizer steps done so far.
            precision: context in which the probes are run, such as ``torch.autocast(...)``.

        Raises:
            NoAttentionError: when the context ends, the whole model was run and no attention call was ever seen.
            AttentionMonitorError: when the model does not take a probe, in the first sampled step; after close().
        """
        if not is_whole(step, 0):
            raise AttentionMonitorError(f"step() takes the number of optimizer steps done so far, got {step!r}.")
        if self._closed:
            raise AttentionMonitorError("This AttentionRecorder has been closed; make another one.")
        if not self._options.is_due(step) or step == self._sampled_step:  # of several batches in a step, the first
            self._step = step
            yield
            return
        self.prepare(step, precision)
        try:
            with self.watch_forward():
                yield
        except BaseException:
            self.abort()
            raise
        self.finish()

    def __enter__(self) -> "AttentionRecorder":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close(complete=exception[0] is None)

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """Roles that heads have now: head -> role -> step at which that was first seen."""
        return self._roles.since()

    def check_probes(self, precision: AbstractContextManager[Any] | None = None) -> None:
        """Try the probes, so that one that does not fit is refused before training.

        Raises:
            AttentionMonitorError: when the model does not take a probe.
            NoAttentionError: when the model runs one without an attention call.
        """
        self._probes.check(precision)

    def begin(self, step: int, precision: AbstractContextManager[Any] | None = None, *, is_last: bool = False) -> None:
        """Begin a sampled step: run the probes that are due, then watch what the model does from here on.

        Args:
            step: number of optimizer steps done so far.
            precision: context in which the probes are run.
            is_last: whether no step follows, so that all probes are due.
        """
        self.prepare(step, precision, is_last=is_last)
        assert self._live is not None
        self._live.__enter__()

    def prepare(
        self, step: int, precision: AbstractContextManager[Any] | None = None, *, is_last: bool = False
    ) -> None:
        """Run the probes that are due, and be ready to ``watch_forward``.

        Args:
            step: number of optimizer steps done so far.
            precision: context in which the probes are run.
            is_last: whether no step follows, so that all probes are due.
        """
        self.abort()  # a step that was begun and never finished
        self._step = self._sampled_step = step
        self._probed = self._probes.run_due(step, step // self.every_n_steps, precision, is_last=is_last)
        self._live = Measurement(
            self.model,
            self._statistics,
            max_sequences=self._options.max_sequences,
            max_tokens=self._options.max_tokens,
            with_patterns=not self._probes.draws,
            sites=self._options.site_patterns,
            once=self._once,
            compare_weights=self._options.all_ranks and self._once.is_new("weights", "compared"),
        )

    def end_forward(self) -> None:
        """Stop watching; goes on if there was no attention yet: this may be the backward of another part."""
        if self._live is not None and self._live.saw_attention:
            self._live.stop()

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        """Watch what happens in the context."""
        assert self._live is not None, "prepare() comes first"
        with self._live:
            yield

    def finish(self) -> Snapshot | None:
        """Diagnose and write what was seen in the step.

        Returns:
            The live Snapshot; None where there was no attention in this step.

        Raises:
            NoAttentionError: when the whole model was run and no attention call was seen, in this step, by its probes,
                or before it.
        """
        live = self._live
        assert live is not None, "begin() comes first"
        self.abort()
        self._keep_probed(self._probed)  # not before: drawing would compete with the step
        sites = live.sites_of_all_ranks() if self._options.all_ranks else live.sites
        if not sites:
            if not self.snapshots:
                self._require_attention(live)
            return None
        columns = [column_of(statistic, statistic.name in self._written) for statistic in self._statistics]
        snapshot = build_snapshot(self._step, "live", sites, columns, modules=live.modules)
        self._keep(snapshot)
        self._say_what_is_odd(snapshot)
        for message in self.diagnosis.explain(self.diagnosis.update(snapshot)) if self.is_rank_zero else ():
            warnings.warn(f"AttentionMonitor: {message}", AttentionWarning, stacklevel=2)
        return snapshot

    @property
    def is_recording(self) -> bool:
        """Whether a step has begun, and neither been finished nor aborted."""
        return self._live is not None

    def abort(self) -> None:
        """Stop watching and forget the step."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def sample_probes(self, step: int, precision: AbstractContextManager[Any] | None = None) -> None:
        """Run the probes alone, but for those that have been run at the step before."""
        self._keep_probed(self._probes.run_final(step, self.snapshots, precision))

    def close(self, *, complete: bool = True) -> None:
        """Have everything written.

        Args:
            complete: whether the loop has ended as it should; it then ends with the probes once more.
        """
        self.abort()
        try:
            if complete and not self._closed and self._sampled_step >= 0:
                self.sample_probes(self._step + 1)
        finally:
            self._closed = True
            self.writer.close()

    def _say_what_is_odd(self, snapshot: Snapshot) -> None:
        """Warn of sites that were seen before and are not any more, and say what has to be known of others."""
        notes: dict[str, list[str]] = {}
        for record in snapshot.records:
            if record.note:
                notes.setdefault(record.note, []).append(record.path)
        for note, paths in notes.items():
            new = [path for path in paths if self._once.is_new(note, path)]
            if new and self.is_rank_zero:
                warnings.warn(
                    f"AttentionMonitor: of {listed(new, 3)}: {note}; what makes no sense of that is left out.",
                    AttentionWarning,
                    stacklevel=3,
                )
        gone = sorted(self._live_sites - set(snapshot.sites))
        self._live_sites |= set(snapshot.sites)
        for path in gone if self.is_rank_zero else ():
            self._once.warn(
                "gone",
                path,
                f"AttentionMonitor: the attention of {path} was seen before and not at step {snapshot.step}: it was "
                "not run in that step, or cannot be read any more; its curves have a gap there.",
                stacklevel=3,
            )

    def _require_attention(self, live: Measurement) -> None:
        """Raise NoAttentionError where all of the model has been run; elsewhere other parts may have attention."""
        try:
            live.require_attention()
        except NoAttentionError as error:
            if live.ran_whole_model:
                raise
            self._once.warn(
                "model",
                "no attention",
                f"AttentionMonitor at step {self._step}: {error} Parts of the model were not run in this step, so the "
                "next sampled steps will show whether they have any.",
                stacklevel=3,
            )

    def _keep_probed(self, snapshots: Sequence[Snapshot]) -> None:
        for snapshot in snapshots:
            self._keep(snapshot)
        changes = [self._roles.update(snapshot) for snapshot in snapshots]
        if any(changes):
            self.writer.write_text(tags.ROLES, self._roles.table(), snapshots[0].step)

    def _keep(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.source] = snapshot
        self.writer.write(snapshot)


def _opened(log_to: Any) -> Any:
    """Open TensorBoard files in what is a folder; writers take what is open."""
    if isinstance(log_to, list | tuple):
        return [_opened(one) for one in log_to]
    if isinstance(log_to, str | os.PathLike) and str(log_to):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_to)
    return log_to
