"""The patterns of a model, by a way that has nothing in common with attention_monitor.

A ``TorchDispatchMode`` sees every softmax that reaches ATen, below autograd and below all that Python may call it by.
``scaled_dot_product_attention`` is made to run as its own formula, so that its softmax is among them; where a model
chooses a fused kernel itself, its scores are computed once more. Hooks on the model's modules tell which one is
running. What the axes are is not guessed but read from a ``Kind``. Patterns are float64, from the model's own scores.

Shapes: B sequences and all that is batch-like, H heads, Q queries, K keys.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .expectation import FieldModel, Kind, call

_SOFTMAXES = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class TruthError(Exception):
    """What is said of a model does not fit it; the registry is to be mended."""


@dataclass(eq=False)
class TrueSite:
    """One attention call, as it is.

    Attributes:
        path: path of the module; empty: the model itself.
        name: path of the module, or the class of the model.
        kind: what is known of its class.
        heads: number of heads that the module says it has.
        pattern: weights (B, H, Q, K) that the values are multiplied with, float64; None: there is nothing to be shown.
    """

    path: str
    name: str
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

    @property
    def name(self) -> str:
        return self.path or type(self.module).__name__


class _Softmaxes(TorchDispatchMode):
    def __init__(self, on_softmax: Callable[[Tensor, int], None]) -> None:
        super().__init__()
        self._on_softmax = on_softmax

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAXES:
            self._on_softmax(args[0], args[1])
        elif func is _FUSED:
            self._on_softmax(_scores(*args, **(kwargs or {})), -1)
        return result


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the scores of a fused call."""
    query, key = query.detach().double(), key.detach().double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores if attn_mask is None else scores + attn_mask


class _Watch:
    """Collects the true sites of one forward."""

    def __init__(self, model: nn.Module, kinds: Sequence[Kind]) -> None:
        self.sites: list[TrueSite] = []
        self.others: list[str] = []  # softmaxes outside of all modules of which something is known
        self._paths = {module: path for path, module in model.named_modules()}
        self._kinds = kinds
        self._stack: list[_Running] = []
        self._modules: list[nn.Module] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in self._paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                enter = module.register_forward_pre_hook(self._enter)
                leave = module.register_forward_hook(self._leave)
                hooks.callback(enter.remove)
                hooks.callback(leave.remove)
            with sdpa_kernel(SDPBackend.MATH), _Softmaxes(self._see):
                yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._stack and args:
            self._take(module, "input", args[0])
        self._modules.append(module)
        path = self._paths[module]
        for kind in self._kinds:
            if kind.module == type(module).__name__ and fnmatchcase(path, kind.where):
                self._stack.append(_Running(path, module, kind))
                break

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
        if at == end and self._paths[module] == f"{running.path}.{name}".lstrip("."):
            running.patterns.append(tensor.detach().double())

    def _see(self, scores: Tensor, dim: int) -> None:
        if not self._stack:
            where = self._modules[-1] if self._modules else None
            self.others.append("outside" if where is None else f"{self._paths[where]} ({type(where).__name__})")
            return
        running = self._stack[-1]
        kind = running.kind
        if kind.weights or not kind.has_pattern:
            return
        axes = _axes(kind, scores.dim())
        if axes[dim] != "k":
            raise TruthError(f"{running.name}: the softmax is over {axes[dim]!r} of {axes}")
        pattern = scores.detach().double().softmax(dim)
        pattern = pattern.masked_fill(scores.isneginf().all(dim, keepdim=True), 0)
        running.patterns.append(pattern if kind.after is None else kind.after(running.module, pattern).detach())

    def _finish(self, running: _Running) -> None:
        kind = running.kind
        if not kind.has_pattern:
            self.sites.append(TrueSite(running.path, running.name, kind, 0, None))
            return
        heads, patterns = _number(running.module, kind.heads), running.patterns
        if kind.loop == "slices" and patterns:
            patterns = [torch.cat(patterns)]
        patterns = [_in_order(pattern, kind, 1 if kind.loop == "h" else heads) for pattern in patterns]
        if kind.loop in ("h", "q") and patterns:
            patterns = [torch.cat(patterns, dim={"h": 1, "q": 2}[kind.loop])]
        for pattern in patterns:
            if pattern.shape[1] != heads:
                raise TruthError(f"{running.name}: {heads} heads are said, {pattern.shape[1]} found")
            Q, K = pattern.shape[2:]
            if Q < K and kind.shows == "tokens" and kind.is_self and kind.offset is None:
                raise TruthError(f"{running.name}: it is not said where its {Q} queries are among {K} keys")
            self.sites.append(TrueSite(running.path, running.name, kind, heads, pattern))


def _number(module: nn.Module, said: int | str) -> int:
    if isinstance(said, int):
        return said
    value: Any = module
    for name in said.split("."):
        value = getattr(value, name)
    return int(value)


def _axes(kind: Kind, n: int) -> list[str]:
    """Return the axes of a tensor of ``n`` axes."""
    for way in kind.axes.split("|"):
        axes = re.findall(r"\([^)]*\)|\S+", way)
        if len(axes) == n:
            return axes
    raise TruthError(f"{kind.module}: {kind.axes!r} is said of a softmax of {n} axes")


def _in_order(pattern: Tensor, kind: Kind, heads: int) -> Tensor:
    """Bring a pattern to (B, H, Q, K)."""
    letters: list[str] = []
    for axis in _axes(kind, pattern.dim()):
        group = axis.strip("()").split()
        if len(group) > 1:
            pattern = pattern.unflatten(len(letters), [heads if letter == "h" else -1 for letter in group])
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
        paths = [f"{site.name} {tuple(site.pattern.shape)}" for site in shown if site.pattern is not None]
        raise TruthError(f"{said.sites} sites are said, {len(shown)} found: {paths}; other softmaxes: {watch.others}")
    return watch.sites, watch.others
