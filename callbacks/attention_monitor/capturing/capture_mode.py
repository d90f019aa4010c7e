"""A running model -> one ``AttentionCall`` for each attention call.

A ``TorchFunctionMode`` sees the functions a model calls, whoever wrote it; hooks common to all modules tell which one
is calling. Both are there only while a capture lasts, and neither is in the model.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from ..discovery import load_modules
from ..errors import NoAttentionError, Once
from ..naming import final_site
from . import recognisers
from .attention_call import AttentionCall, NotUnderstoodError
from .loops import Loops
from .nothing_captured import explain_left_out, explain_nothing_read, explain_refused
from .provenance import Origins
from .recognisers.base import RECOGNISERS, FunctionCall, Recogniser, name_of
from .roles import said_heads
from .running_modules import RunningModules, looks_like_attention, may_take_fast_path
from .sharding import ProjectionWeights, SplitProjections, may_be_sharded

load_modules(recognisers)


class Capture(TorchFunctionMode):
    """Context in which every attention call under ``model`` is handed to ``on_call`` as it happens.

    ``on_call`` runs without gradients, outside autocast, and its failures are warned about, never raised into the
    model's forward. A module's calls are numbered within one outermost forward.

    Args:
        model: model whose calls are looked at.
        on_call: function that is handed each call.
        only: patterns as of a shell, such as ``decoder.*``; a call is looked at when its module path, with or without
            ``[i]``, matches one. None: all are.
        once: what has been said already, when several captures warn of a module only once between them.
        sample_weights: whether weights that make queries and keys are sampled, for processes to compare.

    Attributes:
        left_out: module paths that match none of ``only``.
        not_understood: module path -> reason why a call of it was not understood.
        weights: module path -> bytes of some numbers of the weights that make its queries and keys.
        refused: module path -> reason why a call of it was understood, and would give wrong numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], None],
        only: Sequence[str] | None = None,
        once: Once | None = None,
        sample_weights: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.on_call, self.only = model, on_call, only
        self._n_calls: dict[str, list[int]] = {}  # without gradients, and with them
        self.left_out: set[str] = set()
        self.not_understood: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.weights: dict[str, bytes] = {}
        self._weights = ProjectionWeights() if sample_weights else None
        self._once = Once() if once is None else once
        self._modules = RunningModules(model)
        self._loops = Loops(self._emit, self._not_understood)
        self._origins = Origins()
        self._projections: SplitProjections | None = None
        instances = {kind: kind() for kind in RECOGNISERS.values()}
        self._instances: list[Recogniser] = list(instances.values())
        self._recognisers = {function: instances[kind] for function, kind in RECOGNISERS.items()}
        self._unseen: nn.Module | None = None  # is on its fast path
        self._exit = ExitStack()

    def __enter__(self) -> "Capture":
        with ExitStack() as stack:
            stack.enter_context(self._modules.observed_by(self))
            stack.enter_context(_running(self))
            self._projections = SplitProjections() if may_be_sharded() else None
            self._forget_forward()
            self._switch_on()
            stack.callback(self._switch_off)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()
        self.forward_ends()
        self._forget_forward()

    def _switch_on(self) -> None:
        super().__enter__()

    def _switch_off(self) -> None:
        """Take this mode from the stack, wherever it is: others may have been left on above it, or it may be off."""
        above: list[Any] = []
        while self in _get_current_function_mode_stack():
            above.append(_pop_mode())
        for mode in reversed(above[:-1]):
            _push_mode(mode)

    def _forget_forward(self) -> None:
        self._modules.forget()
        self._origins = Origins(self.model.buffers())

    # What the running modules tell

    def next_serial(self) -> int:
        """Draw a serial number for what is made from now on."""
        return self._origins.next_serial()

    def forward_begins(self) -> None:
        """Forget how the tensors of earlier forwards were made."""
        self._origins.forget_ancestry()
        if self._projections is not None:
            self._projections.forget()
        if self._weights is not None:
            self._weights.forget()

    def module_begins(self, module: nn.Module) -> None:
        """Leave a module of torch's its fast path, which it would not take while a function mode is on."""
        if self._unseen is None and may_take_fast_path(module) and _get_current_function_mode_stack() == [self]:
            self._unseen = module
            self._switch_off()

    def module_ends(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Run a module that has taken its fast path once more, so that its calls are seen; its result stays."""
        if self._unseen is module:
            self._switch_on()
            if kwargs is not None:  # it did not fail
                self._run_slow_path(module, args, kwargs)
            self._unseen = None

    def forward_ends(self) -> None:
        """Let the recognisers say what in this forward they have not understood."""
        self._end_loops()
        understood = {path for path, _ in self._modules.calls_in_forward}
        for recogniser in self._instances:
            try:
                found = list(recogniser.at_end_of_forward(understood))
            except Exception as error:  # the model's own forward must go on
                found = [(self._modules.path, f"{type(error).__name__}: {error}")]
            for path, reason in found:
                self._not_understood(path, reason)

    def _end_loops(self) -> None:
        paused, self._modules.paused = self._modules.paused, True  # what the observer calls is none of the model's
        try:
            self._loops.end()
        except Exception as error:  # the model's own forward must go on
            self._not_understood(self._modules.path, f"{type(error).__name__}: {error}")
        finally:
            self._modules.paused = paused

    def _run_slow_path(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            with torch.no_grad():
                module.forward(*args, **kwargs)
        except Exception as error:
            self._not_understood(self._modules.path, f"{type(error).__name__}: {error}")

    # What the functions tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recogniser = self._recogniser_of(func)
        result = func(*args, **kwargs) if recogniser is None else recogniser.around(func, args, kwargs)
        # In a backward pass, activation checkpointing repeats calls that were seen: ignore those.
        if self._modules.is_followed and torch._C._current_graph_task_id() == -1:
            try:
                self._origins.record(func, args, kwargs, result, inside=self._modules.is_inside)
                if self._projections is not None:
                    self._projections.note(func, args, kwargs, result, self._origins)
                if self._weights is not None:
                    self._weights.note(func, args, kwargs, result, self._origins)
                if recogniser is not None:
                    call = FunctionCall(func, args, kwargs, result, self._modules.frames, self._origins)
                    self._read(recogniser, call)
            except Exception as error:  # the model's own forward must go on
                self._not_understood(self._modules.path, f"{type(error).__name__}: {error}")
        return result

    def _recogniser_of(self, func: Any) -> Recogniser | None:
        try:
            return self._recognisers.get(name_of(func))
        except TypeError:  # an object that cannot be hashed, of a library's own
            return None

    def _read(self, recogniser: Recogniser, function_call: FunctionCall) -> None:
        path = self._modules.path
        try:
            with torch.no_grad():
                call = recogniser.read(function_call)
        except NotUnderstoodError as reason:
            self._not_understood(path, str(reason))
            return
        if call is None:
            return
        self._origins.note_attention(function_call.result)
        if torch._C._functorch.is_batchedtensor(call.query_or_scores):
            self._not_understood(path, "it runs inside torch.vmap")
            return
        if self._projections is not None and (split := self._projections.reason(call, self._modules.frames)):
            self.refused.setdefault(path, split)
            self._warn(path, f"{split}; it is left out: watch a run without tensor parallelism to see it")
            return
        if self._weights is not None and path not in self.weights:  # a process may call a module more often
            self.weights[path] = self._weights.sample(call, self._modules.frames)
        frame = self._modules.frames[-1].start
        named = [frame.module for frame in self._modules.frames[-2:] if looks_like_attention(frame.module)]
        notes = path, said_heads(reversed(named)), self._modules.is_inside
        call = replace(call, with_gradients=torch.is_grad_enabled())
        self._loops.add(path, frame, function_call.said_heads, call, function_call.clue, notes)

    def _emit(self, path: str, call: AttentionCall, notes: tuple[str, int | None, bool]) -> None:
        """Hand a whole call to the observer."""
        of_module, said, inside = notes
        if said is not None and said != call.shape[1] and of_module == path:
            self._say(
                path,
                f"attention_monitor shows {call.shape[1]} heads in {path}, whose module says that it has {said}"
                + (f": {call.assumed}." if call.assumed else "."),
            )
        index = self._modules.count_call(path, call.with_gradients, inside)
        if self.only is not None and not any(
            fnmatchcase(name, pattern) for name in (path, f"{path}[{index}]") for pattern in self.only
        ):
            self.left_out.add(path)
            return
        counted = self._n_calls.setdefault(path, [0, 0])
        counted[call.with_gradients] = max(counted[call.with_gradients], index + 1)
        try:
            with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
                self.on_call(replace(call, site=f"{path}[{index}]"))
        except Exception as error:  # the model's own forward must go on
            self._not_understood(path, f"{type(error).__name__}: {error}")

    def _not_understood(self, path: str, reason: str) -> None:
        self.not_understood.setdefault(path, reason)
        self._warn(path, reason)

    def _warn(self, path: str, reason: str) -> None:
        self._say(path, f"attention_monitor could not look at a call of {path}: {reason}")

    def _say(self, path: str, message: str) -> None:
        self._once.warn("module", path, message, stacklevel=5)

    # What is asked afterwards

    @property
    def modules(self) -> Collection[str]:
        """Paths of all modules of the model."""
        return self._modules.paths

    @property
    def sites(self) -> dict[str, int]:
        """Module path -> most calls seen in one forward, in the order of execution.

        Where some were made with gradients, those without are not counted.
        """
        return {path: with_gradients or without for path, (without, with_gradients) in self._n_calls.items()}

    @property
    def ran_whole(self) -> bool:
        """Whether every part of the model that has parameters has been run."""
        return self._modules.ran_whole

    def explain_nothing(self) -> str:
        """Explain, of a model in which nothing was captured, what was seen and which ways out there are."""
        if self.left_out:
            return explain_left_out(self.model, self.only or (), self.left_out)
        if self.refused and not self.not_understood:
            return explain_refused(self.model, self.refused)
        readable = [recogniser.reads for recogniser in self._instances]
        return explain_nothing_read(self.model, self.not_understood, readable)


_captures: list[Capture] = []  # that are running


_stance = ExitStack()


@contextmanager
def _running(capture: Capture) -> Iterator[None]:
    """Let compiled modules run eagerly, and keep their compiled code, while any capture runs.

    Captures that overlap may end in any order.
    """
    # without these nothing can be compiled, and loading the compiler takes a second
    if not _captures and ("torch._dynamo" in sys.modules or "torch.nn.attention.flex_attention" in sys.modules):
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _captures.append(capture)
    try:
        yield
    finally:
        _captures.remove(capture)
        if not _captures:
            _stance.close()


@contextmanager
def captures_paused() -> Iterator[None]:
    """Pause every capture that is running; those begun inside see what happens."""
    running = [capture._modules for capture in _captures if not capture._modules.paused]
    for modules in running:
        modules.paused = True
    try:
        yield
    finally:
        for modules in running:
            modules.paused = False


@contextmanager
def capture(model: nn.Module, sites: str | Sequence[str] | None = None) -> Iterator[list[AttentionCall]]:
    """Collect the attention calls that ``model`` makes while the context lasts.

    Holds the queries and keys, or the scores, of every call until the list is let go.

    Args:
        model: any module; it may be compiled, wrapped, on any device.
        sites: patterns as of a shell for the module paths to look at, such as ``decoder.*``; None: all.

    Example:
        >>> model = nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True)
        >>> with capture(model) as calls:
        ...     z = model(torch.randn(3, 5, 8))
        >>> calls[0].site, calls[0].pattern().shape  # (B, H, Q, K)
        ('self_attn', torch.Size([3, 2, 5, 5]))

    Raises:
        NoAttentionError: when the context ends and no attention call was seen.
    """
    calls: list[AttentionCall] = []
    with Capture(model, calls.append, [sites] if isinstance(sites, str) else sites) as running:
        yield calls
    calls[:] = [replace(call, site=final_site(call.site, running.sites)) for call in calls]
    if not calls:
        raise NoAttentionError(running.explain_nothing())
