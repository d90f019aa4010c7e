"""Where one tensor comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

from .axes import Layout


@dataclass(slots=True, eq=False)
class Origin:
    """How a tensor came about.

    Attributes:
        serial: number that grows with time; 0 for a tensor that was there before anything was seen.
        parents: origins of the tensors it was computed from.
        is_data: whether it depends on more than one weight: on data, or on several weights in turn.
        is_known: whether it was made by a function that was seen, or is a weight.
        is_projection: whether it is a product with a weight.
        shape: shape of the tensor.
        layout: what its axes are made of; None: nothing is known of it yet.
        factors: origins of the two tensors that were multiplied entry by entry, and what their axes are made of; the
            sum of the entries is a product.
        mixed: serial of the newest attention that it depends on; 0 for none.
    """

    serial: int
    parents: tuple["Origin", ...] = ()
    is_data: bool = True
    is_known: bool = True
    is_projection: bool = False
    shape: Sequence[int] = ()
    layout: Layout | None = None
    factors: "tuple[tuple[Origin, Layout], ...] | None" = None
    mixed: int = 0
