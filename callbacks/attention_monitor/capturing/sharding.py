"""Heads that tensor parallelism splits over processes: each process computes some of them, and none has all.

A projection of queries whose weight is sharded along its output features gives every process a part of the heads, as
a plain tensor that looks like a smaller number of heads.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_call import AttentionCall
from .provenance import Origins, tensors_in
from .running_modules import Frame
from .torch_functions import KINDS, Kind

_DTENSORS = "torch.distributed.tensor"

_AXES = ("sequences", "heads", "positions", "features")


def may_be_sharded() -> bool:
    """Whether there may be sharded tensors at all in this process, which nothing must be paid for where there are not.

    Parameters that FSDP2 shards do not count: they are whole while their module's forward runs.
    """
    return dist.is_available() and dist.is_initialized() and _DTENSORS in sys.modules


class SplitProjections:
    """The projections of a forward, as far as it takes to see that the heads of an attention call are split."""

    def __init__(self) -> None:
        self._split: list[tuple[int, int, str]] = []  # serial of what was projected, its whole width, why it is split
        self._last_whole = 0  # serial of what was last projected by a weight that is not split

    def forget(self) -> None:
        """Forget the projections of earlier forwards."""
        self._split, self._last_whole = [], 0

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, origins: Origins) -> None:
        """Take note of a function that may project.

        Args:
            func: the function.
            args: arguments it was called with.
            kwargs: arguments it was called with, by name.
            result: what it returned, which the origins have recorded.
            origins: where tensors come from.
        """
        is_dtensor = isinstance(result, sys.modules[_DTENSORS].DTensor)
        if not is_dtensor and not self._split:  # nearly always: nothing to take note of
            return
        if KINDS.get(func) not in (Kind.LAYER, Kind.PRODUCT) or func is F.embedding or not isinstance(result, Tensor):
            return
        given = list(tensors_in((*args, *kwargs.values())))
        weights = [tensor for tensor in given if _is_weight(tensor, origins)]
        if not weights:
            return
        serial = origins.of(result).serial
        data = [tensor for tensor in given if not _is_weight(tensor, origins)]
        if dims := _split_dims(weights, data, result):
            self._split.append((serial, result.shape[-1], _reason("heads", result, dims)))
        else:
            self._last_whole = serial

    def reason(self, call: AttentionCall, frames: Sequence[Frame]) -> str | None:
        """Explain why the numbers of a call would be those of some heads only; None when it has all heads.

        The innermost module that has projected since it began decides: an output projection follows the call, and
        projections of other modules do not make its queries.
        """
        for tensor in (call.query, call.key, call.model_scores):
            if tensor is not None and (dims := _sharded_dims(tensor)):
                axis = _AXES[tensor.placements[dims[0]].dim % tensor.dim()]  # type: ignore[attr-defined]
                return _reason(axis, tensor, dims)
        for frame in reversed(frames):
            projected = [(width, reason) for serial, width, reason in self._split if serial >= frame.start]
            if projected:
                return None if _have_been_gathered([width for width, _ in projected], call) else projected[0][1]
            if self._last_whole >= frame.start:
                return None
        return None


def _widths(call: AttentionCall) -> tuple[int, int]:
    """Return how wide the queries of a call are over all its heads, and its keys; 0 where that is not known."""
    if call.query is None or call.key is None:
        return 0, 0
    return call.shape[1] * call.query.shape[-1], call.key.shape[1] * call.key.shape[-1]


def _have_been_gathered(widths: Sequence[int], call: AttentionCall) -> bool:
    """Whether split projections of these whole widths make no more heads than the call has: it has all of them."""
    q, k = _widths(call)
    return q > 0 and (set(widths) <= {q, k} or list(widths) == [q + 2 * k])


def _sharded_dims(tensor: Tensor) -> list[int]:
    """List the dimensions of the mesh over which a tensor is sharded; one process alone splits nothing."""
    if not isinstance(tensor, sys.modules[_DTENSORS].DTensor):
        return []
    mesh = tensor.device_mesh
    return [i for i, placement in enumerate(tensor.placements) if placement.is_shard() and mesh.size(i) > 1]


def _is_weight(tensor: Tensor, origins: Origins) -> bool:
    """Whether a tensor is a weight, or made of weights alone; FSDP2 makes whole parameters of what it has gathered."""
    return isinstance(tensor, nn.Parameter) or not origins.of(tensor).is_data


def _split_dims(weights: Sequence[Tensor], data: Sequence[Tensor], result: Tensor) -> list[int]:
    """List the dimensions of the mesh over which a projection splits its output features.

    There a weight is sharded, and so is the result, but not as the data are: over sequences or positions.
    """
    dims = _sharded_dims(result)
    if not dims:
        return []
    placements = result.placements  # type: ignore[attr-defined]
    by_weight = {i for tensor in weights for i in _sharded_dims(tensor)}
    as_data = {
        i
        for tensor in data
        for i in _sharded_dims(tensor)
        if tensor.placements[i] == placements[i]  # type: ignore[attr-defined]
    }
    return [i for i in dims if i in by_weight and i not in as_data]


def _reason(what: str, tensor: Tensor, dims: Sequence[int]) -> str:
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    over = " and ".join(
        repr(mesh.mesh_dim_names[i]) if mesh.mesh_dim_names else f"dimension {i} of its mesh" for i in dims
    )
    n = math.prod(map(mesh.size, dims))
    return (
        f"{what} are split over {n} processes (tensor parallelism over {over}), and numbers of different {what} would "
        "be mixed"
    )


_SAMPLED = 8  # entries at either end of a weight: two parts of a split weight differ there already


class ProjectionWeights:
    """The weights that project in a forward: processes that compute the same heads have the same ones."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, int, Tensor]] = []  # serial and width of what was projected, the weight

    def forget(self) -> None:
        """Forget the projections of earlier forwards."""
        self._noted = []

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, origins: Origins) -> None:
        """Take note of a function that may project, as ``SplitProjections.note``."""
        if KINDS.get(func) not in (Kind.LAYER, Kind.PRODUCT) or func is F.embedding or not isinstance(result, Tensor):
            return
        for tensor in tensors_in((*args, *kwargs.values())):
            if _is_weight(tensor, origins) and _is_plain(tensor):
                self._noted.append((origins.of(result).serial, result.shape[-1], tensor.detach()))

    def sample(self, call: AttentionCall, frames: Sequence[Frame]) -> bytes:
        """Sample the weights that a call's queries, keys and values have been projected with.

        Those of the innermost module that has projected to such a width since it began; nothing where none has.

        Args:
            call: the attention call.
            frames: modules that are running, outermost first.
        """
        q, k = _widths(call)
        widths = {q, k, 2 * k, q + 2 * k} - {0}
        for frame in reversed(frames):
            found = [weight for serial, width, weight in self._noted if serial >= frame.start and width in widths]
            if found:
                ends = [end.cpu() for weight in found for end in _ends(weight.flatten())]
                return torch.cat([end.double() for end in ends]).numpy().tobytes()
        return b""


def _ends(numbers: Tensor) -> tuple[Tensor, Tensor]:
    return numbers[:_SAMPLED], numbers[-_SAMPLED:]


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is a matrix of numbers that are all here."""
    is_here = weight.layout == torch.strided and weight.device.type != "meta"
    is_sharded = _DTENSORS in sys.modules and isinstance(weight, sys.modules[_DTENSORS].DTensor)
    return weight.dim() == 2 and weight.is_floating_point() and is_here and not is_sharded
