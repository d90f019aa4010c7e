"""What wraps a model: torch's own, and stand-ins for libraries that the suite does without."""

import lightning
import lightning_fabric
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel


def of(home):
    """Let a class be from a module of another library, as the library's own is."""

    def moved(cls):
        cls.__module__ = home
        return cls

    return moved


@of("peft.tuners.lora.model")
class LoraModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model.forward(*args)  # not by calling it, so that its hooks are not run


@of("peft.peft_model")
class PeftModel(nn.Module):
    """Wraps a tuner such as LoRA's, or in prefix and prompt tuning the model itself."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *args):
        return self.base_model(*args)


@of("peft.peft_model")
class PeftModelForCausalLM(PeftModel):
    pass


@of("deepspeed.runtime.engine")
class DeepSpeedEngine(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args):
        return self.module(*args)


def lora(model):
    return PeftModelForCausalLM(LoraModel(model))


def prefix_tuning(model):
    wrapped = PeftModelForCausalLM(model)
    wrapped.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(2, 8)})
    return wrapped


WRAPPERS = {
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "deepspeed": DeepSpeedEngine,
    "averaged": AveragedModel,
    "fabric": lambda model: lightning.Fabric(accelerator="cpu", devices=1).setup(model),
    "fabric, by its other name": lambda model: lightning_fabric.Fabric(accelerator="cpu", devices=1).setup(model),
    "lora": lora,
    "prefix tuning": prefix_tuning,
    "several": lambda model: torch.compile(nn.DataParallel(lora(model))),
}
