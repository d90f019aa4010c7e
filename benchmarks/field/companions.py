"""torchvision and torchaudio beside a build of torch that they were not made for, such as one of its own for the CPU.

timm, open_clip, braindecode and speechbrain import them; nothing here calls what they could not load.
"""

import importlib
import sys
from types import ModuleType

import torch

# what torchvision's import needs
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a library that is let go takes its operators along


def make_importable() -> None:
    """Have torchvision and torchaudio imported without their own libraries, where these do not load."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # it is not there
    except RuntimeError:
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in _SCHEMAS:
            _libraries[-1].define(schema)
    try:
        importlib.import_module("torchaudio")
    except ImportError:
        pass
    except OSError:
        extension = ModuleType("torchaudio._extension")  # as it is where there are no libraries
        absent = {"_IS_TORCHAUDIO_EXT_AVAILABLE": False, "_IS_ALIGN_AVAILABLE": False}
        vars(extension).update(absent, fail_if_no_align=lambda function: function)
        sys.modules[extension.__name__] = extension
