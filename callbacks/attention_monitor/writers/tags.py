"""What is written under which name. The only module that makes tags."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..naming import head_name
from ..snapshots import Snapshot
from ..statistics.registry import STATISTICS


@dataclass(frozen=True)
class Column:
    """Values that are written under one tag.

    Attributes:
        value: name in a snapshot's values.
        range: of the values.
        self_attention_only: there are none for cross-attention.
    """

    value: str
    range: str
    self_attention_only: bool


def columns_of(snapshot: Snapshot, statistics: Sequence[str]) -> dict[str, Column]:
    """What is written of a snapshot, by its name in tags."""
    if not any(snapshot.values):
        return {}
    live = snapshot.source == "live"
    prefix, written = ("", statistics) if live else (f"{snapshot.source}_", list(snapshot.values[0]))
    scores = {score.name: score for score in snapshot.scores}
    columns = {}
    for name in written:
        if name not in scores:
            columns[prefix + name] = Column(name, STATISTICS[name].range, STATISTICS[name].self_attention_only)
        elif scores[name].is_written:
            columns[prefix + name] = Column(name, "0..1", True)
    return columns


def scalar_values(snapshot: Snapshot, columns: dict[str, Column]) -> dict[str, float]:
    """tag -> value of every head, the mean over heads and over those of each stack; NaN is left out."""
    tagged = {}
    for name, column in columns.items():
        for label, values in zip(snapshot.labels, snapshot.values, strict=True):
            for head, value in enumerate(values[column.value].tolist()):
                tagged[f"attention_{name}/{head_name(label, head)}"] = value
        tagged[f"attention_{name}/mean"] = snapshot.mean(column.value)
        stacks = list(dict.fromkeys(snapshot.stacks))
        if len(stacks) > 1:
            tagged |= {f"attention_{name}/mean/{stack}": snapshot.mean(column.value, stack) for stack in stacks}
    for name, numbers in snapshot.layers.items():
        labelled = zip(snapshot.labels, numbers, strict=True)
        tagged |= {f"attention_{snapshot.source}_{name}/{label}": number for label, number in labelled}
    return {tag: value for tag, value in tagged.items() if not math.isnan(value)}


def custom_scalars_layout(snapshot: Snapshot, columns: dict[str, Column]) -> dict[str, dict[str, list[str]]]:
    """For TensorBoard's Custom Scalars tab: name -> layer -> the tags of its heads, as regular expressions."""

    def tag(name: str, label: str, head: int) -> str:
        return f"^{re.escape(f'attention_{name}/{head_name(label, head)}')}$"

    return {
        name: {
            label: [tag(name, label, head) for head in range(len(values[column.value]))]
            for label, values in zip(snapshot.labels, snapshot.values, strict=True)
        }
        for name, column in columns.items()
    }
