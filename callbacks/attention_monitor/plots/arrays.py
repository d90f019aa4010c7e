"""What pictures are drawn from: arrays and labels as they are given -> checked, as numpy has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import AttentionMonitorError


def as_array(x: Any, name: str, *shapes: str) -> np.ndarray:
    """Return numbers as a numpy array in float64, in which masked elements are NaN.

    Args:
        x: tensor or array, or a list of them.
        name: name of the argument, for the error.
        shapes: allowed shapes, such as "(H, Q, K)".

    Raises:
        AttentionMonitorError: on what is not numbers of one of these shapes.
    """
    try:
        array = np.ma.asarray(_plain(x))
    except ValueError:
        got, todo = "parts of different shapes", "pad them to one shape, or draw each by itself"
    else:
        allowed = [sum(map(str.isalpha, shape)) for shape in shapes]  # numbers of axes
        if array.dtype.kind in "fiub" and array.ndim in allowed:
            return np.ma.filled(array.astype(np.float64), np.nan)
        got = f"{array.dtype} of shape {array.shape}"
        if array.dtype.kind not in "fiub":
            todo = "give an array or a tensor of numbers"
        elif array.ndim > max(allowed):
            todo = "choose along the axes that are too many, as in x[0], or average over them"
        else:
            todo = "add the axes that are missing, as in x[None]"
    raise AttentionMonitorError(f"{name} must be numbers of shape {' or '.join(shapes)}, got {got}; {todo}.")


def _plain(x: Any) -> Any:
    """Return what numpy can read: tensors become arrays, also those in lists."""
    if hasattr(x, "detach"):
        return x.detach().cpu().double().numpy()
    return [_plain(part) for part in x] if isinstance(x, list | tuple) else x


def difference_of(before: Any, after: Any, shape: str) -> np.ndarray:
    """Return after - before, both of one shape such as "(H, Q, K)".

    Raises:
        AttentionMonitorError: on arrays of different shapes, or of another number of axes.
    """
    a, b = as_array(before, "before", shape), as_array(after, "after", shape)
    if a.shape != b.shape:
        raise AttentionMonitorError(
            f"Maps of one shape can be compared, got {a.shape} before and {b.shape} after; "
            "have both models read the same tokens, and choose the same heads."
        )
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is drawn as such
        return b - a


def as_matrix(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return rows (H,) of different lengths as a matrix (L, largest H), NaN where a row has ended."""
    matrix = np.full((len(rows), max(map(len, rows))), np.nan)
    for layer, row in enumerate(rows):
        matrix[layer, : len(row)] = row
    return matrix


def checked_labels(labels: Sequence[Any] | None, n: int, name: str, of: str) -> list[str] | None:
    """Return labels as strings; None if there are none.

    Args:
        labels: a label for each, of any type that can be written.
        n: number of things that are labelled.
        name: name of the argument, for the error.
        of: plural of what is labelled, for the error.

    Raises:
        AttentionMonitorError: on another number of labels, and on a string in the place of a list.
    """
    if labels is None:
        return None
    if isinstance(labels, str) or len(labels) != n:
        raise AttentionMonitorError(
            f"{name} must be a list with a label for each of {n} {of}, got {labels!r}; give {n}, or leave {name} out."
        )
    return [str(label) for label in labels]


def labels_of_map(
    shape: tuple[int, ...], tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    """Return labels of queries and of keys; ``tokens`` label keys too where there are as many."""
    Q, K = shape
    if key_tokens is None and tokens is not None and len(tokens) == K:
        key_tokens = tokens
    return checked_labels(tokens, Q, "tokens", "queries"), checked_labels(key_tokens, K, "key_tokens", "keys")
