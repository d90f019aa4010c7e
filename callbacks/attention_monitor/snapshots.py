"""What was seen at one step, in numpy: a record for each site, and what each column of its numbers is.

Everything before a Snapshot is torch; everything after it reads a Snapshot and needs neither torch nor a registry.
Shapes: H heads, Q queries, K keys, T tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .traits import Trait


@dataclass(frozen=True)
class Column:
    """What one column of numbers is.

    Attributes:
        name: name of the column in the values of a record.
        unit: unit of the numbers.
        range: bounds of the numbers, ``low..high``.
        kind: ``statistic`` of patterns, or ``score`` of a probe.
        self_attention_only: whether cross-attention has no numbers.
        is_written: whether loggers get the column; otherwise it is there for detectors or roles alone.
    """

    name: str
    unit: str = "1"
    range: str = "0..1"
    kind: Literal["statistic", "score"] = "statistic"
    self_attention_only: bool = False
    is_written: bool = True


@dataclass(frozen=True, kw_only=True)
class HeadScore(Column):
    """A column by which a probe scores heads.

    Attributes:
        threshold: number from which a head has the role ``role``; infinite where there is no such role.
        n: number of pairs or rows that the score is a share or mean of; None where that depends on the input.
        baseline: of a relation, share of pairs that the best fixed offset gets right (Clark et al. 2019).
        offset: that offset, key position - query position.

    Example:
        >>> HeadScore("previous_token", threshold=0.5).role
        'previous-token'
    """

    kind: Literal["statistic", "score"] = "score"
    self_attention_only: bool = True
    threshold: float = math.inf
    n: int | None = None
    baseline: float | None = None
    offset: int | None = None

    @property
    def role(self) -> str:
        """Word for a head that reaches the threshold."""
        return self.name.replace("_", "-")


@dataclass(frozen=True, eq=False)
class SiteRecord:
    """What was seen of one attention call of the model.

    Attributes:
        label: short name of the layer, ``L00`` or a module path.
        path: path of the module, with ``[i]`` where it makes several calls in one forward.
        stack: stack of layers that the site belongs to, such as ``decoder.layers.*.self_attn``.
        is_cross: whether it is cross-attention, for which some columns are NaN.
        values: column -> (H,) float32.
        pattern: (H, Q, K) of one sequence, possibly pooled; None where it was not asked for.
        layer_values: numbers of the layer as a whole, from a ``LayerProbe``.
        rollout: (T, T), attention rollout up to this layer, from a ``LayerProbe``; None elsewhere.
        note: what has to be known to read its numbers, in a sentence's words; empty where nothing has.
    """

    label: str
    path: str
    stack: str = ""
    is_cross: bool = False
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    pattern: np.ndarray | None = None
    layer_values: Mapping[str, float] = field(default_factory=dict)
    rollout: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was seen at one step from one source.

    Attributes:
        step: number of optimizer steps done before it.
        source: ``live``, or the name of a probe.
        records: one record for each site; those of a stack stand together, otherwise in order of execution.
        columns: name -> what the column is, for every name in the records' values.
        tokens: labels of the positions, where they are known and maps are not pooled.

    Example:
        >>> record = SiteRecord("L00", "h.0.attn", values={"entropy": np.array([0.5, 1.5])})
        >>> seen = Snapshot(100, "live", [record], {"entropy": Column("entropy", "nats", "0..ln n_i")})
        >>> seen.mean("entropy"), seen.values[0]["entropy"].tolist()
        (1.0, [0.5, 1.5])
    """

    step: int
    source: str
    records: Sequence[SiteRecord]
    columns: Mapping[str, Column] = field(default_factory=dict)
    tokens: Sequence[str] | None = None

    def heads(self, column: str) -> Iterator[tuple[SiteRecord, int, float]]:
        """Go through all heads: the record of the site, the number of the head there, its value."""
        for record in self.records:
            for head, value in enumerate(record.values[column].tolist()):
                yield record, head, value

    def where(self, trait: Trait) -> Iterator[tuple[SiteRecord, int]]:
        """Go through the heads that have a trait: the record of the site, the number of the head there."""
        for record in self.records:
            for head in np.flatnonzero(trait.holds(record.values)).tolist():
                yield record, head

    def mean(self, column: str, stack: str | None = None) -> float:
        """Average over all heads that have a value, or those of one stack; NaN where none has."""
        heads = [record.values[column] for record in self.records if stack in (None, record.stack)]
        values = np.concatenate(heads) if heads else np.empty(0)
        known = values[~np.isnan(values)]
        return float(known.mean(dtype=np.float64)) if len(known) else math.nan

    @property
    def labels(self) -> list[str]:
        """Label of each record."""
        return [record.label for record in self.records]

    @property
    def sites(self) -> list[str]:
        """Module path of each record."""
        return [record.path for record in self.records]

    @property
    def stacks(self) -> list[str]:
        """Stack of each record."""
        return [record.stack for record in self.records]

    @property
    def is_cross(self) -> list[bool]:
        """Whether each record is of cross-attention."""
        return [record.is_cross for record in self.records]

    @property
    def values(self) -> list[Mapping[str, np.ndarray]]:
        """Values of each record, column -> (H,)."""
        return [record.values for record in self.records]

    @property
    def patterns(self) -> list[np.ndarray]:
        """Pattern of each record that has one, (H, Q, K)."""
        return [record.pattern for record in self.records if record.pattern is not None]

    @property
    def scores(self) -> list[HeadScore]:
        """Columns by which a probe scores heads."""
        return [column for column in self.columns.values() if isinstance(column, HeadScore)]

    @property
    def layers(self) -> dict[str, list[float]]:
        """Numbers of layers as a whole: name -> one for each record."""
        names = dict.fromkeys(name for record in self.records for name in record.layer_values)
        return {name: [record.layer_values[name] for record in self.records] for name in names}

    @property
    def rollout(self) -> dict[str, np.ndarray]:
        """Attention rollout, (T, T), by the label of the layer up to which it goes."""
        return {record.label: record.rollout for record in self.records if record.rollout is not None}
