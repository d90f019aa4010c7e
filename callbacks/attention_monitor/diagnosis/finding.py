"""What a detector has found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something wrong with one head at one step.

    Attributes:
        step: number of optimizer steps done before it was seen.
        kind: name of the trouble, from the detector.
        head: name of the head, ``L03H05``, or ``encoder.attn/H05`` where layers are not a plain stack.
        detail: the numbers, with the threshold that fired.

    Example:
        >>> Finding(step=200, kind="collapsed attention", head="L03H05", detail="63% of rows, max score 71").head
        'L03H05'
    """

    step: int
    kind: str
    head: str
    detail: str
