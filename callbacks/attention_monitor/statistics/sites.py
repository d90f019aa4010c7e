"""What is measured of each site of a model, and the Snapshot that sites make: here tensors become arrays.

Shapes: H heads, Q queries, K keys, T tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from ..errors import AttentionMonitorError
from ..naming import in_order
from ..snapshots import Column, HeadScore, SiteRecord, Snapshot
from .registry import Statistic
from .totals import HeadTotals


class SiteMeasurement:
    """What has been measured of one attention call of the model.

    Args:
        totals: totals that statistics are taken from.
        is_cross: whether it is cross-attention.
        n_heads: H.

    Attributes:
        pattern: (H, Q, K) of one sequence, possibly pooled; None where it was not asked for.
        scores: score of a probe -> (n, H) for each of its batches.
        layer_values: numbers of the layer as a whole.
        rollout: (T, T), attention rollout up to this layer; None where it was not asked for.
        note: what has to be known to read its numbers.
    """

    def __init__(self, totals: HeadTotals, is_cross: bool, n_heads: int) -> None:
        self.totals, self.is_cross, self.n_heads = totals, is_cross, n_heads
        self.pattern: Tensor | None = None
        self.scores: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.layer_values: dict[str, float] = {}
        self.rollout: Tensor | None = None
        self.note = ""

    def add(self, call: AttentionCall, score: Callable[[AttentionCall], dict[str, Tensor]] | None = None) -> None:
        """Measure a call, and score it.

        Raises:
            AttentionMonitorError: when a score is not (n, H).
        """
        self.note = call.note
        for name, values in score(call).items() if score is not None and call.has_positions else ():
            if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[1] != self.n_heads:
                got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
                raise AttentionMonitorError(
                    f"The score {name!r} must be (n, {self.n_heads}), numbers of heads, got {got}."
                )
            self.scores[name].append(values)
        self.totals.add(call)

    def values(self, scores: Sequence[HeadScore]) -> dict[str, Tensor]:
        """Return statistics and means of scores, column -> (H,), float32 on the CPU; NaN where there is none."""
        values = self.totals.values()
        unknown = torch.full((self.n_heads,), torch.nan, dtype=torch.float32)
        for score in scores:
            found = self.scores[score.name]
            values[score.name] = torch.cat(found).mean(0).float().cpu() if found else unknown
        return values


def column_of(statistic: Statistic, is_written: bool = True) -> Column:
    """Say what the column of a statistic is."""
    return Column(
        statistic.name,
        statistic.unit,
        statistic.range,
        self_attention_only=statistic.self_attention_only,
        is_written=is_written,
    )


def build_snapshot(
    step: int,
    source: str,
    sites: Mapping[str, SiteMeasurement],
    columns: Sequence[Column],
    tokens: Sequence[str] | None = None,
    modules: Collection[str] = (),
) -> Snapshot:
    """Make a Snapshot: put the sites of a stack together, name them, turn tensors into arrays.

    Args:
        step: number of optimizer steps done before it.
        source: ``live``, or the name of a probe.
        sites: module path -> what was measured there, in order of execution.
        columns: what there is of each site.
        tokens: labels of the positions, where they are known.
        modules: paths of all modules of the model, by which layers are counted.
    """
    order, stacks, labels = in_order(list(sites), [site.is_cross for site in sites.values()], modules)
    paths = [list(sites)[i] for i in order]
    scores = [column for column in columns if isinstance(column, HeadScore)]
    records = [
        SiteRecord(
            label=label,
            path=path,
            stack=stack,
            is_cross=sites[path].is_cross,
            values={name: numbers.numpy() for name, numbers in sites[path].values(scores).items()},
            pattern=_array(sites[path].pattern),
            layer_values=sites[path].layer_values,
            rollout=_array(sites[path].rollout),
            note=sites[path].note,
        )
        for label, path, stack in zip(labels, paths, stacks, strict=True)
    ]
    return Snapshot(step, source, records, {column.name: column for column in columns}, tokens)


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.numpy()
