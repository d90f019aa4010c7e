"""Snapshots made by hand."""

import numpy as np

from attention_monitor import STATISTICS, Snapshot
from attention_monitor.snapshots import Column, SiteRecord


def column(name, **options):
    """What the registry says of a statistic."""
    stat = STATISTICS[name]
    return Column(name, stat.unit, stat.range, self_attention_only=stat.self_attention_only, **options)


def made_snapshot(step, source, values, labels=None, columns=None, tokens=None, **of_sites):
    """A snapshot of one record for each dict of ``values``.

    Args:
        columns: names of statistics, or columns.
        of_sites: of each record, such as patterns=[...], is_cross=[...].
    """
    labels = [f"L{i:02d}" for i in range(len(values))] if labels is None else list(labels)
    names = {"patterns": "pattern", "rollouts": "rollout"}
    records = [
        SiteRecord(
            label=label,
            path=label,
            values={name: np.array(numbers, dtype=np.float32) for name, numbers in values[i].items()},
            **{names.get(name, name): given[i] for name, given in of_sites.items()},
        )
        for i, label in enumerate(labels)
    ]
    columns = list(values[0]) if columns is None else columns
    columns = [column(one) if isinstance(one, str) else one for one in columns]
    return Snapshot(step, source, records, {one.name: one for one in columns}, tokens)
