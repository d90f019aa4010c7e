"""A batch of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import AttentionMonitorError
from .base import EncodedProbe, Probe, ProbeBatch
from .position import POSITION_SCORES, position_scores


@dataclass(frozen=True)
class BatchProbe(Probe):
    """A batch of your own: images, other modalities, encoder and decoder inputs, a validation batch.

    The monitor's statistics are taken of it, its first sequence is drawn, and heads are scored as by ``TextProbe``.

    Attributes:
        batch: what the model is called on: a tensor for ``model(batch)``, a tuple for ``model(*batch)``, a dict for
            ``model(**batch)``.
        name: name that its tags begin with.
        every: sampled steps from one run to the next.

    Example:
        >>> import torch
        >>> BatchProbe({"pixels": torch.zeros(1, 3, 8, 8)}).encode().is_drawn
        True
    """

    batch: Any
    name: str = "batch"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        if not isinstance(self.batch, Tensor | list | tuple | Mapping):
            raise AttentionMonitorError(
                f"The batch of the probe {self.name!r} must be a tensor, a tuple of arguments or a dict of them, got "
                f"{type(self.batch).__name__}."
            )
        batch = ProbeBatch(self.batch, position_scores)
        return EncodedProbe(self.name, [batch], POSITION_SCORES, is_drawn=True, with_statistics=True, every=self.every)
