"""What is found in a model that reads a text: for people as tables, for programs as JSON."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attention_monitor import AttentionMaps, AttentionMonitorError, Snapshot
from attention_monitor.analysis import (
    HEAD_STATISTICS,
    Ranked,
    head_kinds,
    rank_heads,
    ranking,
    top_attended,
    weight_shift,
)
from attention_monitor.diagnosis.roles import HeadRoles
from attention_monitor.naming import escaped_token, head_name, layer_name, listed
from attention_monitor.probes.position import MIN_TOKENS

from .subject import Subject

LISTED = 48  # heads in the terminal's table; of more, the most focused
WORDS = 10  # columns for how a head looks, and for its roles; they wrap
RANKED = 5  # heads in a ranking on the terminal
LEFT_OUT = r"attention_monitor could not look at a call of (\S+): (.*)"  # a warning of the package
COLUMNS = {  # of the terminal's table: heading -> statistic
    "entropy": "entropy",
    "of at most": "max_entropy",
    "itself": "diagonal_mean",
    "previous": "previous_token",
    "first": "first_token",
    "largest": "max_weight",
    "distance": "mean_distance",
}


@dataclass(frozen=True)
class ModelReading:
    """A model that has read a text.

    Attributes:
        subject: the model.
        text: that it read.
        maps: what its heads attended to.
        snapshot: statistics of every head on the text.
        repeats: scores of every head on repeated random tokens; None where there are none.
        notes: sentences for the user.
    """

    subject: Subject
    text: str
    maps: AttentionMaps
    snapshot: Snapshot
    repeats: Snapshot | None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def kinds(self) -> list[list[list[str]]]:
        """For each layer and head, what its map is like."""
        return [head_kinds(values) for values in self.snapshot.values]

    @cached_property
    def roles(self) -> dict[str, list[str]]:
        """Head -> roles."""
        roles = HeadRoles()
        for snapshot in (self.snapshot, self.repeats):
            if snapshot is not None:
                roles.update(snapshot)
        return {head: list(taken) for head, taken in roles.since().items()}

    def tag(self, layer: int, head: int) -> str:
        """Name of a head as in tags."""
        return head_name(self.maps.labels[layer], head)

    def roles_of(self, layer: int, head: int) -> list[str]:
        return self.roles.get(self.tag(layer, head), [])

    @property
    def not_finite(self) -> list[str]:
        """Heads with NaN or infinity."""
        heads = ranking(self.snapshot, "nonfinite_fraction")
        return [head_name(layer, head) for layer, head, fraction in heads if fraction > 0]

    @property
    def remarkable(self) -> dict[str, Ranked | None]:
        """The heads at the ends of rankings."""
        entropy, distance = (ranking(self.snapshot, name) for name in ("normalized_entropy", "mean_distance"))
        return {
            "most focused": entropy[-1] if entropy else None,
            "most diffuse": entropy[0] if entropy else None,
            "longest range": distance[0] if distance else None,
        }

    @property
    def induction(self) -> list[Ranked]:
        """Heads by their induction score."""
        return [] if self.repeats is None else ranking(self.repeats, "induction")


def look(subject: Subject, text: str, target: str | None, statistics: Sequence[str]) -> ModelReading:
    """Have a model read a text, and repeated random tokens.

    Args:
        statistics: taken of the text beside those that every report has.
    """
    notes = list(subject.notes)
    if not subject.is_trained:
        notes.append("The weights of this model are random: it has not been trained.")
    with _warnings_as(notes):
        maps = subject.read(text, target, notes.append)
    values = maps.snapshot(list(dict.fromkeys([*HEAD_STATISTICS, *statistics])), subject.step or 0)
    notes += [*_what_is_not_named(maps), *_what_has_to_be_known(values)]
    repeats = _repeats(subject, values, notes)
    if maps.tokens is not None and len(maps.tokens) < MIN_TOKENS:
        notes.append(f"The roles sink and positional take a text of {MIN_TOKENS} tokens or more.")
    found = ModelReading(subject, text, maps, values, repeats, notes)
    if found.not_finite:
        some = ", ".join(found.not_finite[:RANKED])
        notes.append(f"There is NaN or infinity in the attention of {len(found.not_finite)} heads, such as {some}.")
    return found


def _repeats(subject: Subject, values: Snapshot, notes: list[str]) -> Snapshot | None:
    """What the heads do with repeated random tokens: layers as on the text, without numbers where there are none."""
    try:
        with _warnings_as([]):  # the text has had the same
            repeats = subject.repeats()
    except AttentionMonitorError as error:
        notes.append(f"There are no induction scores: {error}")
        return None
    if repeats is None:
        notes.append("Its context is too short for repeated random tokens: there are no induction scores.")
        return None
    found = {(record.label, len(record.values["induction"])): record.values for record in repeats.records}
    records, without = [], []
    for layer, record in enumerate(values.records):
        H = len(record.values["entropy"])
        nothing = {name: np.full(H, np.nan) for name in repeats.columns}
        scores = found.get((record.label, H), nothing)
        records.append(replace(record, pattern=None, values=scores))
        if not record.is_cross and np.isnan(scores["induction"]).all():
            without.append(layer_name(layer))
    if without:
        notes.append(
            f"There are no induction scores of {listed(without, 5)}: on repeated random tokens other layers or heads "
            "run, or not every token is listed."
        )
    return replace(repeats, records=records)


def _what_is_not_named(maps: AttentionMaps) -> list[str]:
    """Tell of layers whose rows or columns are not the tokens that were read."""
    odd = [layer for layer in range(len(maps)) if None in maps.tokens_of(layer)]
    if not odd:
        return []
    sizes = dict.fromkeys((*maps.calls[layer].shape[2:], maps.calls[layer].windows) for layer in odd)
    shapes = [
        f"{rows} by {columns}{f' (the first of {windows}, and statistics are of all)' if windows > 1 else ''}"
        for rows, columns, windows in sizes
    ]
    return [
        f"Not every token is listed by name in {listed([layer_name(layer) for layer in odd], 5)}: the model cuts the "
        "text into windows there, pools it, or puts other positions beside it, so that maps are "
        f"{listed(shapes, 3)}; what has no name has a number."
    ]


def _what_has_to_be_known(values: Snapshot) -> list[str]:
    """Tell what the numbers of some layers are not, or are not sure to be."""
    layers = {
        note: [layer_name(layer) for layer, record in enumerate(values.records) if record.note == note]
        for note in dict.fromkeys(record.note for record in values.records if record.note)
    }
    return [f"Of {listed(names, 5)}: {note}." for note, names in layers.items()]


@contextmanager
def _warnings_as(notes: list[str]) -> Iterator[None]:
    """Tell what could not be looked at among the notes; what libraries warn of is not for here."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    left_out: dict[str, list[str]] = {}
    for message in dict.fromkeys(str(one.message) for one in seen):
        if found := re.fullmatch(LEFT_OUT, message, re.DOTALL):
            left_out.setdefault(found[2], []).append(found[1])
        elif message.startswith("attention_monitor"):
            notes.append(message.rstrip(".") + ".")
    notes += [f"The attention of {listed(paths, 3)} is left out: {reason}." for reason, paths in left_out.items()]


@dataclass(frozen=True)
class Comparison:
    """Two models of one shape that read the same tokens.

    Attributes:
        before: the one.
        after: the other.
        moved: of each layer (H,), how much of a head's weight has moved, 0..1.
    """

    before: ModelReading
    after: ModelReading
    moved: list[np.ndarray]

    @property
    def most_changed(self) -> list[Ranked]:
        return rank_heads(self.moved)

    def role_changes(self) -> Iterator[tuple[int, int, list[str], list[str]]]:
        """Layers and heads with the roles that these have lost and those that they have taken on."""
        for layer, head, _ in sorted(self.most_changed):
            had, has = (found.roles_of(layer, head) for found in (self.before, self.after))
            lost, taken = ([r for r in a if r not in b] for a, b in ((had, has), (has, had)))
            if lost or taken:
                yield layer, head, lost, taken


def compare(before: ModelReading, after: ModelReading) -> Comparison:
    """Raises AttentionMonitorError when they cannot be compared."""
    return Comparison(before, after, weight_shift(before.maps, after.maps))


# Which heads of which layers are told and drawn
Selection = Sequence[tuple[int, Sequence[int]]]


def as_json(
    found: ModelReading, selection: Selection, top_k: int, comparison: Comparison | None = None
) -> dict[str, Any]:
    """Everything, in plain values; NaN is None."""
    maps = found.maps
    document: dict[str, Any] = {
        "model": {"name": found.subject.name, "step": found.subject.step, "trained": found.subject.is_trained},
        "text": found.text,
        "tokens": None if maps.tokens is None else list(maps.tokens),
        "target_tokens": None if maps.target_tokens is None else list(maps.target_tokens),
        "notes": found.notes,
        "layers": [_layer_as_json(found, layer, heads, top_k) for layer, heads in selection],
        "remarkable": {what: one and _ranked_as_json(found, one) for what, one in found.remarkable.items()},
        "induction_ranking": [_ranked_as_json(found, one) for one in found.induction],
    }
    if comparison is not None:
        document["comparison"] = {
            "with": comparison.after.subject.name,
            "heads": [
                _ranked_as_json(found, one)
                | {"entropy": [_entropy(x, one) for x in (comparison.before, comparison.after)]}
                for one in comparison.most_changed
            ],
            "role_changes": [
                {"name": found.tag(layer, head), "layer": layer, "head": head, "lost": lost, "taken": taken}
                for layer, head, lost, taken in comparison.role_changes()
            ],
        }
    return document


def _layer_as_json(found: ModelReading, layer: int, heads: Sequence[int], top_k: int) -> dict[str, Any]:
    pattern = found.maps.pattern(layer)  # (H, Q, K)
    _, keys = found.maps.tokens_of(layer)

    def attended(weights: Tensor) -> list[list[dict[str, Any]]]:
        return [
            [{"key": key, "token": None if keys is None else keys[key], "weight": weight} for key, weight in row]
            for row in top_attended(weights, top_k)
        ]

    def of_head(head: int) -> dict[str, Any]:
        repeats = {} if found.repeats is None else found.repeats.values[layer]
        return {
            "head": head,
            "name": found.tag(layer, head),
            "kinds": found.kinds[layer][head],
            "roles": found.roles_of(layer, head),
            "statistics": {name: _finite(values[head]) for name, values in found.snapshot.values[layer].items()},
            "repeated_tokens": {name: _finite(values[head]) for name, values in repeats.items()},
            "attended": attended(pattern[head]),
        }

    return {
        "layer": layer,
        "label": found.maps.labels[layer],
        "site": found.maps.calls[layer].site,
        "attended": attended(pattern.mean(0)),
        "heads": [of_head(head) for head in heads],
    }


def _ranked_as_json(found: ModelReading, one: Ranked) -> dict[str, Any]:
    layer, head, value = one
    return {"layer": layer, "head": head, "name": found.tag(layer, head), "value": value}


def _finite(value: Any) -> float | None:
    return None if math.isnan(float(value)) or math.isinf(float(value)) else float(value)


def _entropy(found: ModelReading, one: Ranked) -> float | None:
    layer, head, _ = one
    return _finite(found.snapshot.values[layer]["entropy"][head])


def tell(console: Console, found: ModelReading, selection: Selection, top_k: int, of_heads: bool) -> None:
    """Print what has been found.

    Args:
        of_heads: list attended tokens for each head of the selection, not for the mean of its last layer.
    """
    maps = found.maps
    n_heads = {maps.n_heads(layer) for layer in range(len(maps))}
    heads = f"{n_heads.pop()} heads" if len(n_heads) == 1 else "heads of various numbers"
    n_tokens = "" if maps.tokens is None else f", {len(maps.tokens)} tokens"
    console.print(Text(f"{found.subject.name}: {len(maps)} layers of {heads}{n_tokens}"))
    for note in found.notes:
        console.print(Text(note, style="italic"))
    for stack in dict.fromkeys(maps.stacks if len(set(maps.stacks)) > 1 else ()):
        layers = [layer for layer, of in enumerate(maps.stacks) if of == stack]
        console.print(Text(f"{layer_name(layers[0])} to {layer_name(layers[-1])}: {stack}"))
    console.print(_head_table(console, found, selection))
    for what, one in found.remarkable.items():
        if one is not None:
            unit = (
                "tokens back or ahead on average" if what == "longest range" else "of the entropy of uniform attention"
            )
            value = f"{one[2]:.1f} {unit}" if what == "longest range" else f"{one[2]:.0%} {unit}"
            console.print(Text(f"{what.capitalize()} head: {head_name(*one[:2])} ({value})"))
    if found.induction:
        best = ", ".join(f"{head_name(*one[:2])} {one[2]:.2f}" for one in found.induction[:RANKED])
        console.print(Text(f"Induction score on repeated random tokens, from the highest: {best}"))
    for layer, chosen in selection if of_heads else selection[-1:]:
        pattern = maps.pattern(layer)
        for title, weights in (
            [(head_name(layer, head), pattern[head]) for head in chosen]
            if of_heads
            else [(f"{layer_name(layer)}, mean over its heads", pattern.mean(0))]
        ):
            console.print(Text(f"Most attended by each token: {title}"))
            console.print(_attended_table(found, layer, weights, top_k))


def tell_comparison(console: Console, comparison: Comparison) -> None:
    """Print what has changed."""
    before, after = comparison.before, comparison.after
    console.print(Text(f"Heads that changed most, from {before.subject.name} to {after.subject.name}"))
    table = Table()
    for column in ("head", "weight that moved", "entropy before", "after"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for one in comparison.most_changed[: 2 * RANKED]:
        entropies = [_number(_entropy(x, one)) for x in (before, after)]
        table.add_row(head_name(*one[:2]), f"{one[2]:.2f}", *entropies)
    console.print(table)
    changes = list(comparison.role_changes())
    for layer, head, lost, taken in changes:
        words = [*(f"no longer {role}" for role in lost), *(f"now {role}" for role in taken)]
        console.print(Text(f"{head_name(layer, head)}: {', '.join(words)}"))
    if not changes:
        console.print("No head has taken on a role, or lost one.")


def _head_table(console: Console, found: ModelReading, selection: Selection) -> Table:
    """As many columns as there is room for."""
    heads = [(layer, head) for layer, chosen in selection for head in chosen]
    title = "Heads"
    if len(heads) > LISTED:
        wanted = set(heads)
        focused = [one[:2] for one in reversed(ranking(found.snapshot, "normalized_entropy")) if one[:2] in wanted]
        title = f"The {LISTED} most focused of {len(heads)} heads (all: --json)"
        heads = sorted((focused or heads)[:LISTED])
    columns = dict(COLUMNS)
    for least in ("distance", "first", "previous", "itself", "largest", ""):
        table = Table(title=title, title_justify="left", padding=(0, 1))
        for column in ("head", *columns):
            table.add_column(column, justify="right" if column in columns else "left", no_wrap=True)
        table.add_column("induction", justify="right", no_wrap=True)
        table.add_column("looks", min_width=WORDS)
        table.add_column("roles", min_width=WORDS)
        for layer, head in heads:
            values = found.snapshot.values[layer]
            induction = None if found.repeats is None else _finite(found.repeats.values[layer]["induction"][head])
            numbers = [_number(_finite(values[statistic][head])) for statistic in columns.values()]
            kinds, roles = ", ".join(found.kinds[layer][head]), ", ".join(found.roles_of(layer, head))
            table.add_row(head_name(layer, head), *numbers, _number(induction), kinds, roles)
        needed = len("L00H00") + len("induction") + sum(map(len, columns)) + 2 * WORDS
        if needed + 3 * len(table.columns) + 1 <= console.width:
            break
        columns.pop(least, None)
    return table


def _attended_table(found: ModelReading, layer: int, weights: Tensor, top_k: int) -> Table:
    queries, keys = found.maps.tokens_of(layer)

    def label(tokens: Sequence[str] | None, position: int) -> str:
        return str(position) if tokens is None else escaped_token(tokens[position])

    table = Table()
    table.add_column("", justify="right")
    table.add_column("token")
    for rank in range(min(top_k, weights.shape[-1])):
        table.add_column(f"{rank + 1}.")
    for query, row in enumerate(top_attended(weights, top_k)):
        cells = [Text(f"{label(keys, key)} {weight:.2f}") for key, weight in row]
        table.add_row(str(query), Text(label(queries, query)), *cells)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
