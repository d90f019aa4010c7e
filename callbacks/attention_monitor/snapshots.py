"""What was seen at one step: the numbers and patterns of every head, and what they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadScore:
    """Something that a probe scores heads by, from 0 to 1.

    Attributes:
        name: of the score; with hyphens, of the role of a head that reaches the threshold.
        threshold: from which a head has that role.
        n: what it is a share or mean of: pairs, rows; None: that depends on the input.
        baseline: of a relation, the share of pairs that the best fixed offset gets right (Clark et al. 2019).
        offset: that offset, key position - query position.
        is_written: to loggers; otherwise it is there for the role alone.
    """

    name: str
    threshold: float
    n: int | None = None
    baseline: float | None = None
    offset: int | None = None
    is_written: bool = True

    @property
    def role(self) -> str:
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Snapshot:
    """What was seen at one step from one source.

    Attributes:
        step: optimizer steps done before it.
        source: ``live`` or the probe's name.
        labels: one for each site, in order of execution: ``L00`` or a module path.
        sites: module paths; those of a stack stand together.
        values: for each site, statistic -> (H,).
        patterns: for each site (H, Q, K) of one sequence, possibly pooled; empty if none was asked for.
        tokens: labels of the positions, where known and not pooled.
        stacks: for each site the stack of layers it belongs to, such as ``decoder.layers.*.self_attn``.
        is_cross: for each site whether it is cross-attention, for which some statistics are NaN.
        scores: of a probe, what else there is in ``values``.
        layers: of a ``LayerProbe``, name -> a number for each site's layer.
        rollout: of a ``LayerProbe``, label -> (T, T), attention rollout up to that layer.
    """

    step: int
    source: str
    labels: list[str]
    sites: list[str]
    values: list[dict[str, Tensor]]
    patterns: list[Tensor] = field(default_factory=list)
    tokens: list[str] | None = None
    stacks: list[str] = field(default_factory=list)
    is_cross: list[bool] = field(default_factory=list)
    scores: Sequence[HeadScore] = ()
    layers: dict[str, list[float]] = field(default_factory=dict)
    rollout: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, statistic: str, stack: str | None = None) -> float:
        """Mean over all heads, or those of a stack, that have a value; NaN if none has."""
        stacks: Sequence[str | None] = self.stacks or [None] * len(self.values)
        heads = [v[statistic] for v, of in zip(self.values, stacks, strict=True) if stack in (None, of)]
        return float(torch.cat(heads).nanmean()) if heads else math.nan
