"""What layers do as a whole with a probe: how alike their heads are, what attention passes on, what becomes of tokens.

Shapes: H heads, T tokens, C width of the model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..capturing.running_modules import module_names
from ..naming import stacks
from ..snapshots import HeadScore
from ..statistics.sites import SiteMeasurement

# Added to weights before they are compared (Clark et al. 2019): heads that both leave a key out are alike there.
SMOOTHING = 0.001

# No role follows: a small distance is what is worth a look.
HEAD_DISTANCE = HeadScore("head_distance", unit="nats", range=f"0..{math.log(2):.4f}")


def head_distance(pattern: Tensor) -> Tensor:
    """Measure how far each head is from the head of its layer that is most like it.

    Jensen-Shannon divergence, mean over rows, after 0.001 has been added to each weight (Clark et al. 2019). In nats,
    0..ln 2; 0: another head does the same. NaN for a single head.

    Args:
        pattern: (H, Q, K).

    Returns:
        (H,).
    """
    H = len(pattern)
    if H < 2:
        return torch.full((H,), torch.nan, dtype=torch.float32)
    p = pattern.double() + SMOOTHING
    p = p / p.sum(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1)  # (H, Q)
    distances = torch.full((H, H), torch.inf, dtype=torch.float64)
    for i in range(H - 1):
        between = torch.special.entr((p[i] + p[i + 1 :]) / 2).sum(-1) - (entropy[i] + entropy[i + 1 :]) / 2
        distances[i, i + 1 :] = distances[i + 1 :, i] = between.mean(-1)
    return distances.amin(-1).clamp(min=0).float()


def rollout(patterns: Sequence[Tensor]) -> list[Tensor]:
    """Roll attention out (Abnar and Zuidema 2020): how much of each token's place, after each layer, is of each token.

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
    """Measure what tokens do not share, |X - 1 x^T| / |X| (Frobenius), x the mean token: 0 when all have become one.

    Its fall from layer to layer is rank collapse (Dong et al. 2021), which is not entropy collapse.

    Args:
        x: (T, C).
    """
    x = x.double()
    return float((x - x.mean(0)).norm() / x.norm())


class LayerOutputs:
    """Context that measures ``token_spread`` of what the numbered modules of a model put out: the layers of its stacks.

    Args:
        model: model that is called on one sequence.
        n_tokens: number of tokens of the sequence.

    Attributes:
        spread: path of a numbered module -> spread of the tokens that it put out last.
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

    def measure(self, sites: Mapping[str, SiteMeasurement]) -> None:
        """Give sites what is measured of layers as a whole.

        That is ``head_distance`` of heads, ``token_spread`` of layers (NaN where an output was not seen), and
        rollout in each stack of self-attention whose maps are all of one size.

        Args:
            sites: module path -> what was measured there, with patterns, in order of execution.
        """
        stack_of = dict(zip(sites, stacks(list(sites), [site.is_cross for site in sites.values()]), strict=True))
        for path, site in sites.items():
            if site.pattern is not None:
                site.scores[HEAD_DISTANCE.name] = [head_distance(site.pattern)[None]]
            site.layer_values["token_spread"] = self.spread.get(layer_of(path, stack_of[path]), math.nan)
        for stack in set(stack_of.values()):
            of_stack = [site for path, site in sites.items() if stack_of[path] == stack and not site.is_cross]
            patterns = [site.pattern for site in of_stack if site.pattern is not None]
            sizes = {size for pattern in patterns for size in pattern.shape[1:]}
            if len(patterns) == len(of_stack) and len(sizes) == 1:  # all are T x T
                for site, rolled in zip(of_stack, rollout(patterns), strict=True):
                    site.rollout = rolled

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
    """Find the layer that a site is in: its path up to the number by which the sites of its stack differ."""
    parts, template = site.split("."), stack.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    differing = [i for i in numbered if i < len(template) and template[i] == "*"]
    return ".".join(parts[: ([*differing, *numbered[-1:], -1][0]) + 1])
