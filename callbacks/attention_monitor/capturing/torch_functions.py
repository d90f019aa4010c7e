"""What the functions of torch make of the tensors that they are given: products, projections, the same numbers anew."""

from enum import Enum, auto

import torch
import torch.nn.functional as F
from torch import Tensor


class Kind(Enum):
    """What a function does that matters to attention; most functions do nothing of the kind."""

    PRODUCT = auto()  # of two tensors, either of which may be a weight
    LAYER = auto()  # a product with a weight
    TIMES = auto()  # entry by entry


PRODUCTS = frozenset({
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm,
    torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.einsum,
})  # fmt: skip

KINDS = {
    **dict.fromkeys(PRODUCTS, Kind.PRODUCT),
    **dict.fromkeys((F.linear, F.bilinear, F.embedding, F.conv1d, F.conv2d, F.conv3d), Kind.LAYER),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), Kind.TIMES),
}  # fmt: skip

# Functions that leave the weights of a softmax what they are: dropout, casts, views, choices of rows and columns.
HARMLESS = frozenset({
    F.dropout, torch.dropout, F.alpha_dropout, F.feature_alpha_dropout, Tensor.to, Tensor.float, Tensor.half,
    Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as, Tensor.contiguous, Tensor.clone, torch.clone,
    Tensor.detach, Tensor.view, Tensor.reshape, torch.reshape, Tensor.permute, torch.permute, Tensor.transpose,
    torch.transpose, Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.unsqueeze, torch.unsqueeze,
    Tensor.squeeze, torch.squeeze, Tensor.__getitem__, Tensor.expand, Tensor.movedim, torch.movedim, Tensor.swapaxes,
    Tensor.narrow, torch.narrow, Tensor.select, torch.select, Tensor.chunk, torch.chunk, Tensor.split, torch.split,
    Tensor.unbind, torch.unbind, Tensor.view_as, Tensor.expand_as, Tensor.t, torch.t,
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
})  # fmt: skip
