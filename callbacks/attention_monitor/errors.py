"""What the package raises for input it cannot use."""


class AttentionMonitorError(ValueError):
    """The message says what was got, what is allowed and what to do."""


def is_whole(x: object, least: int) -> bool:
    """Whether an option is a whole number that is large enough; True and False are none."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


class NoAttentionError(AttentionMonitorError):
    """A model ran and no attention call was seen."""


class AttentionWarning(UserWarning):
    """Something is wrong with a head."""
