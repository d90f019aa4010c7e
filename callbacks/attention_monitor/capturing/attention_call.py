"""One attention call of a model: what it worked with, and the scores and probabilities that follow from it.

Shapes: B sequences, H query heads, H_kv key heads, Q queries, K keys, D head dimensions, R rows of a block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AttentionMonitorError
from .masks import last_visible, mask_limit, padding_of, rows_of, visible_by


class NotUnderstoodError(AttentionMonitorError):
    """An attention call in a form that no recogniser reads; the message is the reason."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one attention call of a model worked with, detached from its graph.

    Either ``query`` and ``key`` are known, or the model computed its scores itself: ``model_scores``; or it made other
    weights of them: ``model_weights``.

    B counts sequences: ``windows`` of each sample of the batch, one sample after the other.

    Attributes:
        site: path of the module that made the call, with ``[i]`` when it makes several in one forward.
        query: queries (B, H, Q, D).
        key: keys (B, H_kv, K, D); H is a multiple of H_kv.
        mask: mask broadcastable to (B, H, Q, K); bool (True: may attend) or a number added to the score.
        is_causal: whether row i sees keys 0..i only.
        scale: factor on q . k.
        score_mod: function of scaled scores (B, H, R, K) and the number of their first row; returns what the model
            made of them before masking: softcap, position biases.
        mask_mod: function of the number of the first row and that of the row after the last; returns which keys these
            rows may see: bool, broadcastable to (B, H, R, K).
        model_scores: scores (B, H, Q, K + n_sinks) that the model gave to its softmax.
        model_weights: weights (B, H, Q, K) that the model multiplied its values with, where it mixed those of several
            heads: they may be negative, and rows need not sum to 1.
        n_sinks: number of last columns of the scores that are not positions: learned sinks, the keys that
            ``add_bias_kv`` and ``add_zero_attn`` append. They take their share of the softmax.
        sinks_in_pattern: whether the model keeps those columns, so that they are columns of the pattern too.
        self_attention: whether queries and keys come from the same sequence; None: not known.
        value: values (B, H_kv, K, D_v), where known.
        windows: sequences of each sample: windows of an image, rows or columns of a table.
        over: what keys are. ``tokens``; ``neighbours``, which every query has of its own; ``channels``, that is
            features, in cross-covariance attention.
        query_positions: (Q,) position of each query among the keys of a self-attention; None: the first query is at
            the first key, or the last one at the last key that it may see.
        positions_known: whether it is known where the queries of a self-attention are among its keys.
        with_gradients: whether the model recorded gradients: a training forward, and no rollout or sampling beside it.
        assumed: what was taken for granted of its axes, in words; None: all of them were seen to be made.

    Example:
        >>> x = torch.randn(2, 4, 5, 8)  # (B, H, T, D)
        >>> call = AttentionCall("attn", query=x, key=x, is_causal=True, scale=8**-0.5)
        >>> call.shape, call.is_self_attention
        ((2, 4, 5, 5), True)
    """

    site: str
    query: Tensor | None
    key: Tensor | None
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float = 1.0
    score_mod: Callable[[Tensor, int], Tensor] | None = None
    mask_mod: Callable[[int, int], Tensor] | None = None
    model_scores: Tensor | None = None
    model_weights: Tensor | None = None
    n_sinks: int = 0
    sinks_in_pattern: bool = False
    self_attention: bool | None = None
    value: Tensor | None = None
    windows: int = 1
    over: Literal["tokens", "neighbours", "channels"] = "tokens"
    query_positions: Tensor | None = None
    positions_known: bool = True
    with_gradients: bool = True
    assumed: str | None = None

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K) of the pattern."""
        if (given := self.model_scores if self.model_weights is None else self.model_weights) is not None:
            B, H, Q, columns = given.shape
        else:
            assert self.query is not None
            assert self.key is not None
            (B, H, Q, _), columns = self.query.shape, self.key.shape[2]
        return B, H, Q, columns if self.sinks_in_pattern else columns - self.n_sinks

    @property
    def n_samples(self) -> int:
        """Number of samples of the batch, of ``windows`` sequences each."""
        return self.shape[0] // max(1, self.windows)

    @property
    def n_positions(self) -> int:
        """Number of keys that are positions of a sequence."""
        return self.shape[3] - (self.n_sinks if self.sinks_in_pattern else 0)

    @property
    def device(self) -> torch.device:
        """Device of queries and keys, or of the scores."""
        return self.query_or_scores.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 model: nothing is accumulated in half precision."""
        return torch.promote_types(self.query_or_scores.dtype, torch.float32)

    @property
    def is_self_attention(self) -> bool:
        """Whether queries and keys come from the same sequence; where that is not known, whether they are as many."""
        return self.shape[2] == self.n_positions if self.self_attention is None else self.self_attention

    @property
    def has_positions(self) -> bool:
        """Whether queries have positions among the keys: in self-attention, unless the keys have been pooled."""
        if not self.is_self_attention or self.over == "channels" or not self.positions_known:
            return False
        return self.query_positions is not None or (self.over == "tokens" and self.n_positions >= self.shape[2])

    @property
    def note(self) -> str:
        """What has to be known to read the numbers of the call, in a sentence's words; empty where nothing has."""
        notes = [self.assumed] if self.assumed else []
        if self.over == "channels":
            notes.append("queries and keys are channels, so that there are no positions")
        if self.over == "neighbours":
            notes.append("every query has keys of its own")
        if self.over == "tokens" and self.self_attention and not self.positions_known:
            notes.append("where its queries are among its keys is not known")
        if self.model_weights is not None:
            notes.append("its weights are mixed across heads after the softmax, and are no distribution")
        return "; ".join(notes)

    def nonfinite(self, which: Literal["query", "key", "value"]) -> Tensor:
        """Mark vectors with NaN or infinity: 1 there, else 0, (B, H, Q or K); NaN where the vectors are not known."""
        if which not in self._nonfinite:
            self._nonfinite[which] = self._count_nonfinite(which)
        return self._nonfinite[which]

    @cached_property
    def _nonfinite(self) -> dict[str, Tensor]:
        return {}

    def _count_nonfinite(self, which: Literal["query", "key", "value"]) -> Tensor:
        B, H, Q, K = self.shape
        vectors = {"query": self.query, "key": self.key, "value": self.value}[which]
        if vectors is None:
            n = Q if which == "query" else K
            return torch.full((B, H, n), torch.nan, dtype=self.compute_dtype, device=self.device)
        low, high = vectors.aminmax(dim=-1)  # NaN is handed on; isfinite() would take as much memory as the vectors
        bad = ~(low.isfinite() & high.isfinite())
        return bad.repeat_interleave(H // bad.shape[1], 1).to(self.compute_dtype)

    @cached_property
    def query_offset(self) -> int:
        """Position of query row 0 among the keys of a self-attention, as earlier tokens may be cached.

        The last row is taken to be at the last key that it may see.
        """
        Q = self.shape[2]
        if self.query_positions is not None:
            return int(self.query_positions[0]) if Q else 0
        if not self.is_self_attention or self.is_causal or self.n_positions == Q or Q == 0:
            return 0
        visible = self.visible(Q - 1, Q)
        last = None if visible is None else last_visible(visible[..., : self.n_positions])
        return max(0, (self.n_positions - 1 if last is None else last) - (Q - 1))

    @cached_property
    def positions_are_a_run(self) -> bool:
        """Whether each query lies one position after the one before."""
        positions = self.query_positions
        return positions is None or bool((positions.diff() == 1).all())

    def positions_of(self, row: Tensor) -> Tensor:
        """Return the position among the keys of some query rows, (R,)."""
        if self.query_positions is None:
            return row + self.query_offset
        return self.query_positions.to(row.device)[row]

    def sequences(self, chosen: slice | Tensor) -> "AttentionCall":
        """Return the same call on some of its B sequences only, each taken for a sample of its own.

        Of a call with a ``score_mod`` or ``mask_mod`` these have to be the first ones.
        """
        B = self.shape[0]

        def of(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 < B else x[chosen]

        return replace(
            self,
            query=of(self.query),
            key=of(self.key),
            value=of(self.value),
            mask=of(self.mask),
            model_scores=of(self.model_scores),
            model_weights=of(self.model_weights),
            windows=1,
        )

    def first_sequences(self, n: int) -> "AttentionCall":
        """Return the same call on the first ``n`` sequences only."""
        return self.sequences(slice(0, n))

    def first_samples(self, n: int) -> "AttentionCall":
        """Return the same call on the first ``n`` samples only, each with all of its windows."""
        return replace(self.sequences(slice(0, n * self.windows)), windows=self.windows)

    def scores(
        self, start: int, stop: int, out: Tensor | None = None, hidden: float = -torch.inf
    ) -> tuple[Tensor, Tensor]:
        """Compute the scores of query rows ``start`` to ``stop``.

        Args:
            start: first row.
            stop: the row after the last.
            out: buffer (B * H * R * K' or more,) of ``compute_dtype`` for the scores. Without it they may be the
                model's own tensor, so do not write to them.
            hidden: score of a key that is masked by a bool mask, by causality or by -inf.

        Returns:
            scores: scores (B, H, R, K'), K' <= K + n_sinks: keys that no row of a causal call may see are left out.
                Keys masked by a number (-1e9, finfo.min) have that added to their score.
            allowed: which keys a row may see: bool, broadcastable to ``scores``.
        """
        if self.model_weights is not None:
            rows = self.model_weights[:, :, start:stop].to(self.compute_dtype).log()  # NaN where negative
            return _at_least(hidden, rows, out), self._visible(start, stop)
        if self.model_scores is not None:
            rows = self.model_scores[:, :, start:stop]
            return _at_least(hidden, rows.to(self.compute_dtype), out), ~(rows <= self._limit)
        scores = self._scaled_products(start, stop, out)  # (B, H, R, K')
        R, K = scores.shape[2:]
        allowed = torch.ones((R, K), dtype=torch.bool, device=scores.device)
        if self.is_causal:
            allowed.tril_(start)
        if self.score_mod is not None:
            scores = self.score_mod(scores, start)
            allowed = allowed & ~(scores <= mask_limit(scores))  # it may mask too
            scores = _at_least(hidden, scores, out)
        if self.is_causal:
            later = torch.ones((R, max(0, K - start)), dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., start:].masked_fill_(later, hidden)  # the keys before are seen by every row
        if (visible := self.visible(start, stop)) is not None:
            allowed = allowed & visible[..., :K]
            if self.mask is not None and self.mask.dtype != torch.bool:
                added = rows_of(self.mask, start, stop).to(scores.dtype).clamp(min=hidden)
            else:  # added, as scaled_dot_product_attention does: NaN in a masked key stays NaN
                added = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, hidden)
            scores += added[..., :K]
            if hidden > -torch.inf and not self._is_finite:
                # a masked key that is infinite is of no account if it makes the score -inf
                scores.masked_fill_(~visible[..., :K] & scores.isneginf(), hidden)
        return scores, allowed

    def _scaled_products(self, start: int, stop: int, out: Tensor | None) -> Tensor:
        """Compute scale * q . k, (B, H, R, K'), of some rows and the keys that one of them may see."""
        assert self.query is not None
        q = self.query[:, :, start:stop].to(self.compute_dtype)  # (B, H, R, D)
        k = self._key_for_scores  # (B * H_kv, K, D)
        (B, H, R, D), n = q.shape, k.shape[0]
        K = min(stop, k.shape[1]) if self.is_causal else k.shape[1]
        out = q.new_empty(B * H * R * K) if out is None else out[: B * H * R * K]
        # the H / H_kv query heads that share a key head become more rows of one matrix product
        products = out.view(n, B * H * R // max(1, n), K)
        with _full_precision():
            rows = q.reshape(*products.shape[:2], D)
            torch.baddbmm(products, rows, k[:, :K].mT, beta=0, alpha=self.scale, out=products)
        return out.view(B, H, R, K)

    def pattern(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute the attention probabilities (B, H, Q, K) before dropout, float32 (float64 for a float64 model).

        Rows sum to 1, or to less where a sink takes the rest, or to anything where the model mixed heads. Rows that may
        see no key are 0, as scaled_dot_product_attention makes them; NaN is left as it is.

        Args:
            start: first query row.
            stop: the row after the last; None: all from ``start``.

        Example:
            >>> zeros = torch.zeros(1, 1, 3, 4)  # (B, H, T, D): all scores are alike
            >>> AttentionCall("attn", query=zeros, key=zeros, is_causal=True).pattern()[0, 0]
            tensor([[1.0000, 0.0000, 0.0000],
                    [0.5000, 0.5000, 0.0000],
                    [0.3333, 0.3333, 0.3333]])
        """
        K = self.shape[3]
        if self.model_weights is not None:
            return self.model_weights[:, :, start:stop].to(self.compute_dtype)
        scores, _ = self.scores(start, self.shape[2] if stop is None else stop)
        pattern = scores.softmax(-1).masked_fill_(scores.isneginf().all(-1, keepdim=True), 0)[..., :K]
        return F.pad(pattern, (0, K - pattern.shape[-1]))

    def visible(self, start: int, stop: int) -> Tensor | None:
        """Return which keys rows ``start`` to ``stop`` may see apart from causality; None: all of them.

        Returns:
            visible: bool, broadcastable to (B, H, R, K).
        """
        if self.model_weights is not None:
            return self.model_weights[:, :, start:stop] != 0
        if self.model_scores is not None:
            return ~(self.model_scores[:, :, start:stop] <= self._limit)
        if self.mask_mod is not None:
            return self.mask_mod(start, stop)[: self.shape[0]]
        return None if self.mask is None else visible_by(rows_of(self.mask, start, stop))

    @cached_property
    def padded_queries(self) -> Tensor | None:
        """Rows of padding: bool, broadcastable to (B, H, Q); None where no mask of a self-attention shows any."""
        Q, K = self.shape[2], self.n_positions
        has_mask = self.mask is not None or self.mask_mod is not None
        if not has_mask and self.model_scores is None and self.model_weights is None:
            return None
        if not self.has_positions or Q != K or Q == 0 or not self.positions_are_a_run or self.query_offset != 0:
            return None
        return padding_of(self._visible, Q)

    def _visible(self, start: int, stop: int) -> Tensor:
        visible = self.visible(start, stop)
        assert visible is not None
        return visible

    @cached_property
    def _key_for_scores(self) -> Tensor:
        assert self.key is not None
        return self.key.to(self.compute_dtype).expand(self.shape[0], -1, -1, -1).flatten(0, 1)  # (B * H_kv, K, D)

    @cached_property
    def _is_finite(self) -> bool:
        """Whether queries and keys are."""
        return all(bool(x.isfinite().all()) for x in (self.query, self.key) if x is not None)

    @cached_property
    def _limit(self) -> Tensor:
        assert self.model_scores is not None
        return mask_limit(self.model_scores)

    @property
    def query_or_scores(self) -> Tensor:
        """The scores or weights that the model computed itself, or else the queries."""
        tensor = self.model_weights if self.model_scores is None else self.model_scores
        tensor = self.query if tensor is None else tensor
        assert tensor is not None
        return tensor


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32, also where training has asked for less: its numbers are looked at here, not made."""
    chosen = torch.get_float32_matmul_precision()
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def _at_least(lowest: float, scores: Tensor, out: Tensor | None) -> Tensor:
    """Return scores of which none is below ``lowest``, in ``out`` where there is one."""
    if out is None:
        return scores if lowest == -torch.inf else scores.clamp(min=lowest)
    return torch.clamp(scores, min=lowest, out=out[: scores.numel()].view(scores.shape))
