"""Attention that a model computes in a loop - head by head, step by step, slice by slice - put together to one call.

Shapes: B sequences, H query heads, Q queries, K keys.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_call import AttentionCall, NotUnderstoodError
from .axes import Axis, Layout, Source, SourceKind


@dataclass(frozen=True)
class Clue:
    """What tells whether a call is one of several that belong together.

    Attributes:
        rows: axis of the queries.
        at: where the queries lie in what has been selected.
        batch: axes of sequences.
        heads: weights that make the queries, and where in what they make; empty where they are not known.
        keys: axis of the keys.
        depth: newest attention on which queries and keys depend.
        summed: where the axis that is summed over begins in what made it.
    """

    rows: Axis
    at: frozenset[tuple[Source, int]]
    batch: frozenset[Any]
    heads: frozenset[Any]
    keys: Axis
    depth: tuple[int, int]
    summed: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        query: Layout,
        rows: Axis,
        keys: Axis,
        depth: tuple[int, int],
        weight: Tensor | None = None,
        contracted: Axis = (),
    ) -> "Clue":
        """Collect the clues of a call.

        Args:
            query: what the axes of the queries are made of.
            rows: their axis of queries.
            keys: axis of the keys.
            depth: newest attention on which queries and keys depend.
            weight: what the call itself projects its queries with.
            contracted: axis of the queries that is summed over.
        """
        own = {*rows, *contracted}
        places = [part for part in query.parts if part.source.kind is not SourceKind.FEATURES and part not in own]
        at = frozenset(entry for entry in query.fixed if entry[0].kind is not SourceKind.FEATURES)
        of_heads = [(part.source, part.start) for part in query.parts if part.source.kind is SourceKind.FEATURES]
        of_heads += [entry for entry in query.fixed if entry[0].kind is SourceKind.FEATURES]
        names = [_names(source, start) for source, start in of_heads]
        known = all(name is not None for name in names)
        heads = frozenset(name for found in names for name in found or ()) if known else frozenset()
        if weight is not None:
            heads = frozenset([id(weight)])
        return cls(rows, at, frozenset(places), heads, keys, depth, tuple(part.start for part in contracted))

    @property
    def weights(self) -> set[Any]:
        """Weights that make the queries, wherever in what they make."""
        return {name[0] if isinstance(name, tuple) else name for name in self.heads}

    @property
    def is_mixed(self) -> bool:
        """Whether its sequences are entries of an axis in which sequences and heads are one, not cut between them."""
        return any(
            {inner.source.kind is SourceKind.FEATURES for inner in part.source.picked or ()} == {True, False}
            for part in self.batch
        )

    @property
    def key_sources(self) -> set[Source]:
        """Sources that the keys are, or are made of."""
        found: set[Source] = set()
        todo = [part.source for part in self.keys]
        while todo:
            source = todo.pop()
            if source not in found:
                found.add(source)
                todo += [*source.made_of, *(part.source for _, axis in source.segments for part in axis)]
        return found


def _names(source: Source, start: int) -> frozenset[Any] | None:
    """Name features by the weights that made them; None where these are not known."""
    if source.weight is not None:
        return frozenset([(source.weight, start)])
    inner = [(part.source, part.start) for _, axis in source.segments for part in axis]
    inner = inner or [(made_of, 0) for made_of in source.made_of]
    found = [_names(*one) for one in inner if one[0].kind is SourceKind.FEATURES]
    if not found or any(name is None for name in found):
        return None
    return frozenset(name for names in found for name in names or ())


@dataclass
class Group:
    """Calls that may belong together, in the order in which they were made.

    Attributes:
        path: path of the module that made them, without the number of a head.
        frame: number of the run of the module that made the first one.
        said: number of heads that the module says it has.
        members: the calls, their clues, their paths.
        notes: whatever the caller wants back with the result.
        steps: number of the step or slice that each is of.
        slices: what one is after the other of: ``rows``, steps or slices of queries; ``batch``, slices of sequences.
        in_turn: whether a head is computed from the one before.
    """

    path: str
    frame: int
    said: int | None
    members: list[tuple[AttentionCall, Clue, str]]
    notes: Any
    steps: list[int] = field(default_factory=lambda: [0])
    slices: Literal["rows", "batch"] = "rows"
    in_turn: bool = False

    def joins(self, call: AttentionCall, clue: Clue, path: str, frame: int) -> bool:
        """Add a call if it belongs to the others; tell whether it does."""
        first, (last, of_last, last_path) = self.members[0], self.members[-1]
        shape = first[0].shape
        siblings = path == last_path or _without_number(path, first[2]) is not None
        if not siblings or call.windows != last.windows or call.over != last.over:
            return False
        if call.shape[2] == 1 == shape[2] and path == last_path and call.shape[:2] == shape[:2]:
            return self._joins_steps(call, clue, path)
        if clue.keys != of_last.keys or (clue.depth[1] != of_last.depth[1] and call.shape != shape):
            return False
        step = self.steps[-1]
        of_step = [other for (_, other, _), at in zip(self.members, self.steps, strict=True) if at == step]
        same_rows = clue.rows == of_last.rows and clue.at == of_last.at and clue.batch == of_last.batch
        if same_rows:
            is_new = bool(clue.heads) and all(clue.heads != other.heads for other in of_step)
            one_each = shape[1] == 1 and call.shape == shape
            cut_alike = clue.weights == first[1].weights and clue.summed == of_last.summed
            n_heads = call.shape[1] + sum(one.shape[1] for one, _, _ in self.members)
            cut_alike = cut_alike and (self.said is None or n_heads <= self.said)
            if not is_new or not (one_each or cut_alike) or call.shape[2:] != shape[2:]:
                return False
            if clue.depth != of_last.depth:
                if frame != self.frame or self.said is None or len(self.members) >= self.said:
                    return False
                self.in_turn = True
            return self._add(call, clue, path, step)
        if clue.depth != of_last.depth or path != last_path:
            return False
        if clue.heads != first[1].heads and not first[1].is_mixed:
            return False
        kind: Literal["rows", "batch"] = "batch" if clue.rows == of_last.rows else "rows"
        if kind == "batch" and call.self_attention is False:
            return False  # one stream looks at the other, and the other at the one
        if kind == "rows" and (clue.batch != of_last.batch or not _are_slices(clue, of_last)):
            return False
        if step > 0 and kind != self.slices:
            return False
        self.slices = kind
        return self._add(call, clue, path, step + 1)

    def _joins_steps(self, call: AttentionCall, clue: Clue, path: str) -> bool:
        last, of_last, _ = self.members[-1]
        same_keys = clue.keys == of_last.keys and clue.depth[1] == of_last.depth[1] and call.shape == last.shape
        grown = call.shape[3] > last.shape[3] and bool(clue.key_sources & of_last.key_sources)
        if not same_keys and not grown:
            return False
        step = self.steps[-1]
        of_step = [other for (_, other, _), at in zip(self.members, self.steps, strict=True) if at == step]
        same_rows = clue.rows == of_last.rows and clue.at == of_last.at and clue.depth == of_last.depth
        is_head = call.shape[1] == 1 and same_rows and bool(clue.heads)
        is_head = is_head and all(clue.heads != other.heads for other in of_step)
        return self._add(call, clue, path, step if is_head else step + 1)

    def _add(self, call: AttentionCall, clue: Clue, path: str, step: int) -> bool:
        self.members.append((call, clue, path))
        self.steps.append(step)
        shared = _without_number(path, self.members[0][2])
        if path != self.path and shared is not None:
            self.path = shared
        return True

    def merged(self) -> list[tuple[str, AttentionCall]]:
        """Return the call that the group makes, with its path; each by itself where it makes none.

        Raises:
            NotUnderstoodError: when the calls are slices of sequences and heads in one, and not all of them.
        """
        whole = self._merged()
        if self.members[0][1].is_mixed and len(whole) == len(self.members):
            raise NotUnderstoodError("it is a slice in which sequences and heads are mixed, and others are missing")
        return whole

    def _merged(self) -> list[tuple[str, AttentionCall]]:
        calls = [call for call, _, _ in self.members]
        if len(calls) == 1:
            return [(self.path, calls[0])]
        n_steps = self.steps[-1] + 1
        n_heads = len(calls) // n_steps
        alone = [(path, call) for call, _, path in self.members]
        if (self.in_turn and n_heads != self.said) or any(self.steps.count(i) != n_heads for i in range(n_steps)):
            return alone
        blocks = [calls[i * n_heads : (i + 1) * n_heads] for i in range(n_steps)]
        parts = [block[0] if n_heads == 1 else _heads_together(block) for block in blocks]
        if n_steps == 1:
            return [(self.path, parts[0])]
        if self.slices == "rows":
            return [(self.path, _rows_together(parts))]
        whole = _sequences_together(parts, [clue for _, clue, _ in self.members])
        return alone if whole is None else [(self.path, whole)]


def _without_number(path: str, other: str) -> str | None:
    """Return the path that two have in common when they differ in one number, without that; None otherwise."""
    if path == other:
        return path
    mine, theirs = path.split("."), other.split(".")
    differing = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
    if len(mine) != len(theirs) or len(differing) != 1 or not mine[differing[0]].isdigit():
        return None
    return ".".join(mine[: differing[0]] + mine[differing[0] + 1 :]) if len(mine) > 1 else None


def _heads_together(calls: Sequence[AttentionCall]) -> AttentionCall:
    """Put calls of one head each together, (B, H, Q, K)."""
    first = calls[0]
    plain = all(
        call.query is not None and call.score_mod is None and call.mask_mod is None and call.n_sinks == 0
        for call in calls
    )
    alike = all(
        (call.scale, call.is_causal) == (first.scale, first.is_causal)
        and (call.mask is first.mask or call.mask is not None is not first.mask)
        for call in calls
    )
    if plain and alike and all(call.mask is None or call.mask.dtype == first.mask.dtype for call in calls):  # type: ignore[union-attr]
        masks = [call.mask for call in calls]
        mask = first.mask
        if mask is not None and any(m is not mask for m in masks):
            mask = _together([m if m is None else m.expand(-1, 1, -1, -1) for m in masks], 1)
        return replace(
            first,
            query=_together([call.query for call in calls], 1),
            key=_together([call.key for call in calls], 1),
            value=_together([call.value for call in calls], 1),
            mask=mask,
        )
    return _by_scores(calls, 1)


def _together(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found, dim) if len(found) == len(tensors) else None


def _by_scores(calls: Sequence[AttentionCall], dim: int) -> AttentionCall:
    """Put calls together along heads (1) or queries (2), by their scores; keys that some have not are masked."""
    first = calls[0]
    common = {"query": None, "key": None, "value": None, "mask": None, "is_causal": False, "scale": 1.0}
    common |= {"score_mod": None, "mask_mod": None}
    if any(call.model_weights is not None for call in calls):
        return replace(first, **common, model_scores=None, model_weights=torch.cat([c.pattern() for c in calls], dim))  # type: ignore[arg-type]
    scores = [call.scores(0, call.shape[2])[0] for call in calls]
    # sinks stand last; keys that are missing come before them
    n_sinks = first.n_sinks
    width = max(call.shape[3] + (0 if call.sinks_in_pattern else n_sinks) for call in calls)
    padded = []
    for x in scores:
        keys, sinks = x[..., : x.shape[-1] - n_sinks], x[..., x.shape[-1] - n_sinks :]
        padded.append(torch.cat([F.pad(keys, (0, width - x.shape[-1]), value=-torch.inf), sinks], -1))
    return replace(first, **common, model_scores=torch.cat(padded, dim))  # type: ignore[arg-type]


def _are_slices(clue: Clue, other: Clue) -> bool:
    """Whether the queries of two calls are different entries of the same sources."""
    one, another = ({part.source for part in c.rows} | {source for source, _ in c.at} for c in (clue, other))
    return one == another and bool(clue.rows or other.rows)


def is_slice(clue: Clue) -> bool:
    """Whether the queries of a call are some of what there is, so that others may follow."""
    if any(source.size > 1 for source, _ in clue.at):
        return True
    sizes: dict[Source, int] = {}
    for part in (*clue.rows, *clue.batch):
        sizes[part.source] = sizes.get(part.source, 1) * part.size
    return any(source.picked is not None or size < source.size for source, size in sizes.items())


def _sequences_together(calls: Sequence[AttentionCall], clues: Sequence[Clue]) -> AttentionCall | None:
    """Put slices of sequences together; slices of sequences and heads merged are told apart again."""
    if any(call.windows != 1 for call in calls):
        return None
    merged = _by_scores(calls, 0)
    sources = [part.source for clue in clues for part in clue.batch]
    axis = sources[0].picked if sources else None
    if axis is None or any(source.picked != axis for source in sources):
        return merged
    sizes = [part.size for part in axis]
    heads = [i for i, part in enumerate(axis) if part.source.kind is SourceKind.FEATURES]
    others = [i for i in range(len(axis)) if i not in heads]
    scores = merged.model_scores
    if scores is None or scores.shape[0] != math.prod(sizes) or scores.shape[1] != 1:
        return None
    last = scores.shape[-2:]
    scores = scores.reshape(*sizes, *last).permute(*others, *heads, len(sizes), len(sizes) + 1)
    H = math.prod(sizes[i] for i in heads)
    return replace(merged, model_scores=scores.reshape(-1, H, *last))


def _rows_together(calls: Sequence[AttentionCall]) -> AttentionCall:
    """Put the steps of a decoder, or slices of queries, together."""
    merged = _by_scores(calls, 2)
    told = {call.self_attention for call in calls}
    is_self = False if False in told else told.pop() if len(told) == 1 else None
    if is_self is not True:
        return replace(merged, self_attention=False, query_positions=None)
    if all(call.has_positions for call in calls):
        rows = [call.positions_of(torch.arange(call.shape[2], device="cpu")) for call in calls]
        return replace(merged, query_positions=torch.cat(rows))
    return replace(merged, query_positions=None, positions_known=False)


class Loops:
    """Holds calls back until it is known whether others belong to them.

    Args:
        on_call: function that is handed each call when it is whole: path, call, notes.
        on_refused: function that is told the path and the reason of what cannot be put together.
    """

    def __init__(
        self, on_call: Callable[[str, AttentionCall, Any], None], on_refused: Callable[[str, str], None]
    ) -> None:
        self._on_call, self._on_refused = on_call, on_refused
        self._newest: Group | None = None
        self._steps: dict[str, Group] = {}

    def add(
        self, path: str, frame: int, said: int | None, call: AttentionCall, clue: Clue | None, notes: Any = None
    ) -> None:
        """Take a call.

        Args:
            path: path of the module that made it.
            frame: number of the run of the module.
            said: number of heads that the module says it has.
            call: the call.
            clue: what tells what it belongs to; None: it is by itself.
            notes: handed on with it.
        """
        call = replace(call, site="")
        if clue is not None:
            group = self._steps.get(path)
            if group is not None and group.joins(call, clue, path, frame):
                return
            if self._newest is not None and self._newest.joins(call, clue, path, frame):
                return
        self._end_newest()
        if path in self._steps:  # calls of a module are told in their order
            self._end(self._steps.pop(path))
        H, Q = call.shape[1:3]
        group = Group(path, frame, said, [(call, clue, path)] if clue is not None else [], notes)
        if clue is None or 0 in call.shape or (H > 1 and Q > 1 and not is_slice(clue) and not call.with_gradients):
            self._on_call(path, call, notes)
        elif Q == 1:
            self._steps[path] = group
        else:
            self._newest = group

    def end(self) -> None:
        """Hand on what is held back: no other calls follow."""
        self._end_newest()
        for group in self._steps.values():
            self._end(group)
        self._steps.clear()

    def _end_newest(self) -> None:
        if self._newest is not None:
            group, self._newest = self._newest, None
            self._end(group)

    def _end(self, group: Group) -> None:
        try:
            found = group.merged()
        except NotUnderstoodError as reason:
            self._on_refused(group.path, str(reason))
            return
        for path, call in found:
            self._on_call(path, call, group.notes)
