"""Molecules: boltz, equiformer-pytorch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..expectation import FieldModel, Kind
from .building import IMAGES, made

MODELS: list[FieldModel] = []


def _add(
    package: str,
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    *kinds: Kind,
    sites: int,
) -> None:
    MODELS.append(FieldModel(package, name, build, inputs, kinds, sites))


# each row of a table of pairs is a sequence, or each column
TRIANGLE = Kind("Attention", "b r h q k", "no_heads")
for node in ("Starting", "Ending"):
    _add(
        "boltz",
        f"TriangleAttention{node}Node",
        made(f"boltz.model.layers.triangular_attention.attention.TriangleAttention{node}Node", 16, 8, 4),
        lambda: (torch.randn(IMAGES, 6, 6, 16), torch.ones(IMAGES, 6, 6)),
        TRIANGLE,
        sites=1,
    )
_add(
    "boltz",
    "AttentionPairBias",
    made("boltz.model.layers.attention.AttentionPairBias", 32, 16, 4),
    lambda: {
        "s": torch.randn(IMAGES, 6, 32),
        "z": torch.randn(IMAGES, 6, 6, 16),
        "mask": torch.ones(IMAGES, 6),
    },
    Kind("AttentionPairBias"),
    sites=1,
)


def _around(x: Tensor) -> Tensor:
    """Cut (B, 12, D) into windows of 8 positions around every 4: (B, 3, 8, D)."""
    return F.pad(x, (0, 0, 2, 2)).unfold(1, 8, 4).mT.contiguous()


_add(
    "boltz",
    "AtomTransformer",
    made(
        "boltz.model.modules.transformersv2.AtomTransformer",
        4,
        8,
        depth=1,
        heads=4,
        dim=32,
        dim_single_cond=32,
    ),
    lambda: {
        "q": torch.randn(IMAGES, 12, 32),
        "c": torch.randn(IMAGES, 12, 32),
        "bias": torch.randn(IMAGES, 3, 4, 8, 4),
        "to_keys": _around,
        "mask": torch.ones(IMAGES, 12),
    },
    Kind("AttentionPairBias", offset=2),
    sites=1,
)

EQUIFORMER: dict[str, Any] = {"num_tokens": 24, "dim": (4, 4), "dim_head": (4, 4), "heads": (2, 2), "num_degrees": 2}
EQUIFORMER |= {"depth": 1, "num_neighbors": 4, "reduce_dim_out": True}
# each atom has keys of its own: its neighbours; a pattern for each degree
for l2, kind in (
    (True, Kind("L2DistAttention", heads=2, is_self=None, offset="none")),
    (False, Kind("MLPAttention", "b q k h", 2, is_self=None, offset="none")),
):
    _add(
        "equiformer_pytorch",
        f"Equiformer {kind.module}",
        made("equiformer_pytorch.Equiformer", l2_dist_attention=l2, **EQUIFORMER),
        lambda: (torch.randint(24, (IMAGES, 8)), torch.randn(IMAGES, 8, 3), torch.ones(IMAGES, 8).bool()),
        kind,
        sites=2,
    )
