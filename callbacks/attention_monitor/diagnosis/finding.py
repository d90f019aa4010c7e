"""What a detector has found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something wrong with one head at one step.

    Attributes:
        step: optimizer steps done before it was seen.
        kind: the detector's name for it.
        head: e.g. ``L03H05``, or ``encoder.attn/H05`` where layers are not a plain stack.
        detail: the numbers, with the threshold that fired.
    """

    step: int
    kind: str
    head: str
    detail: str
