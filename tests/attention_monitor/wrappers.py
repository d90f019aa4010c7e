"""What wraps a model: torch's own, and stand-ins for libraries that the suite does without."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


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
    """With what it wraps: a tuner such as LoRA's."""

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


WRAPPERS = {
    "compile": torch.compile,
    "data parallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "deepspeed": DeepSpeedEngine,
    "peft": lora,
    "several": lambda model: torch.compile(nn.DataParallel(lora(model))),
}
