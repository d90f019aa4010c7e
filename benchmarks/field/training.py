"""Whether a training run is the same, to the bit, with the monitor and without it."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attention_monitor import AttentionRecorder, NoAttentionError

from .expectation import FieldModel, call

_STEPS = 2

DIFFERS = "differs"


def numbers_of(output: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in what a model returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from numbers_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from numbers_of(value)


def randomise(model: nn.Module) -> None:
    """Give all parameters numbers for which patterns are far from uniform, and set every dropout to 0.

    A model as it is built often looks at everything alike, so that heads could change places unseen.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        with torch.no_grad():
            if parameter.dim() >= 2:
                fan_in = max(1, parameter.numel() // parameter.shape[0])
                parameter.normal_(std=1.5 * fan_in**-0.5)
            else:
                parameter.normal_(std=0.1).add_(0.0 if name.endswith("bias") else 1.0)
    for module in model.modules():
        for name in ("p", "dropout_p", "drop_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def make(said: FieldModel) -> tuple[nn.Module, Any]:
    """Build a model and its inputs, the same at every call, in training mode without randomness."""
    torch.manual_seed(0)
    model = said.build().train()
    torch.manual_seed(1)
    randomise(model)
    torch.manual_seed(2)
    return model, said.inputs()


def train(said: FieldModel, *, watched: bool) -> tuple[list[float], list[Tensor]]:
    """Train a model for a few steps and return its losses, and its weights afterwards."""
    model, inputs = make(said)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    recorder = AttentionRecorder(model, every_n_steps=1) if watched else None
    for step in range(_STEPS):
        torch.manual_seed(step)
        output: Any = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with recorder.step(step) if recorder is not None else nullcontext():
                    output = call(model, inputs)
            except NoAttentionError:
                pass
        loss = torch.stack([x.float().square().mean() for x in numbers_of(output) if x.requires_grad]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in model.parameters()]


def is_unchanged(said: FieldModel) -> str:
    """Tell whether losses and weights are the same with the monitor and without: ``identical``, or what differs."""
    plain, weights = train(said, watched=False)
    losses, ours = train(said, watched=True)
    if not all(torch.tensor(plain).isfinite()):
        return "not finite"
    if plain == losses and all(map(torch.equal, weights, ours)):
        return "identical"
    if train(said, watched=False)[0] != plain:
        return "not repeatable"
    return DIFFERS
