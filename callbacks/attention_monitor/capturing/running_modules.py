"""The modules of a model, by their paths."""

import re

import torch
from torch import nn

# These have a fast path for inference that cannot be seen, and that they leave while a function mode is on.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def may_take_fast_path(module: nn.Module) -> bool:
    return (
        not module.training
        and any(getattr(type(module), "forward", None) is kind.forward for kind in _FAST_PATHS)
        and not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()))
    )


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Module -> its path in the model, without what wrappers put into it."""
    at = dict(model.named_modules())  # parents come first
    names = {model: ""}
    for path, module in at.items():
        if module not in names:
            parent, _, child = path.rpartition(".")
            name = names[at[parent]]
            if not _is_wrapped(at[parent], parent, child, module):
                name = f"{name}.{child}" if name else child
            names[module] = name
    return names


def _is_wrapped(parent: nn.Module, path_of_parent: str, child: str, module: nn.Module) -> bool:
    """Whether a module is what its parent wraps: torch.compile, FSDP, checkpoint_wrapper; DataParallel; PEFT."""
    if child in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        return True
    if child == "module":
        return re.search("Parallel|Engine", type(parent).__name__) is not None
    if child == "base_model":
        return "model" in module._modules
    return child == "model" and path_of_parent.rpartition(".")[2] == "base_model"
