"""The options of recorder and callbacks, each in one place: a field with its default, its check and its meaning.

``takes`` gives an entry point the fields of an options class as arguments of its own, so that a new option is a field
here and nothing else.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from .. import probes
from ..diagnosis.roles import HeadRoles
from ..discovery import load_modules
from ..errors import AttentionMonitorError, is_whole
from ..probes.base import Probe
from ..probes.text import TextProbe
from ..statistics.catalogue import DEFAULT_STATISTICS, resolve_statistics
from ..statistics.registry import Statistic

load_modules(probes)  # so that LightningCLI knows each by its name


@dataclass(frozen=True)
class Options:
    """What is looked at, how often, and how much of it.

    Args:
        every_n_steps: optimizer steps from one sample to the next.
        probe: a text whose maps are drawn with its tokens, a ``Probe``, or several; without one that is drawn, the
            maps are those of the batch's first sequence.
        statistics: names from ``attention_monitor.STATISTICS``, which are written.
        max_sequences: samples of the batch, on each rank, that the statistics are taken of, each with all its windows.
        max_tokens: positions that are looked at as queries, over those samples; None: all. Fewer sequences are
            looked at then, and of a sequence that is longer than that, blocks of rows spread over it evenly.
        sites: shell patterns for the module paths to look at, such as ``model.decoder.*``; None: all.

    Raises:
        AttentionMonitorError: on an option that makes no sense.

    Example:
        >>> from attention_monitor import Options, TextProbe
        >>> options = Options(every_n_steps=100, probe=["The cat sat.", TextProbe("On the mat.", name="mat")])
        >>> [probe.name for probe in options.probes]
        ['text', 'mat']
    """

    every_n_steps: int = 50
    probe: str | Probe | Sequence[str | Probe] | None = None
    statistics: Sequence[str] = DEFAULT_STATISTICS
    max_sequences: int = 4
    max_tokens: int | None = None
    sites: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "max_sequences", "max_tokens"):
            value = getattr(self, name)
            if not is_whole(value, 1) and not (name == "max_tokens" and value is None):
                raise AttentionMonitorError(f"{name} must be at least 1, got {value!r}; give a whole number.")
        _require_distinct_probes(self.probes)
        _ = self.resolved_statistics
        sites = self.site_patterns
        if sites is not None and not (sites and all(isinstance(pattern, str) and pattern for pattern in sites)):
            raise AttentionMonitorError(
                f"sites must be patterns for module paths, such as ['decoder.*'], got {self.sites!r}; leave it out for "
                "all."
            )

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether a step is sampled, by the number of optimizer steps done before it."""
        return is_last or step % self.every_n_steps == 0

    @property
    def probes(self) -> list[Probe]:
        """The probes; a text is a ``TextProbe``."""
        given = self.probe
        listed: list[Any] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
        texts = [i for i, probe in enumerate(listed) if isinstance(probe, str)]
        for n, i in enumerate(texts, start=1):
            listed[i] = TextProbe(listed[i], name="text" if n == 1 else f"text_{n}")
        return listed

    @property
    def resolved_statistics(self) -> list[Statistic]:
        """The statistics, from the registry."""
        return resolve_statistics(self.statistics)

    @property
    def site_patterns(self) -> list[Any] | None:
        """The patterns for module paths; None: all paths."""
        if isinstance(self.sites, str):
            return [self.sites]
        return None if self.sites is None else list(self.sites) if isinstance(self.sites, list | tuple) else []


@dataclass(frozen=True, kw_only=True)
class RecorderOptions(Options):
    """The options of ``AttentionRecorder``.

    Args:
        log_to: a folder for TensorBoard's files, a ``SummaryWriter``, a Lightning logger, or a list of these; None:
            nothing is written.
        tokenizer: tokenizer for a probe without one of its own.
        all_ranks: whether the statistics are of the batches of all ranks of ``torch.distributed``'s process group, each
            of which makes a recorder and goes through the same steps; rank zero writes. False: of this process alone.
        roles: roles that heads have had before; None: none.
    """

    log_to: Any = None
    tokenizer: Any = None
    all_ranks: bool = False
    roles: HeadRoles | None = None


class HasOptions:
    """Something that was made with options, of which the interval may be changed later."""

    _options: Options

    @property
    def every_n_steps(self) -> int:
        """Optimizer steps from one sample to the next."""
        return self._options.every_n_steps

    @every_n_steps.setter
    def every_n_steps(self, n: int) -> None:
        self._options = replace(self._options, every_n_steps=n)


def _require_distinct_probes(probes: Sequence[Probe]) -> None:
    """Raise AttentionMonitorError on what is no probe, or cannot be told from another."""
    for probe in probes:
        if not isinstance(probe, Probe):
            raise AttentionMonitorError(f"A probe must be a text or a Probe such as TextProbe, got {probe!r}.")
        if not is_whole(probe.every, 1):
            raise AttentionMonitorError(f"every= of the probe {probe.name!r} must be 1 or more, got {probe.every!r}.")
        if not isinstance(probe.name, str) or not re.fullmatch(r"\w+", probe.name) or probe.name == "live":
            raise AttentionMonitorError(
                f"A probe's name is of letters, digits and underscores, and not 'live', got {probe.name!r}."
            )
    names = [probe.name for probe in probes]
    if len(set(names)) < len(names):
        raise AttentionMonitorError(f"Each probe needs a name of its own, got {names}; give name=.")


P = ParamSpec("P")
Self = TypeVar("Self")
First = TypeVar("First")
Given = TypeVar("Given")


def takes(
    options: Callable[P, Given],
) -> Callable[[Callable[[Self, Given], None]], Callable[Concatenate[Self, P], None]]:
    """Give an ``__init__(self, options)`` the fields of an options class as arguments of its own."""
    return lambda init: _with_arguments_of(options, init)


def takes_after_one(
    options: Callable[P, Given],
) -> Callable[[Callable[[Self, First, Given], None]], Callable[Concatenate[Self, First, P], None]]:
    """Do the same for an ``__init__(self, first, options)``."""
    return lambda init: _with_arguments_of(options, init)


def _with_arguments_of(options: Callable[..., Any], init: Callable[..., None]) -> Callable[..., None]:
    kinds = [kind for kind in inspect.getmro(options) if is_dataclass(kind)]  # type: ignore[arg-type]
    *own, _ = inspect.signature(init).parameters.values()
    parameters = [*own, *inspect.signature(options).parameters.values()]
    signature = inspect.Signature(parameters, return_annotation=None)

    def __init__(*args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            known = ", ".join(list(signature.parameters)[1:])
            raise TypeError(f"{type(args[0]).__name__}: {error}; its arguments are {known}.") from None
        init(*(given.pop(parameter.name) for parameter in own), options(**given))

    # what tools read that show or check arguments: help(), editors at run time, LightningCLI
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    hints = {parameter.name: parameter.annotation for parameter in parameters[1:]}  # without self
    __init__.__annotations__ = hints | {"return": None}
    __init__.__doc__ = "\n\n".join(inspect.cleandoc(kind.__doc__ or "") for kind in reversed(kinds))
    __init__.__module__, __init__.__qualname__ = init.__module__, init.__qualname__
    return __init__
