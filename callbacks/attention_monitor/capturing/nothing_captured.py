"""What to say of a model in which no attention call was captured."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ..naming import listed
from .running_modules import looks_like_attention, module_names

_MOST_LISTED = 5


def explain_left_out(model: nn.Module, only: Sequence[str], left_out: Collection[str]) -> str:
    """Explain that patterns match none of the attention modules that there are."""
    return (
        f"No attention call was looked at in {type(model).__name__}: sites={list(only)} "
        f"matches none of those seen, {listed(sorted(left_out), _MOST_LISTED)}."
    )


def explain_refused(model: nn.Module, refused: Mapping[str, str]) -> str:
    """Explain that all attention there is was refused: its heads are split over processes."""
    paths = {reason: [path for path, of in refused.items() if of == reason] for reason in refused.values()}
    reasons = "; ".join(f"in {listed(of, _MOST_LISTED)} {reason}" for reason, of in paths.items())
    return (
        f"No attention call can be looked at in {type(model).__name__}: {reasons}; watch a run without tensor "
        "parallelism, or leave the monitor out."
    )


def explain_nothing_read(model: nn.Module, not_understood: Mapping[str, str], readable: Sequence[str]) -> str:
    """Explain what was seen, what is understood, and which ways out there are.

    Args:
        model: the model that was run.
        not_understood: module path -> reason why a call of it was not understood.
        readable: what is understood, in words.
    """
    name_of_model = type(model).__name__
    if not_understood:
        reasons = [f"{path} ({reason})" for path, reason in not_understood.items()]
        seen = f"calls were seen but not understood: {listed(reasons, _MOST_LISTED)}"
    else:
        names = [
            f"{name or name_of_model} ({type(module).__name__})"
            for module, name in module_names(model).items()
            if looks_like_attention(module)
        ]
        seen = f"modules that look like attention are {listed(names, _MOST_LISTED)}" if names else ""
        seen = seen or "no module in it looks like attention"
    *others, last = readable
    return (
        f"No attention call was seen in {name_of_model}: {seen}. What is understood is {', '.join(others)}, and "
        f"{last}. Use one of them, called by the model's own modules outside TorchScript; or teach the package "
        "another with a Recogniser (attention_monitor.Recogniser); or leave the monitor out."
    )
