"""Names of what a model is made of: sites, stacks of layers, layers, heads, tokens. Strings only."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a module path


def final_site(site: str, n_calls: Mapping[str, int]) -> str:
    """The name of a site once all calls are known, for each path how many: a module's only call carries no index."""
    path = site[: site.rindex("[")]
    return path if n_calls[path] == 1 else site


def stacks(sites: Sequence[str], cross: Sequence[bool]) -> list[str]:
    """Which stack of layers each site belongs to, such as ``encoder.block.*.attn``.

    Sites of a stack have paths that differ in numbers only, and are all self-attention or all cross-attention.
    """
    keys = [(_NUMBER.sub("*", site), is_cross) for site, is_cross in zip(sites, cross, strict=True)]
    names = {}
    for key in keys:
        numbers = [_NUMBER.findall(site) for site, other in zip(sites, keys, strict=True) if other == key]
        columns = [set(column) for column in zip(*numbers, strict=True)]
        restored = [column.pop() if len(column) == 1 < len(numbers) else "*" for column in columns]
        first, *rest = key[0].split("*")
        names[key] = first + "".join(number + piece for number, piece in zip(restored, rest, strict=True))
    used = Counter(names.values())
    return [names[key] if used[names[key]] == 1 else f"{names[key]} ({'cross' if key[1] else 'self'})" for key in keys]


def in_order(sites: Sequence[str], cross: Sequence[bool]) -> tuple[list[int], list[str], list[str]]:
    """Sites as they are shown: those of a stack together, otherwise in order of execution.

    Returns:
        order: indices into ``sites``.
        stacks: of each, in that order.
        labels: likewise.
    """
    found = stacks(sites, cross)
    order = sorted(range(len(sites)), key=lambda i: found.index(found[i]))
    return order, [found[i] for i in order], layer_labels([sites[i] for i in order])


def layer_labels(sites: list[str]) -> list[str]:
    """Short labels for sites: ``L00``, ``L01`` ... for a plain stack of layers, the module path otherwise.

    A plain stack is sites whose paths differ in one number only.
    """
    templates = {_NUMBER.sub("*", site) for site in sites}
    numbers = [_NUMBER.findall(site) for site in sites]
    if len(templates) == 1:
        varying = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
        if len(varying) == 1:
            return [f"L{int(number):02d}" for number in varying[0]]
        if len(sites) == 1:
            return [f"L{int(numbers[0][0]):02d}" if len(numbers[0]) == 1 else "L00"]
    return list(sites)


def head_name(label: str, head: int) -> str:
    """``L03H05`` in a plain stack of layers, ``encoder.attn/H05`` elsewhere."""
    separator = "" if label[:1] == "L" and label[1:].isdigit() else "/"
    return f"{label}{separator}H{head:02d}"


MAX_LABEL_WIDTH = 12  # characters of a token; those of wide scripts count twice


def visible(token: str) -> str:
    """A token in at most 12 columns: white space and control characters made visible, nothing interpreted."""
    text = token.replace(" ", "·").replace("\n", "↵").replace("\r", "↵").replace("\t", "→")
    text = "".join(c if _is_visible(c) else "�" for c in text)
    ends = list(accumulate(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))
    if not text or ends[-1] <= MAX_LABEL_WIDTH:
        return text
    return text[: sum(end < MAX_LABEL_WIDTH for end in ends)] + "…"


def _is_visible(c: str) -> bool:
    # combining marks join what stands before them, among them those that emoji are put together with
    return c.isprintable() or unicodedata.category(c) == "Mn"
