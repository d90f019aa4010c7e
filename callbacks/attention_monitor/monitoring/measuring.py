"""Statistics and scores of every attention call, taken while a model runs.

Shapes: B sequences, H heads, Q queries, K keys.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..capturing.attention_call import AttentionCall
from ..capturing.capture_mode import Capture
from ..errors import AttentionMonitorError, NoAttentionError, Once
from ..naming import final_site
from ..probes.base import ProbeBatch, ScoreFunction
from ..probes.layer_measures import LayerOutputs
from ..statistics.maps import MAX_MAP_SIZE, pooled_pattern
from ..statistics.registry import Statistic
from ..statistics.row_blocks import BufferPool
from ..statistics.sites import SiteMeasurement
from ..statistics.totals import HeadTotals


class Measurement:
    """Context that measures every attention call under ``model``.

    Args:
        model: model whose calls are measured.
        statistics: statistics to take.
        max_sequences: sequences of each call that are looked at; None: all.
        max_tokens: query positions of each call that are looked at, over its sequences; None: all.
        with_patterns: whether the pattern of each site's first sequence is kept.
        sites: patterns for the module paths to look at; None: all.
        once: what has been warned of.
        layers_of: tokens of the sequence with which layers are measured as a whole too; None: they are not.
        must_see: whether it is an error to see no attention.
        compare_weights: whether ranks compare a sample of the weights that make their queries and keys.

    Attributes:
        pooled: whether a pattern is larger than what is kept of it.

    Raises:
        NoAttentionError: when the context ends, ``must_see`` and no attention call was seen.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Statistic],
        *,
        max_sequences: int | None = None,
        max_tokens: int | None = None,
        with_patterns: bool = False,
        sites: Sequence[str] | None = None,
        once: Once | None = None,
        layers_of: int | None = None,
        must_see: bool = False,
        compare_weights: bool = False,
    ) -> None:
        self.model, self.statistics, self.with_patterns, self.must_see = model, statistics, with_patterns, must_see
        self.max_sequences, self.max_tokens, self.pooled = max_sequences, max_tokens, False
        self._layers = None if layers_of is None else LayerOutputs(model, layers_of)
        self._once = Once() if once is None else once
        self._capture = Capture(model, self._on_call, sites, self._once, compare_weights)
        self._exit = ExitStack()
        self._buffers = BufferPool()
        self._score: ScoreFunction | None = None
        self._seen: dict[str, SiteMeasurement] = {}
        self._seen_without_gradients: dict[str, SiteMeasurement] = {}

    def __enter__(self) -> "Measurement":
        with ExitStack() as stack:
            if self._layers is not None:
                stack.enter_context(self._layers)
            stack.enter_context(self._capture)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()
        if exception[:1] == (None,):
            if self.must_see:
                self.require_attention()
            if self._layers is not None:
                self._layers.measure(self.sites)

    def stop(self) -> None:
        """Measure no more; may be called again, as when a forward ends before its step."""
        self._exit.close()

    def expect(self, batch: ProbeBatch) -> None:
        """Score the calls to come as those of a probe's batch."""
        self._score = batch.score

    def _on_call(self, call: AttentionCall) -> None:
        if 0 in call.shape:
            return
        seen = self._seen if call.with_gradients else self._seen_without_gradients
        if not call.with_gradients and _path(call.site) in map(_path, self._seen):
            return  # sampling beside the training forward
        call = _part_of(call, self.max_sequences, self.max_tokens)
        site = seen.get(call.site) or SiteMeasurement(
            HeadTotals(self.statistics, self.max_tokens, self._buffers, self._on_failure),
            not call.is_self_attention,
            call.shape[1],
        )
        if self.with_patterns and site.pattern is None:
            site.pattern = pooled_pattern(call.first_sequences(1))[0].cpu()
            self.pooled |= max(call.shape[2:]) > MAX_MAP_SIZE
        # a statistic of the user's own may draw numbers, and training must not notice
        with torch.random.fork_rng([call.device] if call.device.type == "cuda" else []):
            site.add(call, self._score)
        seen[call.site] = site  # a call that cannot be read leaves nothing

    def _on_failure(self, name: str, error: Exception) -> None:
        self._once.warn(
            "statistic",
            name,
            f"AttentionMonitor: the statistic {name!r} failed and is left out: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. It returns (B, H, rows), one number a row.",
            stacklevel=2,
        )

    @property
    def saw_attention(self) -> bool:
        """Whether an attention call has been seen."""
        return bool(self._capture.sites)

    @property
    def ran_whole_model(self) -> bool:
        """Whether every part of the model that has parameters has been run."""
        return self._capture.ran_whole

    def require_attention(self) -> None:
        """Do nothing if an attention call has been seen.

        Raises:
            NoAttentionError: when none has been seen.
        """
        if not self.saw_attention:
            raise NoAttentionError(self._capture.explain_nothing())

    @property
    def modules(self) -> Collection[str]:
        """Paths of all modules of the model."""
        return self._capture.modules

    @property
    def sites(self) -> dict[str, SiteMeasurement]:
        """What has been measured at each module path, in order of execution."""
        return {final_site(name, self._capture.sites): site for name, site in self._counting.items()}

    @property
    def _counting(self) -> dict[str, SiteMeasurement]:
        """What has been measured at each call, in order of execution.

        A rollout or a generated text without gradients does not count where the module was trained in the same step.
        """
        trained = set(map(_path, self._seen))
        others = {name: site for name, site in self._seen_without_gradients.items() if _path(name) not in trained}
        order = list(self._capture.sites)
        return dict(sorted((self._seen | others).items(), key=lambda entry: order.index(_path(entry[0]))))

    def sites_of_all_ranks(self) -> dict[str, SiteMeasurement]:
        """Put the totals of all ranks together, each of which has to call this; patterns are this rank's own.

        Raises:
            AttentionMonitorError: when weights were to be compared, and those of a site are not the same on all ranks.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        mine = {name: (site.is_cross, site.n_heads, site.totals.on_cpu()) for name, site in self._counting.items()}
        dist.all_gather_object(everyone, (self._capture.sites, mine, self._capture.weights))
        _require_same_weights([of_rank for _, _, of_rank in everyone])
        n_calls: Counter[str] = Counter()
        for theirs, _, _ in everyone:
            n_calls |= Counter(theirs)  # the larger of each
        merged: dict[str, SiteMeasurement] = {}
        for _, sites, _ in everyone:
            for name, (is_cross, n_heads, totals) in sites.items():
                empty = SiteMeasurement(HeadTotals(self.statistics), is_cross, n_heads)
                site = merged.setdefault(final_site(name, n_calls), empty)
                if totals is not None:
                    site.totals.merge(totals)
        for name, site in self._counting.items():
            merged[final_site(name, n_calls)].pattern = site.pattern
        return merged


def _path(site: str) -> str:
    """Return the path of a site without the number of the call."""
    return site.rpartition("[")[0]


def _part_of(call: AttentionCall, max_samples: int | None, max_tokens: int | None) -> AttentionCall:
    """Return a call on the sequences that are looked at: all windows of the first samples.

    Where these have more queries than ``max_tokens``, windows are spread over them evenly.
    """
    n = call.n_samples if max_samples is None else min(call.n_samples, max_samples)
    n_sequences = n * call.windows
    few = n_sequences if max_tokens is None else min(n_sequences, max(1, max_tokens // max(1, call.shape[2])))
    if few == n_sequences:
        return call.first_samples(n)
    if call.windows == 1 or call.mask_mod is not None or call.score_mod is not None:
        return call.first_sequences(few)
    return call.sequences(torch.arange(few, device=call.device) * n_sequences // few)


def _require_same_weights(of_ranks: Sequence[Mapping[str, bytes]]) -> None:
    for path in dict.fromkeys(path for weights in of_ranks for path in weights):
        if len({weights[path] for weights in of_ranks if path in weights}) > 1:
            raise AttentionMonitorError(
                f"The weights that make the queries of {path} are not the same on all processes, so that its heads are "
                "not the same heads (split by tensor parallelism, or layers of a pipeline), and their numbers would be "
                "mixed; watch a run with data parallelism alone, or leave the monitor out."
            )
