"""Random tokens, repeated: what induction heads are found by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capturing.attention_call import AttentionCall
from ..errors import AttentionMonitorError, is_whole
from ..snapshots import HeadScore
from ..traits import DUPLICATE_TOKEN, INDUCTION, PREVIOUS_TOKEN
from .base import EncodedProbe, Probe, ProbeBatch, is_of_tokens
from .tokens import vocab_size_of

REPEAT_SCORES = (
    HeadScore("induction", threshold=INDUCTION.threshold),
    HeadScore("duplicate_token", threshold=DUPLICATE_TOKEN.threshold),
    HeadScore("previous_token", threshold=PREVIOUS_TOKEN.threshold),
)


@dataclass(frozen=True)
class RepeatedTokensProbe(Probe):
    """Random tokens, repeated: what follows can only be known from what followed the first time (Olsson et al. 2022).

    A beginning-of-sequence token, then ``n_tokens`` random tokens ``n_repeats`` times. Scores, mean weights over rows
    and draws: ``induction``, from a token in a later repeat to those that followed its earlier occurrences;
    ``duplicate_token``, to these occurrences; ``previous_token``, to the token before.

    Attributes:
        vocab_size: number of tokens to draw from; None: as many as the tokenizer has.
        n_tokens: number of tokens that are repeated.
        n_repeats: number of times that they stand there, the first included.
        n_draws: number of sequences.
        bos: beginning-of-sequence token; None: the tokenizer's, or a random one.
        seed: seed of the draws.
        name: name that its tags begin with.
        every: sampled steps from one run to the next.

    Example:
        >>> [batch] = RepeatedTokensProbe(vocab_size=50, n_tokens=5, n_repeats=2, bos=0).encode().batches
        >>> batch.inputs.shape, bool((batch.inputs[:, 1:6] == batch.inputs[:, 6:]).all())
        (torch.Size([4, 11]), True)
    """

    vocab_size: int | None = None
    n_tokens: int = 25
    n_repeats: int = 4
    n_draws: int = 4
    bos: int | None = None
    seed: int = 0
    name: str = "repeated"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        size = vocab_size_of(tokenizer) if self.vocab_size is None else self.vocab_size
        if size is None:
            raise AttentionMonitorError(
                f"The probe {self.name!r} draws random tokens and no tokenizer says how many there are: give "
                "RepeatedTokensProbe(vocab_size=...)."
            )
        twos = (size, self.n_tokens, self.n_repeats)
        if not (all(is_whole(n, 2) for n in twos) and is_whole(self.n_draws, 1) and is_whole(self.seed, 0)):
            raise AttentionMonitorError(
                f"The probe {self.name!r} needs vocab_size, n_tokens and n_repeats of 2 or more, n_draws of 1 or more "
                f"and a seed of 0 or more, got {size}, {self.n_tokens}, {self.n_repeats}, {self.n_draws} and "
                f"{self.seed}."
            )
        bos = getattr(tokenizer, "bos_token_id", None) if self.bos is None else self.bos
        special = set(getattr(tokenizer, "all_special_ids", None) or ())
        ordinary = torch.tensor([token for token in range(size) if token not in special])
        if not len(ordinary) or not (bos is None or is_whole(bos, 0)):
            raise AttentionMonitorError(
                f"The probe {self.name!r} needs tokens that are not special and a token to begin with, got "
                f"{len(ordinary)} of {size} and bos={bos!r}; give vocab_size= and bos=."
            )
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for _ in range(self.n_draws):
            first = torch.randint(size, (1,), generator=generator) if bos is None else torch.tensor([bos])
            if len(ordinary) > 2 * self.n_tokens:  # no token twice in a block: where to look is then one place
                block = ordinary[torch.randperm(len(ordinary), generator=generator)[: self.n_tokens]]
            else:
                block = ordinary[torch.randint(len(ordinary), (self.n_tokens,), generator=generator)]
            rows.append(torch.cat([first, block.repeat(self.n_repeats)]))
        tokens = torch.stack(rows)
        batch = ProbeBatch(tokens, partial(repeat_scores, n_tokens=self.n_tokens, shape=(len(rows), tokens.shape[1])))
        return EncodedProbe(self.name, [batch], REPEAT_SCORES, every=self.every)


def repeat_scores(call: AttentionCall, n_tokens: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Average over rows the weight on certain earlier tokens, (B, H); the first token is no part of the repeats.

    Args:
        call: self-attention call on the probe's batch.
        n_tokens: number of tokens that are repeated.
        shape: (B, T) of the batch; a call of another shape is not scored.
    """
    if not is_of_tokens(call, shape):
        return {}
    pattern = call.pattern()  # (B, H, T, T)
    T = shape[1]

    def mean_weight(offsets: Sequence[int], first_rows: Sequence[int]) -> Tensor:
        # entry t of the diagonal stands in row t + offset
        total = [
            pattern.diagonal(-offset, -2, -1)[..., row - offset :].sum(-1)
            for offset, row in zip(offsets, first_rows, strict=True)
        ]
        return torch.stack(total).sum(0) / (T - first_rows[0])

    back = range(n_tokens, T - 1, n_tokens)  # to each earlier occurrence; row 1 + n_tokens is the first that has one
    rows = [1 + offset for offset in back]
    return {
        "induction": mean_weight([offset - 1 for offset in back], rows),
        "duplicate_token": mean_weight(back, rows),
        "previous_token": mean_weight([1], [1]),
    }
