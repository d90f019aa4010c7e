"""The patterns of a model, by a way that has nothing in common with attention_monitor.

A ``TorchDispatchMode`` sees every softmax that reaches ATen, below autograd and below all that Python may call it by;
``scaled_dot_product_attention`` is made to run as its own formula, so that its softmax is among them. Hooks on the
model's modules tell which one is running. What the axes are is not guessed but read from a ``Kind``.

Shapes: B sequences and all that is batch-like, H heads, Q queries, K keys.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .expectation import FieldModel, Kind, call

_SOFTMAXES = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)


class TruthError(Exception):
    """What is said of a model does not fit it; the registry is to be mended."""


@dataclass(eq=False)
class TrueSite:
    """One attention call, as it is.

    Attributes:
        path: path of the module.
        kind: what is known of its class.
        heads: number of heads that the module says it has.
        pattern: weights (B, H, Q, K) that the values are multiplied with, float64; None: there is nothing to be shown.
    """

    path: str
    kind: Kind
    heads: int
    pattern: Tensor | None


@dataclass(eq=False)
class _Running:
    """A module of which something is known, while its forward runs."""

    path: str
    module: nn.Module
    kind: Kind
    patterns: list[Tensor] = field(default_factory=list)  # as they go on to the values, not yet (B, H, Q, K)
    softmaxes: int = 0


class _Softmaxes(TorchDispatchMode):
    def __init__(self, on_softmax: Callable[[Tensor, int], None]) -> None:
        super().__init__()
        self._on_softmax = on_softmax

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAXES:
            self._on_softmax(args[0], args[1])
        return result


class _Watch:
    """Collects the true sites of one forward."""

    def __init__(self, model: nn.Module, kinds: Sequence[Kind]) -> None:
        self.sites: list[TrueSite] = []
        self.others: list[str] = []  # softmaxes outside of all modules of which something is known
        self._names = {module: path or type(model).__name__ for path, module in model.named_modules()}
        self._kinds = {kind.module: kind for kind in kinds}
        self._stack: list[_Running] = []
        self._modules: list[nn.Module] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in self._names:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                enter = module.register_forward_pre_hook(self._enter)
                leave = module.register_forward_hook(self._leave)
                hooks.callback(enter.remove)
                hooks.callback(leave.remove)
            # what becomes a weight by being mixed is seen at the module that mixes
            with sdpa_kernel(SDPBackend.MATH), _Softmaxes(self._see):
                yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._stack and args:
            self._take(module, "input", args[0])
        self._modules.append(module)
        if kind := self._kinds.get(type(module).__name__):
            self._stack.append(_Running(self._names[module], module, kind))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._modules.pop()
        if self._stack and self._stack[-1].module is module:
            self._finish(self._stack.pop())
        elif self._stack:
            self._take(module, "output", output)

    def _take(self, module: nn.Module, end: str, tensor: Any) -> None:
        """Take the weights of the running module, where they are seen at one inside it."""
        running = self._stack[-1]
        name, _, at = running.kind.weights.rpartition(".")
        if at == end and self._names.get(module) == f"{running.path}.{name}":
            running.patterns.append(tensor.detach().double())

    def _see(self, scores: Tensor, dim: int) -> None:
        if not self._stack:
            where = self._modules[-1] if self._modules else None
            self.others.append(f"{self._names.get(where)} ({type(where).__name__})" if where is not None else "outside")
            return
        running = self._stack[-1]
        running.softmaxes += 1
        if running.kind.weights or running.kind.shows in ("nothing", "silence"):
            return
        axes = _axes(running.kind, scores.dim())
        pattern = scores.detach().double().softmax(dim)
        pattern = pattern.masked_fill(scores.isneginf().all(dim, keepdim=True), 0)
        if axes[dim] != "k":
            raise TruthError(f"{running.path}: the softmax is over {axes[dim]!r} of {axes}")
        running.patterns.append(pattern)

    def _finish(self, running: _Running) -> None:
        kind = running.kind
        if kind.shows in ("nothing", "silence"):
            self.sites.append(TrueSite(running.path, kind, 0, None))
            return
        heads = _number(running.module, kind.heads)
        each = 1 if kind.loop == "h" else heads
        patterns = [_in_order(pattern, kind, each, running) for pattern in running.patterns]
        if kind.loop and patterns:
            patterns = [torch.cat(patterns, dim={"h": 1, "q": 2}[kind.loop])]
        for pattern in patterns:
            if pattern.shape[1] != heads:
                raise TruthError(f"{running.path}: {heads} heads are said, {pattern.shape[1]} found")
            self.sites.append(TrueSite(running.path, kind, heads, pattern))


def _number(module: nn.Module, said: int | str) -> int:
    if isinstance(said, int):
        return said
    value: Any = module
    for name in said.split("."):
        value = getattr(value, name)
    return int(value)


def _axes(kind: Kind, n: int) -> list[str]:
    """Return the axes of a tensor of ``n`` axes; a kind may know several ways, such as ``b h q k | (b h) q k``."""
    ways = [re.findall(r"\([^)]*\)|\S+", way) for way in kind.axes.split("|")]
    for way in ways:
        if len(way) == n:
            return way
    raise TruthError(f"{kind.module}: {kind.axes!r} is said of a softmax of {n} axes")


def _in_order(pattern: Tensor, kind: Kind, heads: int, running: _Running) -> Tensor:
    """Bring a pattern to (B, H, Q, K)."""
    known = {name: _number(running.module, size) for name, size in kind.sizes} | {"h": heads}
    letters: list[str] = []
    for axis in _axes(kind, pattern.dim()):
        group = axis.strip("()").split()
        if len(group) > 1:
            pattern = pattern.unflatten(len(letters), [known.get(letter, -1) for letter in group])
        letters += group
    for missing in {"h", "q"} - set(letters):
        pattern, letters = pattern.unsqueeze(0), [missing, *letters]
    batch = [letter for letter in letters if letter not in "hqk"]
    pattern = pattern.permute([letters.index(letter) for letter in [*batch, "h", "q", "k"]])
    return pattern.reshape(-1, *pattern.shape[-3:])


def true_sites(model: nn.Module, inputs: Any, said: FieldModel) -> tuple[list[TrueSite], list[str]]:
    """Run a model and return its attention calls in order.

    Args:
        model: the model.
        inputs: what it is called with.
        said: what is known of it.

    Returns:
        sites: attention calls, in the order in which their modules end.
        others: modules in which a softmax was seen of which nothing is known, such as classifiers and routers.

    Raises:
        TruthError: when what is known does not fit what is seen.
    """
    watch = _Watch(model, said.kinds)
    with watch.running():
        call(model, inputs)
    shown = [site for site in watch.sites if site.pattern is not None]
    if len(shown) != said.sites:
        paths = [f"{site.path} {tuple(site.pattern.shape)}" for site in shown if site.pattern is not None]
        raise TruthError(f"{said.sites} sites are said, {len(shown)} found: {paths}; other softmaxes: {watch.others}")
    return watch.sites, watch.others
