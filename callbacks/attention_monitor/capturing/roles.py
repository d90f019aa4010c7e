"""Which axis of an attention call is which: samples, windows, heads, queries, keys.

Shapes: B sequences (samples x windows), H heads, Q queries, K keys, D head dimensions.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .attention_call import AttentionCall
from .axes import Axis, Layout, Part, Source, SourceKind, is_features, sources_of
from .origin import Origin
from .products import Product

# Names that modules have for their number of heads.
_ATTRIBUTES = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "nheads", "heads", "n_local_heads")


def said_heads(modules: Iterable[nn.Module]) -> int | None:
    """Ask modules how many heads they have, the likeliest first; None where none says."""
    for module in modules:
        for name in _ATTRIBUTES:
            number = getattr(module, name, None)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return number
    return None


@dataclass
class Roles:
    """What the parts of a tensor's axes are, by their numbers in its layout, each in order.

    Attributes:
        sizes: size of each part.
        samples: parts that are samples of the batch.
        windows: parts of a sample that attend apart: windows, rows or columns of a table.
        heads: parts that are heads.
        rows: parts that are queries.
        columns: parts that are keys, or what is multiplied.
        own_keys: whether every query has keys of its own.
        assumed: what was assumed, in a sentence's words; None: everything was seen.
    """

    sizes: list[int]
    samples: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    own_keys: bool = False
    assumed: str | None = None

    @property
    def n_windows(self) -> int:
        """Windows of a sample."""
        return math.prod(self.sizes[i] for i in self.windows)

    @property
    def is_plain(self) -> bool:
        """Whether the parts lie in the order (B, H, Q, K) already, each an axis."""
        order = [*self.samples, *self.windows, *self.heads, *self.rows, *self.columns]
        return order == sorted(order)

    def arranged(self, x: Tensor) -> Tensor:
        """Bring a tensor with such axes into the order (B, H, Q, K), samples before windows."""
        groups = ([*self.samples, *self.windows], self.heads, self.rows, self.columns)
        order = [i for group in groups for i in group]
        shape = [math.prod(self.sizes[i] for i in group) for group in groups]
        return x.reshape(self.sizes).permute(order).reshape(shape)


def of_scores(
    layout: Layout,
    shape: Sequence[int],
    columns: int,
    product: Product | None,
    key_side: int,
    met: "MetValues",
    first: Source | None,
    said: int | None,
    is_known: bool = True,
) -> Roles:
    """Tell the axes of scores, or of weights, apart.

    Args:
        layout: what their axes are made of.
        shape: their shape.
        columns: axis of the keys.
        product: product of queries and keys; None where the scores come from a layer.
        key_side: factor of the product that has the keys.
        met: how they met the values.
        first: first axis of what was given to the model: samples, in most models.
        said: number of heads that the module says it has.
        is_known: whether it was seen what made the scores.
    """
    parts: list[Part | None] = []
    sizes: list[int] = []
    axis_of_part: list[int] = []
    for at, axis in enumerate(layout.axes):
        cut = [None] if at == columns else list(axis)
        parts += cut
        sizes += [shape[at]] if at == columns else [part.size for part in axis]
        axis_of_part += [at] * len(cut)
    roles = Roles(sizes, columns=[i for i, part in enumerate(parts) if part is None])
    keys = tuple(part for part in (*layout.axes[columns], *met.keys))
    key_sources = _closure(keys)
    contracted = _contracted_sources(product)
    over_channels = product is not None and product.is_over(key_side) == "channels"
    batch: list[int] = []
    unknown: list[int] = []
    free_features: list[int] = []
    for i, part in enumerate(parts):
        if part is None:
            continue
        tagged = product is not None and part.tag is not None and part.tag.product is product
        is_row = tagged and part.tag is not None and part.tag.side != key_side
        is_free = is_row or (part.tag is None and met.is_free(part) and not _is_shared(product, part.source))
        features = part.source.kind is SourceKind.FEATURES
        if is_free and (not features or over_channels or part.source in set(sources_of(keys))):
            roles.rows.append(i)
        elif is_free and features and part.source not in contracted:
            free_features.append(i)
        elif features or (part.source in contracted and not tagged):
            roles.heads.append(i)
        elif part.source.kind in (SourceKind.UNSEEN, SourceKind.COPIES):
            unknown.append(i)
        else:
            batch.append(i)
    if free_features:  # of a layer that puts out scores, or that mixes tokens: more heads, or queries
        group = roles.rows if roles.heads and not roles.rows else roles.heads
        group += free_features
        group.sort()
    if not roles.rows:
        own = [i for i in batch if (part := parts[i]) is not None and part.source in key_sources]
        if any(part.source.kind is SourceKind.UNSEEN for part in layout.axes[columns]):  # gathered for each query
            others = [i for i in batch if (part := parts[i]) is not None and part.source is not first]
            own = own or (others if len(others) == 1 < len(batch) else [])
        if own:
            roles.rows, roles.own_keys = own, True
            batch = [i for i in batch if i not in own]
    if not roles.rows and len(layout.axes) >= 4 and not batch:  # all unknown, (..., heads, queries, keys)
        last = max(axis_of_part[i] for i in unknown) if unknown else -1
        roles.rows = [i for i in unknown if axis_of_part[i] == last]
        unknown = [i for i in unknown if i not in roles.rows]
        roles.own_keys = bool(roles.rows)
    seen = bool(roles.heads) or (is_known if product is None else _is_projected(product))
    attended = key_sources | {p.source for i in roles.rows if (p := parts[i])}
    documented = _before(axis_of_part, layout, roles)
    _place_unknown(roles, batch, unknown, _not_in(attended, documented, parts), seen, said)
    _split_batch(roles, batch, parts, attended, first)
    return roles


@dataclass(frozen=True)
class MetValues:
    """How weights met the values.

    Attributes:
        free: sources and strides of the axes that the weights alone have.
        shared: the same of the axes that the values have too.
        keys: axis of the values that was summed over.
        layout: what the axes of the values are made of.
        origin: where the values come from.
    """

    free: Collection[tuple[Source, int]]
    shared: Collection[tuple[Source, int]]
    keys: Axis
    layout: Layout
    origin: Origin

    def is_free(self, part: Part) -> bool:
        """Whether the weights alone have a part."""
        if (part.source, part.stride) in self.free:
            return True
        sources = {source for source, _ in self.free} - {source for source, _ in self.shared}
        return part.source in sources


def of_fused(query: Layout, key: Layout, q_shape: Sequence[int], first: Source | None, said: int | None) -> Roles:
    """Tell the leading axes of queries (..., Q, D) of a fused call apart, which has them broadcast against the keys.

    Args:
        query: what the axes of the queries are made of, their leading axes broadcast.
        key: what the axes of the keys are made of.
        q_shape: shape of the queries.
        first: first axis of what was given to the model.
        said: number of heads that the module says it has.
    """
    parts: list[Part | None] = []
    sizes: list[int] = []
    axis_of_part: list[int] = []
    for at, axis in enumerate(query.axes):
        is_whole = at >= len(query.axes) - 2
        parts += [None] if is_whole else list(axis)
        axis_of_part += [at] * (1 if is_whole else len(axis))
        sizes += [q_shape[at]] if is_whole else [part.size for part in axis]
    n = len(parts)
    roles = Roles(sizes, rows=[n - 2], columns=[n - 1])
    contracted = {part.source for part in query.axes[-1] if part.source.kind is not SourceKind.UNSEEN}
    key_sources = _closure(key.axes[-2])
    batch: list[int] = []
    unknown: list[int] = []
    for i, part in enumerate(parts[:-2]):
        assert part is not None
        if part.source.kind is SourceKind.FEATURES or part.source in contracted:
            roles.heads.append(i)
        elif part.source.kind in (SourceKind.UNSEEN, SourceKind.COPIES):
            unknown.append(i)
        else:
            batch.append(i)
    if not query.axes[-2] and q_shape[-2] == 1:
        own = [i for i in batch if (part := parts[i]) is not None and part.source in key_sources]
        if own and not _has_all(query.axes[:-2], key.axes[:-2], own, parts):
            own = []
        if own:
            roles.rows, roles.own_keys = [*own, n - 2], True
            batch = [i for i in batch if i not in own]
    seen = bool(roles.heads) or is_features(query.axes[-1])
    n_leading = len(query.axes) - 2
    documented = [i for i in range(n - 2) if axis_of_part[i] == n_leading - 1] if n_leading > 1 else None
    attended = key_sources | {part.source for part in query.axes[-2]}
    _place_unknown(roles, batch, unknown, _not_in(attended, documented, parts), seen, said)
    _split_batch(roles, batch, parts, attended, first)
    return roles


def _has_all(query: Sequence[Axis], key: Sequence[Axis], own: Sequence[int], parts: Sequence[Part | None]) -> bool:
    """Whether the keys have the axes too, so that every query has keys of its own."""
    of_keys = {part.source for axis in key for part in axis}
    return all((part := parts[i]) is not None and part.source in of_keys for i in own)


def _closure(axis: Iterable[Part]) -> set[Source]:
    """Collect the sources of an axis and all that they were made of."""
    found: set[Source] = set()
    todo = [part.source for part in axis]
    while todo:
        source = todo.pop()
        if source not in found:
            found.add(source)
            todo += source.made_of
            todo += [part.source for _, inner in source.segments for part in inner]
    return found


def _contracted_sources(product: Product | None) -> set[Source]:
    if product is None:
        return set()
    return {
        part.source
        for factor in product.factors
        for part in factor.axes(product.contracted)
        if part.source.kind is not SourceKind.UNSEEN
    }


def _is_shared(product: Product | None, source: Source) -> bool:
    if product is None:
        return False
    return any(part.source is source for factor in product.factors for part in factor.axes(product.shared))


def _is_projected(product: Product) -> bool:
    """Whether queries or keys were seen to be projected, so that what is no features is no head."""
    return any(
        part.source.kind is SourceKind.FEATURES
        for factor in product.factors
        for part in factor.axes(product.contracted)
    )


def _before(axis_of_part: Sequence[int], layout: Layout, roles: Roles) -> list[int] | None:
    """Return the parts of the last axis that is neither queries nor keys, the heads where (B, H, Q, K) is the order."""
    taken = {axis_of_part[i] for i in (*roles.rows, *roles.columns)}
    leading = [at for at in range(len(layout.axes)) if at not in taken]
    if len(leading) < 2:
        return None
    return [i for i, at in enumerate(axis_of_part) if at == leading[-1]]


def _not_in(attended: set[Source], documented: list[int] | None, parts: Sequence[Part | None]) -> list[int] | None:
    """Return the parts that may be heads: none of them is a window of what is attended over."""
    if documented is None:
        return None
    known = {source for source in attended if source.kind is SourceKind.PLACES}
    return [i for i in documented if (part := parts[i]) is not None and part.source not in known]


def _place_unknown(
    roles: Roles, batch: list[int], unknown: list[int], documented: list[int] | None, seen: bool, said: int | None
) -> None:
    """Place the axes of which nothing is known: where the documented order has the heads, or as the module says.

    Args:
        roles: roles so far; gets heads.
        batch: parts that are sequences; gets the unknown ones that are no heads.
        unknown: parts of which nothing is known.
        documented: parts of the axis that has the heads in the documented order; None: there is no such axis.
        seen: whether it was seen that what is no features is no head.
        said: number of heads that the module says it has.
    """
    leading = sorted([*batch, *unknown])
    candidates = unknown if seen else leading
    if not roles.heads:
        fitting = [i for i in candidates if roles.sizes[i] == said and said != 1]
        if documented is not None and not seen:
            roles.heads = [i for i in documented if i in candidates]
        elif fitting:
            roles.heads = fitting[-1:]
        elif documented is not None:
            roles.heads = [i for i in documented if i in unknown]
        if roles.heads and (unknown or len(leading) > 2 or documented is None):
            roles.assumed = "its axes were not seen to be made, and are taken to be (..., heads, queries, keys)"
    batch[:] = [i for i in leading if i not in roles.heads]


def _split_batch(
    roles: Roles, batch: Sequence[int], parts: Sequence[Part | None], attended: set[Source], first: Source | None
) -> None:
    """Tell samples from windows: samples are never attended over."""
    sources = {i: part.source for i in batch if (part := parts[i]) is not None}
    apart = [i for i in batch if sources[i] not in attended]
    chosen: Source | None
    if first is not None and any(sources[i] is first for i in apart):
        chosen = first
    elif first is not None and first.size == 1 and first not in attended:
        chosen = None
    else:
        chosen = min((sources[i] for i in apart), key=lambda source: source.number, default=None)
    roles.samples = [i for i in batch if sources[i] is chosen and i in apart]
    roles.windows = [i for i in batch if i not in roles.samples]


# Where queries are among the keys


@dataclass(frozen=True)
class Places:
    """How the queries of a call lie among its keys.

    Attributes:
        same_tokens: whether both are the same tokens; None: not known.
        positions: (Q,) position of each query among the keys; None: not known.
        is_seen: whether it was seen what made queries and keys.
        are_apart: whether they are different entries of one sequence.
        are_alike: whether each query is at the key of its own number.
    """

    same_tokens: bool | None
    positions: Tensor | None = None
    is_seen: bool = True
    are_apart: bool = False
    are_alike: bool = False


def places(query: Layout, rows: Axis, key: Layout, keys: Axis, *, own_keys: bool = False) -> Places:
    """Find out where queries lie among keys.

    Args:
        query: what the axes of the queries are made of.
        rows: their axis of queries.
        key: what the axes of the keys are made of.
        keys: their axis of keys.
        own_keys: whether every query has keys of its own: the position is then the same for all.
    """
    if any(part.source.kind in (SourceKind.UNSEEN, SourceKind.COPIES) for part in (*rows, *keys)):
        return Places(None, is_seen=False)
    if not keys or 0 in [part.size for part in (*rows, *keys)]:
        return Places(None)
    if rows == keys and not own_keys and all(_start(query, p.source) == _start(key, p.source) for p in rows):
        return Places(True, are_alike=True)
    Q = math.prod(part.size for part in rows)
    if own_keys:
        coordinates = {part.source: torch.tensor([_start(query, part.source)], device="cpu") for part in rows}
        located = _locate(coordinates, key, keys, 1)
        located = None if located is None else located.expand(Q)
    else:
        coordinates = _coordinates(query, rows)
        located = _locate(coordinates, key, keys, Q)
    if located is not None:
        n = math.prod(part.size for part in keys)
        if not own_keys and not bool(((located >= 0) & (located < n)).any()):
            return Places(False, are_apart=True)  # of two streams that were put together, one looks at the other
        return Places(True, located)
    mine = set(coordinates)  # none: of no place, as a state or a mean is
    theirs = _closure(keys)
    return Places(any(source in theirs or any(map(source.is_made_of, theirs)) for source in mine))


def _coordinates(layout: Layout, rows: Axis) -> dict[Source, Tensor]:
    """Return, for each source that queries lie in, the entry of each of them, apart from what windows add: (Q,)."""
    sizes = [part.size for part in rows]
    Q = math.prod(sizes)
    if Q == 0:
        return {}
    numbers = torch.arange(Q, device="cpu")
    found: dict[Source, Tensor] = {}
    inner = Q
    for part in rows:
        inner //= part.size
        index = numbers // inner % part.size
        found[part.source] = (
            found.get(part.source, torch.zeros(Q, dtype=torch.long, device="cpu")) + part.stride * index
        )
    for source in found:
        found[source] = found[source] + _start(layout, source)
    for source, entry in layout.fixed:
        if source not in found and source.kind is not SourceKind.FEATURES and Q >= 1:
            found[source] = torch.full((Q,), entry, device="cpu")
    return found


def _start(layout: Layout, source: Source) -> int:
    """Add up where a tensor begins in a source."""
    of_parts = [part.start for part in layout.parts if part.source is source]
    return sum(of_parts) + sum(entry for other, entry in layout.fixed if other is source)


def _locate(coordinates: dict[Source, Tensor], key: Layout, keys: Axis, Q: int) -> Tensor | None:
    """Return the position along an axis of keys of each query, (Q,); None where it is not to be found there."""
    position = torch.zeros(Q, dtype=torch.long, device="cpu")
    valid = torch.ones(Q, dtype=torch.bool, device="cpu")
    inner = math.prod(part.size for part in keys)
    if not any(_entry(coordinates, part.source, Q) is not None for part in keys):
        return None
    if len({part.source for part in keys}) < len(keys):
        return None  # one source along two parts: a part of it may be anywhere
    for part in keys:
        inner //= part.size
        entry = _entry(coordinates, part.source, Q)
        if entry is None and part.size == 1 < len(keys):
            continue  # of several that there is one of, those of the queries matter
        if entry is None:
            return None
        ahead = entry - _start(key, part.source)
        index = ahead.div(part.stride, rounding_mode="floor")
        inside = (index >= 0) & (index < part.size) & (ahead % part.stride == 0)
        valid &= inside
        position += inner * index.clamp(0, part.size - 1)
        if part.stride != 1 and bool((ahead % part.stride != 0).any()):
            return None  # some queries lie between two keys
    # a query that is not among the keys has the position that it would have beside them
    if len(keys) == 1:
        return index
    return torch.where(valid, position, -1) if bool(valid.any()) else None


def _entry(coordinates: dict[Source, Tensor], source: Source, Q: int) -> Tensor | None:
    """Return the entry of each query in a source, (Q,), also through what it was put together or picked from."""
    if source in coordinates:
        return coordinates[source]
    if source.picked is not None and source.picks is not None:
        inside = _locate(coordinates, Layout((source.picked,)), source.picked, Q)
        if inside is None:
            return None
        picks = source.picks.cpu()
        if bool((picks.diff() != 1).any()):
            return None  # keys in another order, or with gaps: what stands before a key is not the token before
        hits = inside[:, None] == picks
        return torch.where(hits.any(1), hits.int().argmax(1), -(10**9))
    for start, axis in reversed(source.segments):
        inside = _locate(coordinates, Layout((axis,)), axis, Q)
        if inside is not None:
            return inside + start
    # what lies in the rows' source instead: they were put together, or picked, from what the keys are
    for other, entry in coordinates.items():
        if other.picked is not None and other.picks is not None and len(other.picked) == 1:
            part = other.picked[0]
            if part.source is source:
                return part.start + part.stride * other.picks.cpu()[entry.clamp(0, other.size - 1)]
    return None


def same_sequences(query: Layout, rows: Axis, key: Layout, keys: Axis, shared: Sequence[tuple[Axis, Axis]]) -> bool:
    """Whether queries and keys are of the same sequences: not halves of a batch that two inputs were put into.

    Args:
        query: what the axes of the queries are made of.
        rows: their axis of queries.
        key: what the axes of the keys are made of.
        keys: their axis of keys.
        shared: axes that are multiplied entry by entry.
    """
    attended = _closure((*rows, *keys))
    for mine, theirs in shared:
        places_of_both = ([p for p in axis if p.source.kind is SourceKind.PLACES] for axis in (mine, theirs))
        for one, other in zip(*places_of_both, strict=False):
            related = one.source is not other.source and _closure([one]) & _closure([other]) - attended
            if related and not _are_same_picks(one.source, other.source):
                return False
    of_query, of_key = ({*sources_of(x.parts), *(source for source, _ in x.fixed)} for x in (query, key))
    return all(
        _start(query, source) == _start(key, source)
        for source in (of_query & of_key) - attended
        if source.kind is SourceKind.PLACES
    )


def _are_same_picks(one: Source, other: Source) -> bool:
    """Whether the same entries were picked twice."""
    if one.picks is None or other.picks is None or one.picked != other.picked:
        return False
    return torch.equal(one.picks, other.picks)


def shares_windows(query: Layout, key: Layout, rows: Axis, keys: Axis) -> bool:
    """Whether what queries and keys have beside their own axes lies alike: positions are then those in each window."""
    row_parts, key_parts = set(rows), set(keys)
    sources = {part.source for part in rows} & {part.source for part in keys}

    def others(layout: Layout, own: set[Part]) -> list[tuple[Source, int, int]]:
        return sorted(
            ((p.source, p.size, p.stride) for p in layout.parts if p.source in sources and p not in own),
            key=lambda entry: (entry[0].number, entry[1], entry[2]),
        )

    return others(query, row_parts) == others(key, key_parts)


@dataclass(frozen=True)
class Batch:
    """The sequences of a call whose heads are known.

    Attributes:
        sizes: sizes of the parts of their axis.
        order: the parts, samples before windows.
        n_windows: windows of a sample.
    """

    sizes: list[int]
    order: list[int]
    n_windows: int

    def in_order(self, call: AttentionCall) -> AttentionCall:
        """Return the call with its sequences in order."""
        if self.order != sorted(self.order):
            B = math.prod(self.sizes)
            call = call.sequences(torch.arange(B).view(self.sizes).permute(self.order).flatten().to(call.device))
        return replace(call, windows=self.n_windows)


def of_batch(query: Layout, rows: Axis, keys: Axis, first: Source | None) -> Batch:
    """Tell samples from windows in the second axis of queries (Q, B, E)."""
    axis = query.axes[1]
    roles = Roles([part.size for part in axis])
    _split_batch(roles, range(len(axis)), axis, _closure((*rows, *keys)), first)
    return Batch(roles.sizes, [*roles.samples, *roles.windows], roles.n_windows)


def n_windows(batch: Axis, attended: Axis, first: Source | None) -> int:
    """Count the windows of a sample in an axis of sequences, samples first; 1 where windows come first."""
    roles = Roles([part.size for part in batch])
    _split_batch(roles, range(len(batch)), batch, _closure(attended), first)
    return roles.n_windows if [*roles.samples, *roles.windows] == list(range(len(batch))) else 1
