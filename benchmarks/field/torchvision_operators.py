"""torchvision beside a build of torch that it was not made for, such as one of its own for the CPU."""

import importlib

import torch

# The schemas that its import needs; nothing here calls them.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a library that is let go takes its operators along


def make_importable() -> None:
    """Define torchvision's operators where its own could not be loaded; timm, open_clip and others import it."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # it is not there
    except RuntimeError:
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in _SCHEMAS:
            _libraries[-1].define(schema)
