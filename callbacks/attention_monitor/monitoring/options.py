"""The options of recorder and callbacks."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import AttentionMonitorError, is_whole
from ..probes.base import EncodedProbe, Probe
from ..probes.text import TextProbe
from ..statistics.catalogue import resolve_statistics


def check_options(
    every_n_steps: int,
    probe: str | Probe | Sequence[str | Probe] | None,
    statistics: Sequence[str],
    max_sequences: int,
    max_tokens: int | None,
    sites: str | Sequence[str] | None,
) -> dict[str, Any]:
    """The options that recorder and callbacks share, as keyword arguments for ``AttentionRecorder``.

    Raises:
        AttentionMonitorError: on one that makes no sense.
    """
    whole = {"every_n_steps": every_n_steps, "max_sequences": max_sequences}
    for name, value in (whole if max_tokens is None else whole | {"max_tokens": max_tokens}).items():
        if not is_whole(value, 1):
            raise AttentionMonitorError(f"{name} must be at least 1, got {value!r}; give a whole number.")
    probes = [] if probe is None else list(probe) if isinstance(probe, list | tuple) else [probe]
    checked: list[Probe] = []
    n_texts = 0
    for one in probes:
        if isinstance(one, str):
            n_texts += 1
            one = TextProbe(one, name="text" if n_texts == 1 else f"text_{n_texts}")
        if not isinstance(one, Probe):
            raise AttentionMonitorError(f"A probe must be a text or a Probe such as TextProbe, got {one!r}.")
        checked.append(one)
        if not is_whole(one.every, 1):
            raise AttentionMonitorError(f"every= of the probe {one.name!r} must be 1 or more, got {one.every!r}.")
        if not isinstance(one.name, str) or not re.fullmatch(r"\w+", one.name) or one.name == "live":
            raise AttentionMonitorError(
                f"A probe's name is of letters, digits and underscores, and not 'live', got {one.name!r}."
            )
    names = [one.name for one in checked]
    if len(set(names)) < len(names):
        raise AttentionMonitorError(f"Each probe needs a name of its own, got {names}; give name=.")
    patterns = [sites] if isinstance(sites, str) else sites
    if patterns is not None and not (
        isinstance(patterns, list | tuple) and patterns and all(isinstance(p, str) and p for p in patterns)
    ):
        raise AttentionMonitorError(
            f"sites must be patterns for module paths, such as ['decoder.*'], got {sites!r}; leave it out for all."
        )
    return {
        "every_n_steps": every_n_steps,
        "probe": checked,
        "statistics": [stat.name for stat in resolve_statistics(statistics)],
        "max_sequences": max_sequences,
        "max_tokens": max_tokens,
        "sites": None if patterns is None else list(patterns),
    }


def check_model(model: Any, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise AttentionMonitorError(f"{what} a torch.nn.Module, got {model!r}.")


def check_tags(probes: Sequence[EncodedProbe], statistics: Sequence[str]) -> None:
    """Raise AttentionMonitorError when two things would be written under one name."""
    names = list(statistics)
    for probe in probes:
        scores = [score.name for score in probe.scores]
        both = [*scores, *(statistics if probe.with_statistics else ())]
        names += [f"{probe.name}_{name}" for name in both]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AttentionMonitorError(
            f"More than one statistic or probe would be written as attention_{twice[0]}; give the probe another name."
        )
