"""Names of what a model is made of: sites, stacks of layers, layers, heads, tokens. Strings only."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a module path


def final_site(site: str, n_calls: Mapping[str, int]) -> str:
    """Name a site once all calls are known: a module's only call carries no index.

    Args:
        site: path of a module with the number of its call, such as ``h.0.attn[0]``.
        n_calls: path of a module -> number of its calls.
    """
    path = site[: site.rindex("[")]
    return path if n_calls[path] == 1 else site


def stacks(sites: Sequence[str], cross: Sequence[bool]) -> list[str]:
    """Name the stack of layers that each site belongs to, such as ``encoder.block.*.attn``.

    Sites of a stack have paths that differ in numbers only, and are all self-attention or all cross-attention.

    Args:
        sites: paths of the sites.
        cross: whether each is cross-attention.

    Returns:
        stacks: name for each site.
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


def in_order(
    sites: Sequence[str], cross: Sequence[bool], modules: Collection[str] = ()
) -> tuple[list[int], list[str], list[str]]:
    """Put sites into the order in which they are shown: those of a stack together, otherwise as they were called.

    Args:
        sites: paths of the sites, in order of execution.
        cross: whether each is cross-attention.
        modules: paths of all modules of the model.

    Returns:
        order: indices into ``sites``.
        stacks: stack of each site, in that order.
        labels: label of each site, in that order.
    """
    found = stacks(sites, cross)
    order = sorted(range(len(sites)), key=lambda i: found.index(found[i]))
    return order, [found[i] for i in order], layer_labels([sites[i] for i in order], modules)


def layer_labels(sites: list[str], modules: Collection[str] = ()) -> list[str]:
    """Label sites: ``L00``, ``L01`` ... in a plain stack, where paths differ in one number; elsewhere by their paths.

    Layers are counted from 0 in the order of that number, whatever it is: a model may have attention in few of its
    modules, or something else before the first. Where the model's modules are given, these are counted, so that a layer
    has its number also in a step that skips others.

    Args:
        sites: paths of the sites.
        modules: paths of all modules of the model, by which layers are counted.

    Example:
        >>> layer_labels(["h.2.attn", "h.5.attn"]), layer_labels(["encoder.attn", "decoder.attn"])
        (['L00', 'L01'], ['encoder.attn', 'decoder.attn'])
    """
    templates = {_NUMBER.sub("*", site) for site in sites}
    if len(templates) == 1:
        beside = [path for path in modules if _NUMBER.sub("*", path) in templates and path not in sites]
        columns = list(zip(*(map(int, _NUMBER.findall(site)) for site in [*sites, *beside]), strict=True))
        n = len(sites)
        if len(sites) == 1 and sum(len(set(column)) > 1 for column in columns) != 1:
            return [layer_name(0)]
        varying = [column for column in columns if len(set(column)) > 1]
        if len(varying) == 1 and len(set(varying[0])) == len(varying[0]):  # 01 and 1 are two modules
            counted = sorted(varying[0])
            return [layer_name(counted.index(number)) for number in varying[0][:n]]
    return list(sites)


def layer_name(layer: int) -> str:
    """Name a layer of a plain stack.

    Example:
        >>> layer_name(3)
        'L03'
    """
    return f"L{layer:02d}"


def head_name(layer: int | str, head: int) -> str:
    """Name a head, the same for people, tags and JSON.

    Args:
        layer: number of the layer, or its label.
        head: number of the head in its layer.

    Example:
        >>> head_name(3, 5), head_name("L03", 5), head_name("encoder.attn", 5)
        ('L03H05', 'L03H05', 'encoder.attn/H05')
    """
    label = layer_name(layer) if isinstance(layer, int) else layer
    separator = "" if label[:1] == "L" and label[1:].isdigit() else "/"
    return f"{label}{separator}H{head:02d}"


def head_heading(head: int) -> str:
    """Head a column, or a map, among those of one layer: ``H5``."""
    return f"H{head}"


def listed(names: Sequence[str], most: int) -> str:
    """List the first names, and say how many more there are.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


MAX_TOKEN_WIDTH = 12  # columns of a token's label; characters of wide scripts take two


def escaped_token(token: str) -> str:
    """Show a token in at most 12 columns: white space and control characters made visible, nothing interpreted.

    Example:
        >>> escaped_token(" cat"), escaped_token("\\n")
        ('·cat', '↵')
    """
    text = token.replace(" ", "·").replace("\n", "↵").replace("\r", "↵").replace("\t", "→")
    text = "".join(c if _is_visible(c) else "�" for c in text)
    ends = list(accumulate(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))
    if not text or ends[-1] <= MAX_TOKEN_WIDTH:
        return text
    return text[: sum(end < MAX_TOKEN_WIDTH for end in ends)] + "…"


def _is_visible(c: str) -> bool:
    # combining marks join what stands before them, among them those that emoji are put together with
    return c.isprintable() or unicodedata.category(c) == "Mn"
