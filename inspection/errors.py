"""What is said of errors that others raise."""

import pickle


def first_line(error: BaseException) -> str:
    """Name an error, and say the first line of what it says."""
    if isinstance(error, pickle.UnpicklingError):  # torch goes on to tell how to run the code
        return "it is damaged, or holds more than tensors and plain values, and reading that could run code"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": .")
