"""What a sampled step does, for any training loop: probe, live statistics, diagnosis, writing."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn

from ..diagnosis.roles import HeadRoles
from ..diagnosis.runner import Diagnosis
from ..errors import AttentionMonitorError, AttentionWarning, NoAttentionError, is_whole
from ..probes.base import EncodedProbe, Probe
from ..snapshots import Snapshot
from ..statistics.catalogue import DEFAULT_STATISTICS, resolve_statistics
from ..statistics.registry import Statistic
from ..writers.sinks import sinks_for
from ..writers.writer import Writer
from .measuring import Recording
from .options import check_model, check_options, check_tags
from .probing import run_encoded


class AttentionRecorder:
    """Watches every attention head in a training loop of your own.

    Example:
        >>> with AttentionRecorder(model, every_n_steps=100, log_to="runs/mine") as recorder:
        ...     for step, (x, y) in enumerate(batches):
        ...         with recorder.step(step):
        ...             loss = criterion(model(x), y)
        ...         loss.backward()
        ...         ...

    At step 0 and every ``every_n_steps`` steps it takes per-head statistics of what the model does in the context, runs
    the probe before it, writes both and warns when a head is in trouble. In the other steps the context does nothing.
    The Lightning callback says itself when a step begins and ends: ``begin``, ``end_forward``, ``finish``, ``abort``.

    Args:
        model: the module to watch; probes are run by calling it.
        every_n_steps: steps from one sample to the next.
        probe: a text whose maps are drawn with its tokens, a ``Probe``, or several; without one that is drawn the maps
            are of the batch's first sequence.
        statistics: names from ``attention_monitor.STATISTICS``, which are written.
        max_sequences: of the batch that are looked at.
        max_tokens: positions that are looked at as queries, over those sequences; None: all. Fewer sequences are
            looked at then, and of a sequence that is longer than that, blocks of rows spread over it evenly.
        sites: patterns as of a shell for the module paths to look at, such as ``decoder.*``; None: all.
        log_to: a folder for TensorBoard's files, a ``SummaryWriter``, a Lightning logger, or a list of these; None:
            nothing is written.
        tokenizer: for a probe without one of its own.
        all_ranks: the statistics are of the batches of all ranks of ``torch.distributed``'s process group, each of
            which makes a recorder and goes through the same steps; rank zero writes. False: of this process alone.
        roles: that heads have had before; None: none.

    Attributes:
        snapshots: the newest Snapshot of each source: ``live`` and the probes' names.
        roles: head -> role -> step at which it took that on, of the roles that heads have now.

    Raises:
        AttentionMonitorError: on an option that makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        every_n_steps: int = 50,
        probe: str | Probe | Sequence[str | Probe] | None = None,
        statistics: Sequence[str] = DEFAULT_STATISTICS,
        max_sequences: int = 4,
        max_tokens: int | None = None,
        sites: str | Sequence[str] | None = None,
        *,
        log_to: Any = None,
        tokenizer: Any = None,
        all_ranks: bool = False,
        roles: HeadRoles | None = None,
    ) -> None:
        options = check_options(every_n_steps, probe, statistics, max_sequences, max_tokens, sites)
        check_model(model, "AttentionRecorder watches")
        if all_ranks and not (dist.is_available() and dist.is_initialized()):
            raise AttentionMonitorError(
                "all_ranks=True needs torch.distributed's process group: call init_process_group() before, or leave it "
                "out."
            )
        self.model, self.every_n_steps, self.all_ranks = model, every_n_steps, all_ranks
        self.is_rank_zero = not all_ranks or dist.get_rank() == 0
        self._extent = {name: options[name] for name in ("max_sequences", "max_tokens")}
        self.sites: list[str] | None = options["sites"]
        self.probes: list[EncodedProbe] = [probe.encode(tokenizer) for probe in options["probe"]]
        check_tags(self.probes, options["statistics"])
        self.writer = Writer(sinks_for(log_to) if self.is_rank_zero else [], options["statistics"])
        self.diagnosis = Diagnosis()
        wanted = dict.fromkeys([*options["statistics"], *self.diagnosis.statistics])
        self._live_statistics = resolve_statistics(list(wanted))
        self._written_statistics = resolve_statistics(options["statistics"])
        self._live: Recording | None = None
        self._probed: list[Snapshot] = []
        self._roles = HeadRoles() if roles is None else roles
        self._step = self._sampled_step = -1
        self._probed_at: dict[str, int] = {}
        self._fitting: set[str] = set()  # probes that the model has taken
        self._told: set[str] = set()  # what has been warned about: once for all steps
        self._closed = False
        self.snapshots: dict[str, Snapshot] = {}

    @contextmanager
    def step(self, step: int, precision: AbstractContextManager[Any] | None = None) -> Iterator[None]:
        """Watch one step if it is due: put the model's forward in this context.

        Args:
            step: optimizer steps done so far.
            precision: context in which the probe is run, such as ``torch.autocast(...)``.

        Raises:
            NoAttentionError: when the context ends, the whole model was run and no attention call was ever seen.
            AttentionMonitorError: when the model does not take the probe, in the first sampled step; after close().
        """
        if not is_whole(step, 0):
            raise AttentionMonitorError(f"step() takes the number of optimizer steps done so far, got {step!r}.")
        if self._closed:
            raise AttentionMonitorError("This AttentionRecorder has been closed; make another one.")
        if step % self.every_n_steps or step == self._sampled_step:  # of several batches in a step, the first
            self._step = step
            yield
            return
        self.begin(step, precision)
        try:
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
        return self._roles.since()

    def check_probes(self, precision: AbstractContextManager[Any] | None = None) -> None:
        """Try the probes, so that one that does not fit is refused before training.

        Raises:
            AttentionMonitorError: when the model does not take the probe.
            NoAttentionError: when the model runs it without an attention call.
        """
        with precision or nullcontext():  # once: a context may not be entered again
            for probe in self.probes:
                self._run_probe(probe, 0)

    def begin(self, step: int, precision: AbstractContextManager[Any] | None = None, *, is_last: bool = False) -> None:
        """Run the probes that are due (in the last step all; under ``precision``), then watch what the model does."""
        self.prepare(step, precision, is_last=is_last)
        assert self._live is not None
        self._live.__enter__()

    def prepare(
        self, step: int, precision: AbstractContextManager[Any] | None = None, *, is_last: bool = False
    ) -> None:
        """Run the probes that are due, and be ready to ``watch_forward``."""
        self.abort()  # a step that was begun and never finished
        self._step = self._sampled_step = step
        samples = step // self.every_n_steps
        due = [probe for probe in self.probes if is_last or samples % probe.every == 0]
        self._probed = self._try_probes(due, step, precision)
        drawn = any(probe.is_drawn for probe in self.probes)
        self._live = self._recording(self._live_statistics, with_patterns=not drawn, **self._extent)

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        """Watch what happens in the context."""
        assert self._live is not None
        with self._live:
            yield

    def end_forward(self) -> None:
        """Stop watching; goes on if there was no attention yet: this may be the backward of another part."""
        if self._live is not None and self._live.saw_attention:
            self._live.__exit__()

    def finish(self) -> Snapshot | None:
        """Diagnose and write what was seen; None: there was no attention in this step.

        Raises:
            NoAttentionError: when the whole model was run and no attention call was seen, in this step, by its probe,
                or before it.
        """
        live = self._live
        assert live is not None, "begin() comes first"
        self.abort()
        self._keep_probed(self._probed)  # not before: drawing would compete with the step
        snapshot = live.snapshot(self._step, all_ranks=self.all_ranks)
        if not snapshot.sites:
            if not self.snapshots:
                self._miss(live)
            return None
        self._keep(snapshot)
        for message in self.diagnosis.explain(self.diagnosis.update(snapshot)) if self.is_rank_zero else ():
            warnings.warn(f"AttentionMonitor: {message}", AttentionWarning, stacklevel=2)
        return snapshot

    @property
    def is_recording(self) -> bool:
        """A step has begun, and neither been finished nor aborted."""
        return self._live is not None

    def abort(self) -> None:
        """Stop watching and forget the step."""
        if self._live is not None:
            self._live.__exit__()
            self._live = None

    def sample_probes(self, step: int, precision: AbstractContextManager[Any] | None = None) -> None:
        """Run the probes alone, but for those that have been run at the step before."""
        due = [probe for probe in self.probes if self._probed_at.get(probe.name) != step - 1]
        self._keep_probed(self._try_probes(due, step, precision))

    def close(self, *, complete: bool = True) -> None:
        """Have everything written; a loop that is complete ends with the probes once more."""
        self.abort()
        try:
            if complete and not self._closed and self._sampled_step >= 0:
                self.sample_probes(self._step + 1)
        finally:
            self._closed = True
            self.writer.close()

    def _miss(self, live: Recording) -> None:
        """No attention so far: an error, unless parts of the model have not been run and may have it."""
        try:
            live.require_attention()
        except NoAttentionError as error:
            if live.ran_whole_model:
                raise
            self._warn_once(
                "nothing seen",
                f"AttentionMonitor at step {self._step}: {error} Parts of the model were not run in this step, so the "
                "next sampled steps will show whether they have any.",
            )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._told:
            self._told.add(subject)
            warnings.warn(message, stacklevel=4)

    def _recording(self, statistics: Sequence[Statistic], **options: Any) -> Recording:
        return Recording(self.model, statistics, sites=self.sites, told=self._told, **options)

    def _try_probes(
        self, probes: Sequence[EncodedProbe], step: int, precision: AbstractContextManager[Any] | None
    ) -> list[Snapshot]:
        """Without those that fail although they have fitted before: that is no reason to stop training."""
        snapshots = []
        with precision or nullcontext():
            for probe in probes:
                try:
                    snapshots.append(self._run_probe(probe, step))
                    self._probed_at[probe.name] = step
                except AttentionMonitorError as error:
                    if probe.name not in self._fitting:
                        raise
                    self._warn_once(f"probe: {error}", f"AttentionMonitor at step {step}: {error}")
        return snapshots

    def _run_probe(self, probe: EncodedProbe, step: int) -> Snapshot:
        statistics = self._written_statistics if probe.with_statistics else ()
        recording = self._recording(statistics, with_patterns=probe.is_drawn)
        snapshot = run_encoded(recording, probe, step)
        self._fitting.add(probe.name)
        return snapshot

    def _keep_probed(self, snapshots: Sequence[Snapshot]) -> None:
        for snapshot in snapshots:
            self._keep(snapshot)
        changes = [self._roles.update(snapshot) for snapshot in snapshots]
        if any(changes):
            self.writer.write_text("attention_roles", self._roles.table(), snapshots[0].step)

    def _keep(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.source] = snapshot
        self.writer.write(snapshot)
