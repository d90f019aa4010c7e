"""Writes docs/statistics.md from the registry: ``python docs/make_statistics.py``."""

import inspect
from pathlib import Path

from attention_monitor import STATISTICS
from attention_monitor.statistics.catalogue import DEFAULT_STATISTICS
from attention_monitor.statistics.registry import Statistic
from attention_monitor.statistics.row_blocks import RowBlock

PAGE = Path(__file__).with_name("statistics.md")

HEAD = """\
# Statistics

*Made from the code by `python docs/make_statistics.py`.*

Each is a number for every head. `s_ij` is the score of query row i and key j as the model used it: scaled, soft-capped,
biased where it does that. `p_ij` is its softmax over j, before dropout; `n_i` is the number of keys that row i may see.
A row gives a number, and a head's value is the mean over the rows that count (for `max_score` the maximum), over
sequences and ranks. If no row counts there is no value. Values are of one step, not running ones, and exact up to the
rounding of float32, in which half precision is accumulated too: never of pooled or quantised maps.
"""


def section(stat: Statistic) -> str:
    first, _, rest = inspect.getdoc(stat.function).partition("\n\n")  # type: ignore[union-attr]
    counted = inspect.getdoc(getattr(RowBlock, stat.rows)) or ""
    facts = [
        f"unit: {stat.unit}",
        f"range: {stat.range}",
        f"rows that count: {counted.split(':')[0].rstrip('.').lower()}",
    ]
    if stat.reduce == "max":
        facts.append("the largest over rows, not the mean")
    if stat.self_attention_only:
        facts.append("self-attention only")
    facts.append("recorded by default" if stat.name in DEFAULT_STATISTICS else "by name")
    text = [f"## `{stat.name}`", first.replace("\n", " "), "; ".join(facts) + "."]
    return "\n\n".join([*text, *([rest.replace("\n", " ")] if rest else [])])


def page() -> str:
    own = [stat for stat in STATISTICS.values() if stat.function.__module__ == "attention_monitor.statistics.catalogue"]
    in_order = sorted(own, key=lambda stat: stat.name not in DEFAULT_STATISTICS)
    return "\n\n".join([HEAD.rstrip(), *map(section, in_order)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
