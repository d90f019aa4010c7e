"""What the package raises and warns of, and how it says each thing once."""

import warnings


class AttentionMonitorError(ValueError):
    """Input that cannot be used; the message says what was got, what is allowed and what to do."""


class NoAttentionError(AttentionMonitorError):
    """A model ran and no attention call was seen."""


class AttentionWarning(UserWarning):
    """Something is wrong with a head."""


class Once:
    """Remember what has been said, so that each thing is said once.

    A thing has a kind beside its name: a statistic and a module may both be called ``attn``.
    """

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def is_new(self, kind: str, name: str) -> bool:
        """Whether this thing has not been asked for before; from now on it has."""
        before = len(self._said)
        self._said.add((kind, name))
        return len(self._said) > before

    def warn(self, kind: str, name: str, message: str, stacklevel: int = 1) -> None:
        """Warn, unless this thing has been said.

        Args:
            kind: kind of the thing, such as ``module``.
            name: name of the thing among its kind.
            message: sentences of the warning.
            stacklevel: frame that the warning points at, counted from the caller of this method as 1.
        """
        if self.is_new(kind, name):
            warnings.warn(message, stacklevel=stacklevel + 1)


def is_whole(x: object, least: int) -> bool:
    """Whether a value is a whole number of at least ``least``; True and False are not numbers here."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= least
