"""The modules of a model by their paths, and which of them are running."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

ATTENTION_NAME = re.compile("attention|attn", re.IGNORECASE)  # in names of classes

# These have a fast path for inference that cannot be seen, and that they leave while a function mode is on.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

_OUTSIDE = ""  # calls of the model outside of any forward are counted on their own


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module's class is named like attention."""
    return ATTENTION_NAME.search(type(module).__name__) is not None


def may_take_fast_path(module: nn.Module) -> bool:
    """Whether a module of torch's may now run as one fused function instead of the functions that can be seen."""
    return (
        not module.training
        and any(getattr(type(module), "forward", None) is kind.forward for kind in _FAST_PATHS)
        and not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()))
    )


# What wraps a model without being a part of it: the name that it gives the model -> its class, by package and name, or
# one that it derives from.
_WRAPPERS = {
    "_orig_mod": ("torch._dynamo.*.OptimizedModule",),  # torch.compile, also by accelerate
    "_fsdp_wrapped_module": ("*.FullyShardedDataParallel",),
    "_checkpoint_wrapped_module": ("*",),  # checkpoint_wrapper, offload_wrapper, and their like of other libraries
    "module": (
        "*DataParallel",  # torch's two, and those of Megatron, apex, fairscale
        "deepspeed.*Engine",
        "torch.optim.swa_utils.AveragedModel",
    ),
    "_forward_module": ("lightning.fabric.*._FabricModule", "lightning_fabric.*._FabricModule"),
    "base_model": ("peft.*.PeftModel", "peft.*.PeftMixedModel"),
    "model": ("peft.tuners.*Model",),  # LoRA and its like; prefix and prompt tuning have none
}


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Map each module to its path in the model, without what wrappers put into the path.

    A wrapper shares the path of what it wraps; no other two modules have the same. Where they would, because a wrapper
    has a module of its own beside the model, the model keeps its place in the wrapper's path.

    Example:
        >>> list(module_names(nn.Sequential(nn.Linear(2, 2))).values())
        ['', '0']
        >>> list(module_names(nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))).values())
        ['', '', '0']
    """
    at = dict(model.named_modules())  # parents come first
    names = {model: ""}
    below = {model: {child for child, _ in model.named_children()}}  # what stands directly below a module's path
    unwrapped: set[nn.Module] = set()
    for path, module in at.items():
        if module in names:
            continue
        parent_path, _, child = path.rpartition(".")
        parent, children = at[parent_path], {name for name, _ in module.named_children()}
        beside = below[parent]
        is_free = parent not in unwrapped and children.isdisjoint(beside - {child})
        if is_free and _is_wrapped(parent, child):
            unwrapped.add(parent)
            names[module], below[module] = names[parent], beside  # one set for the two
            beside.remove(child)
            beside |= children
        else:
            names[module], below[module] = f"{names[parent]}.{child}".removeprefix("."), children
    return names


def _is_wrapped(parent: nn.Module, child: str) -> bool:
    """Whether a module is what its parent wraps, by what the parent is."""
    if child not in _WRAPPERS:
        return False
    classes = [f"{kind.__module__}.{kind.__name__}" for kind in type(parent).__mro__]
    return any(fnmatchcase(name, wrapper) for wrapper in _WRAPPERS[child] for name in classes)


@dataclass
class Frame:
    """A module whose forward is running.

    Attributes:
        name: path of the module.
        module: the module.
        start: serial number of the first tensor made in it.
    """

    name: str
    module: nn.Module
    start: int


class ForwardObserver(Protocol):
    """Is told when modules of the model begin and end to run."""

    def next_serial(self) -> int:
        """Draw a serial number for what is made from now on."""

    def forward_begins(self) -> None:
        """React to the outermost module, before it runs."""

    def module_begins(self, module: nn.Module) -> None:
        """React to a module of the model, before it runs."""

    def module_ends(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """React to a module that has run, while it is still among those that run; kwargs is None if it failed."""

    def forward_ends(self) -> None:
        """React to the outermost module, after it has run."""


class RunningModules:
    """Which modules of a model are running, by hooks common to all modules, and the calls that each has made.

    Args:
        model: model whose modules are followed; modules of other models are only counted.

    Attributes:
        frames: modules whose forward is running, outermost first. The model itself is always the first, because its
            other methods may call things too.
        paused: whether nothing is followed for the moment.
        calls_in_forward: module path, and whether gradients are recorded -> number of calls made in this forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.frames: list[Frame] = []
        self.paused = False
        self.calls_in_forward: Counter[tuple[str, bool]] = Counter()
        self._names: dict[nn.Module, str] = {}
        self._not_run: set[nn.Module] = set()
        self._foreign = 0  # modules of other models, outside of this one, that are running
        self._observer: ForwardObserver | None = None

    @contextmanager
    def observed_by(self, observer: ForwardObserver) -> Iterator[None]:
        """Follow what this thread runs while the context lasts, and tell the observer."""
        self._names = module_names(self.model)
        self._not_run = {m for m in self._names if next(m.parameters(recurse=False), None) is not None}
        self._thread = get_ident()
        self.forget()
        with ExitStack() as stack:
            self._observer = observer
            stack.callback(setattr, self, "_observer", None)  # or the two would keep each other alive
            stack.callback(register_module_forward_pre_hook(self._entering).remove)
            handle = register_module_forward_hook(self._leaving, with_kwargs=True, always_call=True)
            # torch leaves this entry behind, and warns of global hooks in every compiled module then
            stack.callback(lambda: _global_forward_hooks_with_kwargs.pop(handle.id, None))
            stack.callback(handle.remove)
            yield

    def forget(self) -> None:
        """Forget which modules are running."""
        self.frames = [Frame(type(self.model).__name__, self.model, 0)]
        self._foreign = 0

    @property
    def path(self) -> str:
        """Path of the innermost module that is running."""
        return self.frames[-1].name

    @property
    def paths(self) -> Collection[str]:
        """Paths of all modules of the model, once it has been observed."""
        return self._names.values()

    @property
    def is_inside(self) -> bool:
        """Whether the forward of one of the model's modules is running."""
        return len(self.frames) > 1

    @property
    def is_followed(self) -> bool:
        """Whether a function called now is a call of this model: not one of another model's modules outside of it."""
        return (len(self.frames) > 1 or not self._foreign) and not self.paused

    @property
    def ran_whole(self) -> bool:
        """Whether every part of the model that has parameters has been run."""
        return not self._not_run

    def count_call(self, path: str, with_gradients: bool, inside: bool) -> int:
        """Count a call, and return its number among those of this forward.

        Args:
            path: path of the module that made it.
            with_gradients: whether gradients are recorded; calls with and without are counted each for themselves.
            inside: whether it was made inside the forward of a module.
        """
        counted = (path if inside else _OUTSIDE), with_gradients
        self.calls_in_forward[counted] += 1
        return self.calls_in_forward[counted] - 1

    def _entering(self, module: nn.Module, args: Any) -> None:
        if self.paused or get_ident() != self._thread:
            return
        assert self._observer is not None
        name, outermost = self._names.get(module), len(self.frames) == 1
        if name is None:
            self._foreign += outermost and getattr(module, "module", None) is not self.model
            return
        self._not_run.discard(module)
        if outermost:
            for counted in [counted for counted in self.calls_in_forward if counted[0] != _OUTSIDE]:
                del self.calls_in_forward[counted]
            self._observer.forward_begins()
        self.frames.append(Frame(name or type(module).__name__, module, self._observer.next_serial()))
        self._observer.module_begins(module)

    def _leaving(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        if self.paused or get_ident() != self._thread:
            return
        assert self._observer is not None
        if module not in self._names:
            self._foreign -= self._foreign > 0 and len(self.frames) == 1
            return
        if not any(frame.module is module for frame in self.frames[1:]):
            return
        while self.frames[-1].module is not module:  # left by an exception
            self.frames.pop()
        failed = len(kwargs_and_output) != 2  # torch leaves the kwargs out then
        self._observer.module_ends(module, args, None if failed else kwargs_and_output[0])
        self.frames.pop()
        if len(self.frames) == 1:
            self._observer.forward_ends()
