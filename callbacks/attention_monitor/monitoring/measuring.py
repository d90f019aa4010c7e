"""Statistics and scores of every attention call while a model runs."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..capturing.attention_call import AttentionCall
from ..capturing.capture_mode import Capture
from ..errors import NoAttentionError
from ..naming import final_site, in_order
from ..probes.base import EncodedProbe, ScoreFunction
from ..snapshots import HeadScore, Snapshot
from ..statistics.maps import MAX_MAP_SIZE, picture
from ..statistics.registry import Statistic
from ..statistics.row_blocks import Workspace
from ..statistics.totals import HeadTotals


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
