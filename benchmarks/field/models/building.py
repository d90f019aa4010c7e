"""What the lists of models share: builders that import when they are called, and inputs."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

IMAGES = 3  # not 2 or 4, so that sequences are not as many as heads


def load(path: str) -> Any:
    """Import what is called ``package.module.Name``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def made(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of one class with these arguments."""
    return lambda: load(path)(*args, **options)


def images(size: int, channels: int = 3) -> Callable[[], tuple[torch.Tensor]]:
    """Return a maker of square images."""
    return lambda: (torch.randn(IMAGES, channels, size, size),)


def vectors(*shape: int) -> Callable[[], tuple[torch.Tensor]]:
    """Return a maker of vectors, of a number of sequences."""
    return lambda: (torch.randn(IMAGES, *shape),)


def token_ids(n: int, vocabulary: int = 50) -> torch.Tensor:
    """Draw token ids (B, T), none of which is one of the first few, which are special in many models."""
    return torch.randint(5, vocabulary, (IMAGES, n))


def tokens(n: int) -> Callable[[], tuple[torch.Tensor]]:
    """Return a maker of token ids."""
    return lambda: (token_ids(n),)
