"""A running model -> one ``AttentionCall`` for each attention call.

A ``TorchFunctionMode`` sees the functions a model calls, whoever wrote it; hooks common to all modules tell which one
is calling. Both are there only while a capture lasts, and neither is in the model.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from pkgutil import iter_modules
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from ..errors import NoAttentionError, Once
from ..naming import final_site
from . import recognisers
from .attention_call import AttentionCall
from .provenance import Frame, Origins
from .recognisers.base import ATTENTION_NAME, RECOGNISERS, Fate, NotUnderstoodError, Recogniser, Seen, name_of
from .recognisers.flex import run_flex_attention
from .running_modules import may_take_fast_path, module_names

for _found in iter_modules(recognisers.__path__):
    import_module(f"{recognisers.__name__}.{_found.name}")  # each registers what it reads

_OUTSIDE = ""  # calls of the model outside of any forward are counted on their own


class Capture(TorchFunctionMode):
    """Context in which every attention call under ``model`` is handed to ``on_call`` as it happens.

    ``on_call`` runs without gradients, outside autocast, and its failures are warned about, never raised into the
    model's forward. A module's calls are numbered within one outermost forward; ``sites`` keeps the order of execution.

    Args:
        model: whose calls are looked at.
        on_call: gets them.
        only: patterns as of a shell, such as ``decoder.*``; a call is looked at when its module path, with or without
            ``[i]``, matches one. None: all are.
        once: what has been warned of.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], None],
        only: Sequence[str] | None = None,
        once: Once | None = None,
    ) -> None:
        super().__init__()
        self.model, self.on_call, self.only = model, on_call, only
        self.sites: dict[str, int] = {}  # module path -> most calls seen in one forward
        self.left_out: set[str] = set()  # module paths that match none of ``only``
        self.not_understood: dict[str, str] = {}  # module path -> reason
        self.paused = False
        self._once = Once() if once is None else once
        self._names: dict[nn.Module, str] = {}
        self._not_run: set[nn.Module] = set()
        # modules whose forward is running; the model is always the first, whose other methods may call things too
        self._frames: list[Frame] = []
        self._foreign = 0  # modules of other models, outside of this one, that are running
        self._unseen: nn.Module | None = None  # is on its fast path
        self._calls_in_forward: Counter[str] = Counter()
        self._origins = Origins()
        self._fates: list[Fate] = []
        self._exit = ExitStack()

    def __enter__(self) -> "Capture":
        with ExitStack() as stack:
            self._names = module_names(self.model)
            self._not_run = {m for m in self._names if next(m.parameters(recurse=False), None) is not None}
            stack.callback(register_module_forward_pre_hook(self._entering).remove)
            handle = register_module_forward_hook(self._leaving, with_kwargs=True, always_call=True)
            # torch leaves this entry behind, and warns of global hooks in every compiled module then
            stack.callback(lambda: _global_forward_hooks_with_kwargs.pop(handle.id, None))
            stack.callback(handle.remove)
            stack.enter_context(_running(self))
            self._thread = get_ident()
            self._forget_forward()
            self._switch_on()
            stack.callback(self._switch_off)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()
        self._judge_softmaxes()
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
        self._frames = [Frame(type(self.model).__name__, self.model, 0)]
        self._foreign = 0
        self._origins = Origins(self.model.buffers())

    def _entering(self, module: nn.Module, args: Any) -> None:
        if self.paused or get_ident() != self._thread:
            return
        name, outermost = self._names.get(module), len(self._frames) == 1
        if name is None:
            self._foreign += outermost and getattr(module, "module", None) is not self.model
            return
        self._not_run.discard(module)
        if outermost:
            for path in set(self._calls_in_forward) - {_OUTSIDE}:
                del self._calls_in_forward[path]
            self._origins.cut()
        self._frames.append(Frame(name or type(module).__name__, module, self._origins.now()))
        if self._unseen is None and may_take_fast_path(module) and _get_current_function_mode_stack() == [self]:
            self._unseen = module
            self._switch_off()

    def _leaving(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        if self.paused or get_ident() != self._thread:
            return
        if module not in self._names:
            self._foreign -= self._foreign > 0 and len(self._frames) == 1
            return
        if not any(frame.module is module for frame in self._frames[1:]):
            return
        while self._frames[-1].module is not module:  # left by an exception
            self._frames.pop()
        if self._unseen is module:
            self._switch_on()
            if len(kwargs_and_output) == 2:  # it did not fail: torch then leaves the kwargs out
                self._run_slow_path(module, args, kwargs_and_output[0])
            self._unseen = None
        self._frames.pop()
        if len(self._frames) == 1:
            self._judge_softmaxes()

    def _run_slow_path(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Run a module of torch's once more, on the path that can be seen, so that the model's own numbers stay."""
        try:
            with torch.no_grad():
                module.forward(*args, **kwargs)
        except Exception as error:
            self._not_understood(self._frames[-1].name, f"{type(error).__name__}: {error}")

    def _judge_softmaxes(self) -> None:
        """At the end of a forward: a softmax in an attention module that led to no call was not understood."""
        understood = {fate.path for fate in self._fates if fate.met_values} | set(self._calls_in_forward)
        for fate in self._fates:
            if fate.path is not None and fate.path not in understood:
                self._not_understood(
                    fate.path, "its softmax was not seen to be multiplied with values by a matmul or einsum"
                )
        self._fates.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        result = run_flex_attention(func, args) if name == "flex_attention" else func(*args, **kwargs)
        # In another model, outside of this one, it is not ours. In a backward pass, checkpointing is calling once more
        # what was seen.
        ours = len(self._frames) > 1 or not self._foreign
        if ours and not self.paused and torch._C._current_graph_task_id() == -1:
            try:
                self._origins.follow(func, args, kwargs, result, inside=len(self._frames) > 1)
                recogniser = RECOGNISERS.get(name)
                if recogniser is not None:
                    self._read(recogniser, Seen(func, args, kwargs, result, self._frames, self._origins, self._fates))
            except Exception as error:  # the model's own forward must go on
                self._not_understood(self._frames[-1].name, f"{type(error).__name__}: {error}")
        return result

    def _read(self, recogniser: Recogniser, seen: Seen) -> None:
        path = self._frames[-1].name
        try:
            with torch.no_grad():
                call = recogniser.read(seen)
        except NotUnderstoodError as reason:
            self._not_understood(path, str(reason))
            return
        if call is None:
            return
        if torch._C._functorch.is_batchedtensor(call.given):
            self._not_understood(path, "it runs inside torch.vmap")
            return
        counted = path if len(self._frames) > 1 else _OUTSIDE
        index = self._calls_in_forward[counted]
        self._calls_in_forward[counted] += 1
        if self.only is not None and not any(
            fnmatchcase(name, pattern) for name in (path, f"{path}[{index}]") for pattern in self.only
        ):
            self.left_out.add(path)
            return
        self.sites[path] = max(self.sites.get(path, 0), index + 1)
        with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
            self.on_call(replace(call, site=f"{path}[{index}]"))

    def _not_understood(self, path: str, reason: str) -> None:
        self.not_understood.setdefault(path, reason)
        message = f"attention_monitor could not look at a call of {path}: {reason}"
        self._once.warn("module", path, message, stacklevel=3)

    @property
    def ran_whole(self) -> bool:
        """Every part of the model that has parameters has been run."""
        return not self._not_run

    def explain_nothing(self) -> str:
        """A sentence or two for a model in which nothing was captured: what was seen, and the ways out."""
        if self.left_out:
            return (
                f"No attention call was looked at in {type(self.model).__name__}: sites={list(self.only or ())} "
                f"matches none of those seen, {_some(sorted(self.left_out))}."
            )
        if self.not_understood:
            reasons = [f"{path} ({reason})" for path, reason in self.not_understood.items()]
            seen = f"calls were seen but not understood: {_some(reasons)}"
        else:
            names = [
                f"{name or type(self.model).__name__} ({type(module).__name__})"
                for module, name in module_names(self.model).items()
                if ATTENTION_NAME.search(type(module).__name__)
            ]
            seen = f"modules that look like attention are {_some(names)}" if names else ""
            seen = seen or "no module in it looks like attention"
        return (
            f"No attention call was seen in {type(self.model).__name__}: {seen}. What is understood is "
            "scaled_dot_product_attention, nn.MultiheadAttention, flex_attention, flash_attn, xformers, and a softmax "
            "of products of queries and keys that is multiplied with values. Use one of them, called by the model's "
            "own modules outside TorchScript; or teach the package another with a Recogniser "
            "(attention_monitor.capturing.recognisers); or leave the monitor out."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_captures: list[Capture] = []  # that are running


_stance = ExitStack()


@contextmanager
def _running(capture: Capture) -> Iterator[None]:
    """While any capture runs, compiled modules run eagerly and keep their compiled code; they may end in any order."""
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
    """Captures that are running see nothing of what happens here; those begun here do."""
    running = [capture for capture in _captures if not capture.paused]
    for capture in running:
        capture.paused = True
    try:
        yield
    finally:
        for capture in running:
            capture.paused = False


@contextmanager
def capture(model: nn.Module, sites: str | Sequence[str] | None = None) -> Iterator[list[AttentionCall]]:
    """Collect the attention calls that ``model`` makes while the context lasts.

    Holds the queries and keys, or the scores, of every call until the list is let go.

    Args:
        model: any module; it may be compiled, wrapped, on any device.
        sites: patterns as of a shell for the module paths to look at, such as ``decoder.*``; None: all.

    Example:
        >>> with capture(model) as calls:
        ...     model(inputs)
        >>> calls[0].site, calls[0].pattern()  # 'transformer.h.0.attn', (B, H, Q, K)

    Raises:
        NoAttentionError: when the context ends and no attention call was seen.
    """
    calls: list[AttentionCall] = []
    with Capture(model, calls.append, [sites] if isinstance(sites, str) else sites) as running:
        yield calls
    calls[:] = [replace(call, site=final_site(call.site, running.sites)) for call in calls]
    if not calls:
        raise NoAttentionError(running.explain_nothing())
