"""Products of tensors by their axes: which axis is contracted, which belongs to one factor alone, which to both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .axes import Axis, Layout, Source, SourceKind, Tag, axis_of, fixed_in, is_features, sources_of, tag_of, untagged
from .origin import Origin


@dataclass(frozen=True, eq=False)
class Factor:
    """One of the tensors that are multiplied.

    Attributes:
        origin: where it comes from.
        layout: what its axes are made of.
        letters: name of each axis; what is multiplied entry by entry, or summed, has the same name in both factors.
        weight: what identifies it, where it is a weight.
    """

    origin: Origin
    layout: Layout
    letters: str
    weight: Any = None

    def axis(self, letter: str) -> Axis:
        """Return the axis of a name; empty where it has none."""
        at = self.letters.find(letter)
        return self.layout.axes[at] if at >= 0 else ()

    def axes(self, letters: Sequence[str]) -> Axis:
        """Return the parts of some axes, one after the other."""
        return tuple(part for letter in letters for part in self.axis(letter))


@dataclass(eq=False)
class Product:
    """A product of two tensors of data.

    Attributes:
        factors: the two.
        output: names of the axes of the result.
    """

    factors: tuple[Factor, Factor]
    output: str

    def free(self, side: int) -> list[str]:
        """List the axes of the result that one factor alone has."""
        mine, other = self.factors[side], self.factors[1 - side]
        return [letter for letter in self.output if letter in mine.letters and not _has(other, letter)]

    @property
    def shared(self) -> list[str]:
        """Axes of the result that both factors have."""
        first, second = self.factors
        return [letter for letter in self.output if _has(first, letter) and _has(second, letter)]

    @property
    def contracted(self) -> list[str]:
        """Axes that were summed over."""
        first, second = self.factors
        return [letter for letter in first.letters if letter in second.letters and letter not in self.output]

    def is_over(self, side: int) -> Literal["tokens", "channels"] | None:
        """Tell what its scores are between, when those of one factor's axis compete; None: it is no scores at all.

        Scores of tokens sum over features. A sum over tokens is either one for channels, as of cross-covariance
        attention, or what weights and values, or keys and values of linear attention, make.

        Args:
            side: the factor whose axis the softmax is over.
        """
        rows = self.factors[1 - side].axes(self.free(1 - side))
        keys = self.factors[side].axes(self.free(side))
        summed = [factor.axes(self.contracted) for factor in self.factors]
        places = {part.source for axis in summed for part in axis if part.source.kind is SourceKind.PLACES}
        if places & {part.source for part in (*rows, *keys) if part.source.kind is SourceKind.PLACES}:
            return None
        over_places = bool(places) and not any(is_features(axis) for axis in summed)
        of_features = is_features(rows), is_features(keys)
        if all(of_features):
            parts_of_one = {part.source for axis in summed for part in axis} & {part.source for part in rows}
            return "channels" if over_places or parts_of_one else "tokens"
        return None if over_places and any(of_features) else "tokens"


def _has(factor: Factor, letter: str) -> bool:
    """Whether a factor has an axis that is not broadcast."""
    return bool(factor.axis(letter))


def contract(factors: Sequence[Factor], output: str, sizes: dict[str, int]) -> tuple[Layout, Product | None]:
    """Return what a product is made of, and the product where it is one of data.

    Args:
        factors: what is multiplied.
        output: names of the result's axes.
        sizes: size of each axis of the result.
    """
    data = [factor for factor in factors if factor.origin.is_data]
    pair = data if len(data) == 2 else list(factors) if len(factors) == 2 and factors[-1].origin.is_data else []
    product = Product((pair[0], pair[1]), output) if pair else None
    if product is not None and not product.contracted:
        product = None
    fixed = fixed_in([factor.layout for factor in data]) if data else ()
    summed = [part for factor in data for part in factor.axes([x for x in factor.letters if x not in output])]
    axes: list[Axis] = []
    for letter in output:
        size = sizes[letter]
        if size == 1:
            axes.append(())
            continue
        owners = [factor for factor in data if _has(factor, letter)]
        if owners:
            axis = best_axis([factor.axis(letter) for factor in owners])
            axis = axis if product is None else untagged(axis)
        elif product is not None:  # learned queries
            axis = next((untagged(factor.axis(letter)) for factor in factors if _has(factor, letter)), ())
        else:
            weight = next((factor for factor in factors if letter in factor.letters), None)
            key = None if weight is None else (weight.weight, weight.letters.index(letter))
            axis = axis_of(Source(size, SourceKind.FEATURES, sources_of(summed), key))
        if product is not None:
            sides = [side for side in (0, 1) if letter in product.free(side)]
            if sides:
                tag = Tag(product, sides[0])
                axis = tuple([part._replace(tag=tag) for part in axis])
        axes.append(axis or axis_of(Source(size, SourceKind.UNSEEN)))
    return Layout(tuple(axes), fixed), product


_RANK = {SourceKind.FEATURES: 0, SourceKind.PLACES: 0, SourceKind.UNSEEN: 1, SourceKind.COPIES: 2}


def best_axis(axes: Sequence[Axis]) -> Axis:
    """Return the axis that says most, of several that are multiplied or added entry by entry; the first of equals."""
    if len(axes) == 1:
        return axes[0]
    return min(axes, key=_how_little_it_says)


def _how_little_it_says(axis: Axis) -> tuple[int, int]:
    if not axis:
        return 3, 0
    of_attention = 0 if any(part.source.is_columns for part in axis) else 1 if tag_of(axis) is not None else 2
    return of_attention, max(_RANK[part.source.kind] for part in axis)
