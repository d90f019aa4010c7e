"""What is written under which name. The only module that makes tags.

attention_{statistic}/L00H03     one head
attention_{statistic}/mean       mean over heads; of each stack of layers, where there are several, mean/{stack}
attention_heads/{statistic}      layer x head matrix
attention_maps/{source}          every map in one picture
attention_{probe}_{score}/...    what a probe scores heads by, likewise
attention_{probe}_{name}/L00     one layer
attention_rollout/{probe}        attention rollout up to each layer, a picture
attention_roles                  which heads have a role, and since when
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import AttentionMonitorError
from ..naming import head_name
from ..snapshots import Column, Snapshot

ROLES = "attention_roles"


def written_name(source: str, name: str) -> str:
    """Name what is written of a source: its own names for training, with the probe's name before them for a probe."""
    return name if source == "live" else f"{source}_{name}"


def of_head(name: str, label: str, head: int) -> str:
    """Tag a number of one head."""
    return f"attention_{name}/{head_name(label, head)}"


def of_mean(name: str, stack: str | None = None) -> str:
    """Tag a mean over all heads, or over those of a stack."""
    return f"attention_{name}/mean" if stack is None else f"attention_{name}/mean/{stack}"


def of_layer(name: str, label: str) -> str:
    """Tag a number of one layer."""
    return f"attention_{name}/{label}"


def of_matrix(name: str) -> str:
    """Tag the picture with one number of every head."""
    return f"attention_heads/{name}"


def of_maps(source: str) -> str:
    """Tag the picture with every map."""
    return f"attention_maps/{source}"


def of_rollout(source: str) -> str:
    """Tag the picture of attention rollout."""
    return f"attention_rollout/{source}"


def require_distinct(names: Mapping[str, Sequence[str]]) -> None:
    """Do nothing if all that is to be written has a name of its own.

    Args:
        names: source -> names of its columns.

    Raises:
        AttentionMonitorError: when two things would be written under one name.
    """
    counts = Counter(written_name(source, name) for source, columns in names.items() for name in columns)
    for name, n in sorted(counts.items()):
        if n > 1:
            raise AttentionMonitorError(
                f"More than one statistic or probe would be written as attention_{name}; give the probe another name."
            )


def written_columns(snapshot: Snapshot) -> dict[str, Column]:
    """Select the columns that loggers get, by their names in tags."""
    return {
        written_name(snapshot.source, column.name): column for column in snapshot.columns.values() if column.is_written
    }


def scalar_values(snapshot: Snapshot) -> dict[str, float]:
    """Collect tag -> number: of every head, means over heads and over those of each stack; NaN is left out."""
    tagged = {}
    stacks = list(dict.fromkeys(snapshot.stacks))
    for name, column in written_columns(snapshot).items():
        for record, head, value in snapshot.heads(column.name):
            tagged[of_head(name, record.label, head)] = value
        tagged[of_mean(name)] = snapshot.mean(column.name)
        if len(stacks) > 1:
            tagged |= {of_mean(name, stack): snapshot.mean(column.name, stack) for stack in stacks}
    for record in snapshot.records:
        for name, number in record.layer_values.items():
            tagged[of_layer(written_name(snapshot.source, name), record.label)] = number
    return {tag: value for tag, value in tagged.items() if not math.isnan(value)}


def custom_scalars_layout(snapshot: Snapshot) -> dict[str, dict[str, list[str]]]:
    """Lay out TensorBoard's Custom Scalars tab: name -> layer -> the tags of its heads, as regular expressions."""
    return {
        name: {
            record.label: [
                f"^{re.escape(of_head(name, record.label, head))}$" for head in range(len(record.values[column.name]))
            ]
            for record in snapshot.records
        }
        for name, column in written_columns(snapshot).items()
    }
