"""What a sampled step does, for any training loop: probe, live statistics, diagnosis, writing."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .capturing.attention_call import AttentionCall
from .capturing.capture_mode import Capture, captures_paused
from .diagnosis.roles import HeadRoles
from .diagnosis.runner import Diagnosis
from .errors import AttentionMonitorError, NoAttentionError, is_whole
from .naming import final_site, in_order
from .probes.base import EncodedProbe, Probe, ProbeBatch, ScoreFunction
from .probes.layer_measures import LayerOutputs, with_layers
from .probes.text import TextProbe
from .snapshots import HeadScore, Snapshot
from .statistics.catalogue import DEFAULT_STATISTICS, resolve_statistics
from .statistics.maps import MAX_MAP_SIZE, picture
from .statistics.registry import Statistic
from .statistics.row_blocks import Workspace
from .statistics.totals import HeadTotals
from .writers.sinks import sinks_for
from .writers.writer import Writer


class AttentionWarning(UserWarning):
    """Something is wrong with a head."""


@dataclass
class Site:
    """What was seen of one attention call of the model.

    Attributes:
        totals: its statistics.
        is_cross: whether it is cross-attention.
        n_heads: H.
        pattern: (H, Q, K) of one sequence, possibly pooled, where it was asked for.
        scores: of a probe, name -> (n, H) for each of its batches.
    """

    totals: HeadTotals
    is_cross: bool
    n_heads: int = 0
    pattern: Tensor | None = None
    scores: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def values(self, scores: Sequence[HeadScore]) -> dict[str, Tensor]:
        """Statistics and means of scores, name -> (H,), float32 on the CPU; NaN where there are none."""
        values = self.totals.values()
        for score in scores:
            found = self.scores[score.name]
            mean = torch.cat(found).mean(0).float().cpu() if found else torch.full((self.n_heads,), torch.nan)
            values[score.name] = mean
        return values


class Recording:
    """Context that takes the statistics of every attention call under ``model``.

    Args:
        model: whose calls are looked at.
        statistics: to take.
        max_sequences: of each call; None: all.
        max_tokens: query positions of each call, over its sequences; None: all.
        with_patterns: keep the pattern of each site's first sequence too.
        sites: patterns for the module paths to look at; None: all.
        told: module paths that have been warned about.

    Attributes:
        score: of a self-attention call, name -> (n, H); None: nothing is scored.
    """

    score: ScoreFunction | None = None

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Statistic],
        *,
        max_sequences: int | None = None,
        max_tokens: int | None = None,
        with_patterns: bool = False,
        sites: Sequence[str] | None = None,
        told: set[str] | None = None,
    ) -> None:
        self.model, self.statistics, self.with_patterns = model, statistics, with_patterns
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        self._told: set[str] = set() if told is None else told
        self._capture = Capture(model, self._on_call, sites, self._told)
        self._workspace = Workspace()
        self._seen: dict[str, Site] = {}
        self._pooled = False

    def __enter__(self) -> "Recording":
        self._capture.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._capture.__exit__(*exception)

    def _on_call(self, call: AttentionCall) -> None:
        B, _, Q, _ = call.shape
        if 0 in call.shape:
            return
        n = B if self.max_sequences is None else min(B, self.max_sequences)
        if self.max_tokens is not None:
            n = min(n, max(1, self.max_tokens // max(1, Q)))
        call = call.first(n)
        site = self._seen.get(call.site) or Site(
            HeadTotals(self.statistics, self.max_tokens, self._workspace, self._on_failure),
            not call.is_self_attention,
            call.shape[1],
        )
        if self.with_patterns and site.pattern is None:
            site.pattern = picture(call.first(1))[0].cpu()
            self._pooled |= max(call.shape[2:]) > MAX_MAP_SIZE
        for name, values in self.score(call).items() if self.score and call.has_positions else ():
            site.scores[name].append(values)
        # a statistic of the user's own may draw numbers, and training must not notice
        with torch.random.fork_rng([call.device] if call.device.type == "cuda" else []):
            site.totals.add(call)
        self._seen[call.site] = site  # a call that cannot be read leaves nothing

    def _on_failure(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"AttentionMonitor: the statistic {name!r} failed and is left out: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. It returns (B, H, rows), one number a row.",
                stacklevel=2,
            )

    @property
    def saw_attention(self) -> bool:
        return bool(self._capture.sites)

    @property
    def ran_whole_model(self) -> bool:
        return self._capture.ran_whole

    def require_attention(self) -> None:
        """Raise NoAttentionError if no attention call was seen."""
        if not self.saw_attention:
            raise NoAttentionError(self._capture.explain_nothing())

    def result(self) -> dict[str, Site]:
        """What has been seen at each module path, in order of execution."""
        return {final_site(name, self._capture.sites): site for name, site in self._seen.items()}

    def result_of_all_ranks(self) -> dict[str, Site]:
        """The same with the totals of all ranks, each of which has to call this; patterns are this rank's own."""
        everyone: list[Any] = [None] * dist.get_world_size()
        mine = {name: (site.is_cross, site.n_heads, site.totals.on_cpu()) for name, site in self._seen.items()}
        dist.all_gather_object(everyone, (self._capture.sites, mine))
        n_calls: Counter[str] = Counter()
        for theirs, _ in everyone:
            n_calls |= Counter(theirs)  # the larger of each
        merged: dict[str, Site] = {}
        for _, sites in everyone:
            for name, (is_cross, n_heads, totals) in sites.items():
                empty = Site(HeadTotals(self.statistics), is_cross, n_heads)
                site = merged.setdefault(final_site(name, n_calls), empty)
                if totals is not None:
                    site.totals.merge(totals)
        for name, site in self._seen.items():
            merged[final_site(name, n_calls)].pattern = site.pattern
        return merged

    def snapshot(self, step: int, probe: EncodedProbe | None = None, all_ranks: bool = False) -> Snapshot:
        """What has been seen, of the probe or else live; sites in order of execution, but those of a stack together."""
        seen = self.result_of_all_ranks() if all_ranks else self.result()
        order, stacks, labels = in_order(list(seen), [site.is_cross for site in seen.values()])
        sites = [list(seen)[i] for i in order]
        scores = probe.scores if probe else ()
        patterns = [pattern for site in sites if (pattern := seen[site].pattern) is not None]
        return Snapshot(
            step=step,
            source=probe.name if probe else "live",
            labels=labels,
            sites=sites,
            values=[seen[site].values(scores) for site in sites],
            patterns=patterns if len(patterns) == len(sites) else [],  # other ranks may have seen more
            tokens=probe.labels if probe and not self._pooled else None,
            stacks=stacks,
            is_cross=[seen[site].is_cross for site in sites],
            scores=scores,
        )


def check_options(
    every_n_steps: int,
    probe: str | Probe | Sequence[str | Probe] | None,
    statistics: Sequence[str],
    max_sequences: int,
    max_tokens: int | None,
    sites: str | Sequence[str] | None,
) -> dict[str, Any]:
    """The options that recorder and callbacks share, as keyword arguments for ``AttentionRecorder``.

    Raises:
        AttentionMonitorError: on one that makes no sense.
    """
    whole = {"every_n_steps": every_n_steps, "max_sequences": max_sequences}
    for name, value in (whole if max_tokens is None else whole | {"max_tokens": max_tokens}).items():
        if not is_whole(value, 1):
            raise AttentionMonitorError(f"{name} must be at least 1, got {value!r}; give a whole number.")
    probes = [] if probe is None else list(probe) if isinstance(probe, list | tuple) else [probe]
    checked: list[Probe] = []
    n_texts = 0
    for one in probes:
        if isinstance(one, str):
            n_texts += 1
            one = TextProbe(one, name="text" if n_texts == 1 else f"text_{n_texts}")
        if not isinstance(one, Probe):
            raise AttentionMonitorError(f"A probe must be a text or a Probe such as TextProbe, got {one!r}.")
        checked.append(one)
        if not is_whole(one.every, 1):
            raise AttentionMonitorError(f"every= of the probe {one.name!r} must be 1 or more, got {one.every!r}.")
        if not isinstance(one.name, str) or not re.fullmatch(r"\w+", one.name) or one.name == "live":
            raise AttentionMonitorError(
                f"A probe's name is of letters, digits and underscores, and not 'live', got {one.name!r}."
            )
    names = [one.name for one in checked]
    if len(set(names)) < len(names):
        raise AttentionMonitorError(f"Each probe needs a name of its own, got {names}; give name=.")
    patterns = [sites] if isinstance(sites, str) else sites
    if patterns is not None and not (
        isinstance(patterns, list | tuple) and patterns and all(isinstance(p, str) and p for p in patterns)
    ):
        raise AttentionMonitorError(
            f"sites must be patterns for module paths, such as ['decoder.*'], got {sites!r}; leave it out for all."
        )
    return {
        "every_n_steps": every_n_steps,
        "probe": checked,
        "statistics": [stat.name for stat in resolve_statistics(statistics)],
        "max_sequences": max_sequences,
        "max_tokens": max_tokens,
        "sites": None if patterns is None else list(patterns),
    }


def _check_model(model: Any, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise AttentionMonitorError(f"{what} a torch.nn.Module, got {model!r}.")


def _check_tags(probes: Sequence[EncodedProbe], statistics: Sequence[str]) -> None:
    """Raise AttentionMonitorError when two things would be written under one name."""
    names = list(statistics)
    for probe in probes:
        scores = [score.name for score in probe.scores]
        both = [*scores, *(statistics if probe.with_statistics else ())]
        names += [f"{probe.name}_{name}" for name in both]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AttentionMonitorError(
            f"More than one statistic or probe would be written as attention_{twice[0]}; give the probe another name."
        )


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
    _check_model(model, "run_probe runs")
    encoded = options["probe"][0].encode(tokenizer)
    recording = Recording(model, resolve_statistics(statistics), sites=options["sites"], with_patterns=True)
    return _run(recording, encoded, step=0)


def _run(recording: Recording, probe: EncodedProbe, step: int) -> Snapshot:
    def watch(batch: ProbeBatch) -> None:
        recording.score = batch.score

    outputs = LayerOutputs(recording.model, len(probe.labels or ())) if probe.with_layers else None
    with captures_paused(), outputs or nullcontext(), recording:
        probe.run(recording.model, watch)
    recording.require_attention()
    snapshot = recording.snapshot(step, probe)
    return with_layers(snapshot, outputs) if outputs else snapshot


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
        _check_model(model, "AttentionRecorder watches")
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
        _check_tags(self.probes, options["statistics"])
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
        snapshot = _run(recording, probe, step)
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
