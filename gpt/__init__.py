"""The model to watch: a small GPT, its data and its tokenizers. Knows nothing of the monitor."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was got and what to do instead."""
