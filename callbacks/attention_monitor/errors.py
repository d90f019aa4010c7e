"""What the package raises for input it cannot use."""


class AttentionMonitorError(ValueError):
    """The message says what was got, what is allowed and what to do."""
