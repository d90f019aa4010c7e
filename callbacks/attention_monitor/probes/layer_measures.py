"""What layers do as a whole with a probe: how alike their heads are, what attention passes on, what becomes of tokens.

Shapes: H heads, T tokens, C width of the model.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..capturing.running_modules import module_names
from ..snapshots import HeadScore, Snapshot

# Added to weights before they are compared (Clark et al. 2019): heads that both leave a key out are alike there.
SMOOTHING = 0.001

# No role: a small distance is what is worth a look.
HEAD_DISTANCE = HeadScore("head_distance", threshold=float("inf"))


def head_distance(pattern: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each head to the head of its layer that is most like it, mean over rows.

    Smoothed with 0.001 (Clark et al. 2019). In nats, 0..ln 2; 0: another head does the same. NaN for a single head.

    Args:
        pattern: (H, Q, K).

    Returns:
        (H,).
    """
    H = len(pattern)
    if H < 2:
        return torch.full((H,), torch.nan)
    p = pattern.double() + SMOOTHING
    p = p / p.sum(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1)  # (H, Q)
    distances = torch.full((H, H), torch.inf, dtype=torch.float64)
    for i in range(H - 1):
        between = torch.special.entr((p[i] + p[i + 1 :]) / 2).sum(-1) - (entropy[i] + entropy[i + 1 :]) / 2
        distances[i, i + 1 :] = distances[i + 1 :, i] = between.mean(-1)
    return distances.amin(-1).clamp(min=0).float()


def rollout(patterns: Sequence[Tensor]) -> list[Tensor]:
    """Attention rollout (Abnar and Zuidema 2020): how much of each token's place, after each layer, is of each token.

    R_l = norm_rows(mean over heads of A_l + I) R_{l-1}.

    Args:
        patterns: (H, T, T) of each layer.

    Returns:
        (T, T) of each layer, rows sum to 1.
    """
    rolled = []
    before = torch.eye(patterns[0].shape[-1], dtype=torch.float64)
    for pattern in patterns:
        step = pattern.double().mean(0) + torch.eye(pattern.shape[-1], dtype=torch.float64)
        before = step / step.sum(-1, keepdim=True) @ before
        rolled.append(before.float())
    return rolled


def token_spread(x: Tensor) -> float:
    """Norm of what tokens do not share, |X - 1 x^T| / |X| (Frobenius), x the mean token: 0 when all have become one.

    Its fall from layer to layer is rank collapse (Dong et al. 2021), which is not entropy collapse.

    Args:
        x: (T, C).
    """
    x = x.double()
    return float((x - x.mean(0)).norm() / x.norm())


class LayerOutputs:
    """Context that takes ``token_spread`` of what the numbered modules of a model put out: the layers of its stacks.

    Args:
        model: called on one sequence.
        n_tokens: of the sequence.
    """

    def __init__(self, model: nn.Module, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._names = module_names(model)
        self.spread: dict[str, float] = {}

    def __enter__(self) -> "LayerOutputs":
        self._handle = register_module_forward_hook(self._keep)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(module, "")
        x = output[0] if isinstance(output, tuple) and output else output
        if not (re.search(r"(^|\.)\d+$", name) and isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point()):
            return
        if x.shape[0] == 1:
            self.spread[name] = token_spread(x.detach()[0])
        elif x.shape[:2] == (self._n_tokens, 1):  # sequence first
            self.spread[name] = token_spread(x.detach()[:, 0])


def layer_of(site: str, stack: str) -> str:
    """Path of the layer that an attention module is in: up to the number by which the sites of its stack differ."""
    parts, template = site.split("."), stack.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    differing = [i for i in numbered if i < len(template) and template[i] == "*"]
    return ".".join(parts[: ([*differing, *numbered[-1:], -1][0]) + 1])


def with_layers(snapshot: Snapshot, outputs: LayerOutputs) -> Snapshot:
    """A snapshot with ``head_distance`` of every head, ``token_spread`` of every layer, and rollout of every stack."""
    layers = [layer_of(site, stack) for site, stack in zip(snapshot.sites, snapshot.stacks, strict=True)]
    rolled: dict[str, Tensor] = {}
    for stack in dict.fromkeys(snapshot.stacks):
        sites = [i for i, of in enumerate(snapshot.stacks) if of == stack and not snapshot.is_cross[i]]
        patterns = [snapshot.patterns[i] for i in sites]
        if len({size for pattern in patterns for size in pattern.shape[1:]}) == 1:  # all are T x T
            rolled |= dict(zip((snapshot.labels[i] for i in sites), rollout(patterns), strict=True))
    return replace(
        snapshot,
        values=[
            {**values, HEAD_DISTANCE.name: head_distance(pattern)}
            for values, pattern in zip(snapshot.values, snapshot.patterns, strict=True)
        ],
        scores=[*snapshot.scores, HEAD_DISTANCE],
        layers={"token_spread": [outputs.spread.get(layer, math.nan) for layer in layers]},
        rollout=rolled,
    )
