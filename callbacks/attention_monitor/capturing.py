"""A running model -> one ``AttentionCall`` per attention call. The only module that looks into a model.

A ``TorchFunctionMode`` sees the attention functions a model calls, whoever wrote it; forward hooks tell which module is
calling. Both are there only while a capture lasts.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions.
"""

import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import AttentionMonitorError

# Additive masks hide keys with -inf, finfo.min, -1e9 or -1e4: all of them leave a weight of exactly 0 in float32.
MASKED_BELOW = -1e4

# What wrappers put into module paths: torch.compile, DistributedDataParallel, FSDP, checkpoint_wrapper.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


class NoAttentionError(AttentionMonitorError):
    """A model ran and no attention call was seen."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one attention call of a model worked with, detached from its graph.

    Attributes:
        site: path of the module that made the call, with ``[i]`` when it makes several in one forward.
        query: (B, H, Q, D).
        key: (B, H_kv, K, D); H is a multiple of H_kv.
        mask: broadcastable to (B, H, Q, K); bool (True: may attend) or a number added to the score.
        is_causal: row i sees keys 0..i.
        scale: factor on q . k.
    """

    site: str
    query: Tensor
    key: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float

    @property
    def is_self_attention(self) -> bool:
        """Queries and keys are the same positions."""
        return self.query.shape[2] == self.key.shape[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 model: half precision is never accumulated in."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def first(self, n: int) -> "AttentionCall":
        """The same call on the first ``n`` sequences only."""
        mask = self.mask[:n] if self.mask is not None and self.mask.shape[0] > 1 else self.mask
        return replace(self, query=self.query[:n], key=self.key[:n], mask=mask)

    def scores(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scores of query rows ``start`` to ``stop``, -inf where masked by a bool mask or causality.

        Returns:
            scores: (B, H, R, K'), K' <= K: keys that no row of a causal call may see are left out. Keys masked by
                a number (-1e9, finfo.min) have that added to their score.
            allowed: bool, broadcastable to ``scores``: which keys a row may see.
        """
        K = min(stop, self.key.shape[2]) if self.is_causal else self.key.shape[2]
        B, H, _, D = self.query.shape
        q = self.query[:, :, start:stop].to(self.compute_dtype)
        k = self._key_for_scores[:, :, :K]  # (B, H_kv, K', D)
        R, H_kv = q.shape[2], k.shape[1]
        # the H / H_kv query heads that share a key head become more rows of one matrix product
        scores = (q.reshape(B, H_kv, H // H_kv * R, D) @ k.transpose(-1, -2)).view(B, H, R, K)
        scores *= self.scale
        if self.mask is None and not self.is_causal:
            return scores, torch.ones((1, 1, R, K), dtype=torch.bool, device=q.device)
        allowed = torch.ones((R, K), dtype=torch.bool, device=q.device)
        if self.is_causal:
            allowed.tril_(start)
            scores.masked_fill_(~allowed, -torch.inf)
        if self.mask is not None:
            mask = (self.mask if self.mask.shape[-2] == 1 else self.mask[..., start:stop, :])[..., :K]
            allowed = allowed & _as_allowed(mask)
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
            scores += mask  # also if it is bool, as the function does it: NaN in a masked key stays NaN
        return scores, allowed

    def pattern(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Attention probabilities (B, H, Q, K) before dropout, float32 (float64 for a float64 model).

        Rows that may see no key are 0, as scaled_dot_product_attention makes them; NaN is left as it is.
        """
        scores, _ = self.scores(start, self.query.shape[2] if stop is None else stop)
        pattern = scores.softmax(-1).masked_fill_(scores.isneginf().all(-1, keepdim=True), 0)
        return F.pad(pattern, (0, self.key.shape[2] - pattern.shape[-1]))

    @cached_property
    def padded_queries(self) -> Tensor | None:
        """bool, broadcastable to (B, H, Q): rows of padding, or None where the mask shows none.

        In self-attention a position that no row attends to is padding, provided that every other position sees itself
        (a mask that hides the diagonal of real tokens says nothing about padding).
        """
        if self.mask is None or not self.is_self_attention:
            return None
        allowed = _as_allowed(self.mask)
        allowed = allowed.expand(*allowed.shape[:-1], self.key.shape[2])
        seen = allowed.any(-2)  # (B | 1, H | 1, K)
        itself = allowed[..., 0, :] if allowed.shape[-2] == 1 else allowed.diagonal(dim1=-2, dim2=-1)
        return ~seen if bool((itself | ~seen).all()) else None

    @cached_property
    def _key_for_scores(self) -> Tensor:
        return self.key.to(self.compute_dtype)


def _as_allowed(mask: Tensor) -> Tensor:
    """Which keys a mask leaves visible, bool; NaN in an additive mask is a number gone wrong, not a mask."""
    return mask if mask.dtype == torch.bool else ~(mask <= MASKED_BELOW)


# A recogniser turns the arguments of an attention function into an AttentionCall. One for each function.
Recogniser = Callable[..., AttentionCall]
RECOGNISERS: dict[Callable[..., Any], Recogniser] = {}


def recognises(function: Callable[..., Any]) -> Callable[[Recogniser], Recogniser]:
    """Register a recogniser: called with the site, then as ``function`` was called."""

    def register(recogniser: Recogniser) -> Recogniser:
        RECOGNISERS[function] = recogniser
        return recogniser

    return register


@recognises(F.scaled_dot_product_attention)
def _scaled_dot_product_attention(
    site: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    query, key = query.detach(), key.detach()
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype == torch.float32:
        # autocast rounds the inputs inside the call
        query, key = query.to(torch.get_autocast_dtype(device)), key.to(torch.get_autocast_dtype(device))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    mask = None
    if attn_mask is not None:
        mask = attn_mask.detach()
        mask = mask.reshape((1,) * (query.dim() - mask.dim()) + mask.shape)
    if not enable_gqa:  # batch and heads of either may be 1 and broadcast
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        query, key = query.expand(*leading, -1, -1), key.expand(*leading, -1, -1)
    if mask is not None and query.dim() > 4:  # what is flattened together must be there
        mask = mask.expand(*query.shape[:-2], -1, -1)
    mask = None if mask is None else _four_dimensional(mask)
    return AttentionCall(site, _four_dimensional(query), _four_dimensional(key), mask, is_causal, scale)


def _four_dimensional(x: Tensor) -> Tensor:
    """(Q, D) and (B, Q, D) get a head of their own; of more than four axes, all between batch and Q are heads."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (3 - x.dim()) + x.shape).unsqueeze(1)
    return x.flatten(1, -3)


class Capture(TorchFunctionMode):
    """Context in which every attention call under ``model`` is handed to ``on_call`` as it happens.

    ``on_call`` runs without gradients, outside autocast, and its failures are warned about, never raised into the
    model's forward. A module's calls are numbered within one outermost forward; ``sites`` keeps the order of execution.
    """

    def __init__(self, model: nn.Module, on_call: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self.model, self.on_call = model, on_call
        self.sites: dict[str, int] = {}  # module path -> most calls seen in one forward
        self._path: list[str] = []  # of the modules whose forward is running
        self._calls_in_forward: Counter[str] = Counter()
        self._exit = ExitStack()
        self._failed = False
        self.paused = False

    def __enter__(self) -> "Capture":
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and calls nothing that could be seen
                    continue
                name = _WRAPPERS.sub("", name).rstrip(".")
                stack.callback(module.register_forward_pre_hook(self._entering(name)).remove)
                stack.callback(module.register_forward_hook(self._leaving, always_call=True).remove)
            stack.enter_context(_running(self))
            super().__enter__()
            stack.push(super().__exit__)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not self._path:
                self._calls_in_forward.clear()
            self._path.append(name)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        recogniser = RECOGNISERS.get(func)
        # outside the model's forward somebody else is calling: another model, the loss
        if recogniser is not None and self._path and not self.paused:
            self._record(recogniser, args, kwargs or {})
        return result

    def _record(self, recogniser: Recogniser, args: Any, kwargs: Any) -> None:
        path = self._path[-1] or type(self.model).__name__
        index = self._calls_in_forward[path]
        self._calls_in_forward[path] += 1
        self.sites[path] = max(self.sites.get(path, 0), index + 1)
        try:
            with torch.no_grad():
                call = recogniser(f"{path}[{index}]", *args, **kwargs)
                with torch.autocast(call.query.device.type, enabled=False):
                    self.on_call(call)
        except Exception as error:  # the model's own forward must go on
            if not self._failed:
                warnings.warn(
                    f"attention_monitor could not look at a call of {path}: {type(error).__name__}: {error}",
                    stacklevel=2,
                )
            self._failed = True

    def final_site(self, site: str) -> str:
        """The name of a site once all calls are known: a module's only call carries no index."""
        path = site[: site.rindex("[")]
        return path if self.sites[path] == 1 else site


_captures: list[Capture] = []  # that are running
_stance = ExitStack()


@contextmanager
def _running(capture: Capture) -> Iterator[None]:
    """While any capture runs, compiled modules run eagerly and keep their compiled code; they may end in any order."""
    if not _captures and "torch._dynamo" in sys.modules:  # else nothing can be compiled, and loading it takes a second
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
def capture(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """Collect the attention calls that ``model`` makes while the context lasts.

    Holds the queries and keys of every call until the list is let go.

    Example:
        >>> with capture(model) as calls:
        ...     model(inputs)
        >>> calls[0].site, calls[0].pattern()  # 'transformer.h.0.attn', (B, H, Q, K)

    Raises:
        NoAttentionError: when the context ends and no attention call was seen.
    """
    calls: list[AttentionCall] = []
    with Capture(model, calls.append) as running:
        yield calls
    calls[:] = [replace(call, site=running.final_site(call.site)) for call in calls]
    if not calls:
        raise NoAttentionError(describe_no_attention(model))


def describe_no_attention(model: nn.Module) -> str:
    """One sentence for a model in which nothing was captured: what looks like attention, and the way out."""
    names = [
        f"{name or type(model).__name__} ({type(module).__name__})"
        for name, module in model.named_modules()
        if re.search("attention|attn", type(module).__name__, re.IGNORECASE)
    ]
    seen = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"No attention call was seen in {type(model).__name__}: "
        + (f"modules that look like attention are {seen}" if names else "no module in it looks like attention")
        + ", but what is understood so far is torch.nn.functional.scaled_dot_product_attention, called by the model's "
        "own modules (nn.MultiheadAttention hides its call); use it in the model, or leave the monitor out."
    )


def layer_labels(sites: list[str]) -> list[str]:
    """Short labels for sites: ``L00``, ``L01`` ... for a plain stack of layers, the module path otherwise.

    A plain stack is sites whose paths differ in one number only.
    """
    templates = {re.sub(r"(?<![^.])\d+(?![^.])", "*", site) for site in sites}
    numbers = [re.findall(r"(?<![^.])\d+(?![^.])", site) for site in sites]
    if len(templates) == 1:
        varying = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
        if len(varying) == 1:
            return [f"L{int(number):02d}" for number in varying[0]]
        if len(sites) == 1:
            return ["L00"]
    return list(sites)
