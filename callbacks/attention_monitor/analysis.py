"""What a model attends to on one input, for looking into it: maps, what heads are like, and how two models differ.

``plots`` draws what comes out. Shapes: H heads, Q queries, K keys.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .capturing.attention_call import AttentionCall
from .capturing.capture_mode import capture
from .errors import AttentionMonitorError
from .naming import in_order
from .probes.base import Probe
from .probes.position import POSITION_SCORES, position_scores
from .probes.text import TextProbe
from .snapshots import Snapshot
from .statistics.catalogue import resolve_statistics
from .statistics.row_blocks import RowBlock
from .statistics.sites import SiteMeasurement, build_snapshot, column_of
from .statistics.totals import HeadTotals
from .traits import DIAGONAL, PREVIOUS_TOKEN, SINK, SPARSE, UNIFORM

# a head's layer, number, and value
Ranked = tuple[int, int, float]


# What the kinds are decided by, and what else is worth knowing of a head on a text.
HEAD_STATISTICS = (
    "entropy",
    "max_entropy",
    "normalized_entropy",
    "diagonal_mean",
    "previous_token",
    "first_token",
    "past_mass",
    "future_mass",
    "max_weight",
    "mean_distance",
    "effective_keys",
    "sparsity",
    "weight_std",
    "nonfinite_fraction",
)


@dataclass(frozen=True)
class AttentionMaps:
    """What every head of a model attended to on one sequence. Maps are computed when they are asked for.

    Layers are numbered as their sites stand here: those of a stack together, otherwise in order of execution. In a
    decoder that is the number of the layer; in an encoder-decoder the encoder's come first.

    Attributes:
        calls: attention call of each layer, of one sample: of all its windows, where it attends in windows.
        labels: label of each layer, ``L00`` or a module path.
        stacks: stack that each layer belongs to, such as ``decoder.block.*.attn``.
        tokens: labels of the positions, where they are known.
        target_tokens: labels of the decoder's positions, in an encoder-decoder.

    Example:
        >>> import torch
        >>> call = AttentionCall("h.0.attn", torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), is_causal=True)
        >>> maps = AttentionMaps([call], ["L00"], ["h.*.attn"], ["a", "b", "c"])
        >>> maps.pattern(0)[1].tolist()[1]
        [0.5, 0.5, 0.0]
        >>> round(maps.snapshot(["normalized_entropy"]).mean("normalized_entropy"), 3)
        1.0
    """

    calls: Sequence[AttentionCall]
    labels: Sequence[str]
    stacks: Sequence[str]
    tokens: Sequence[str] | None = None
    target_tokens: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.calls)

    def n_heads(self, layer: int) -> int:
        """Return H of a layer."""
        return self._call(layer).shape[1]

    def pattern(self, layer: int) -> Tensor:
        """Compute the weights of the heads of a layer, (H, Q, K), float32 on the CPU; rows sum to 1.

        Of a layer that attends in windows, those of the first one.

        Raises:
            AttentionMonitorError: when there is no such layer.
        """
        return self._call(layer).first_sequences(1).pattern()[0].float().cpu()

    def tokens_of(self, layer: int) -> tuple[Sequence[str] | None, Sequence[str] | None]:
        """Return the labels of the queries and of the keys of a layer; None where they are not known."""
        call = self._call(layer)
        Q, K = call.shape[2:]
        of_decoder = self.target_tokens if self.target_tokens is not None else self.tokens
        queries, keys = self.tokens, self.tokens
        if not call.is_self_attention:
            queries = self.target_tokens
        elif self._is_of_decoder(layer):
            queries, keys = of_decoder, of_decoder
        if keys is not None and call.sinks_in_pattern:
            keys = [*keys, *["(sink)"] * call.n_sinks]
        return (
            queries if queries is not None and len(queries) == Q else None,
            keys if keys is not None and len(keys) == K else None,
        )

    def snapshot(self, statistics: Sequence[str] = HEAD_STATISTICS, step: int = 0) -> Snapshot:
        """Take statistics of every head, and the scores that roles follow from: ``sink``, ``positional``.

        Args:
            statistics: names of statistics; by default those that kinds and flow follow from.
            step: step of training.
        """
        resolved = resolve_statistics(statistics)
        sites = {}
        with torch.no_grad():
            for call in self.calls:
                site = SiteMeasurement(HeadTotals(resolved), not call.is_self_attention, call.shape[1])
                site.add(call, position_scores)
                sites[call.site] = site
        columns = [*map(column_of, resolved), *POSITION_SCORES]
        return build_snapshot(step, "text", sites, columns, self.tokens)

    def _is_of_decoder(self, layer: int) -> bool:
        """Whether a layer of self-attention is after the first stack, or beside the last cross-attention."""
        roots = [re.split(r"\.(?:\*|\d+)", stack)[0] for stack in self.stacks]  # up to the number of the layer
        cross = [root for root, call in zip(roots, self.calls, strict=True) if not call.is_self_attention]
        return self.stacks[layer] != self.stacks[0] or roots[layer] in cross[-1:]

    def _call(self, layer: int) -> AttentionCall:
        if not 0 <= layer < len(self.calls):
            raise AttentionMonitorError(f"There is no layer {layer}: this model has layers 0 to {len(self.calls) - 1}.")
        return self.calls[layer]


def attention_maps(
    model: nn.Module, text: str | Probe, tokenizer: Any = None, *, sites: str | Sequence[str] | None = None
) -> AttentionMaps:
    """Look at what a model attends to when it reads a text.

    Args:
        model: model that is called in evaluation mode, without gradients; left as it was.
        text: text that it reads, as ``model(token_ids)``; or a ``Probe``, of which the first sequence is looked at: a
            ``TextProbe`` of token ids, a ``BatchProbe`` for other inputs.
        tokenizer: anything with ``encode(text)`` and ``decode(ids)``; None: the probe's own.
        sites: shell patterns for the module paths to look at; None: all.

    Example:
        >>> from attention_monitor import BatchProbe
        >>> model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> maps = attention_maps(model, BatchProbe(torch.randn(1, 5, 8)))
        >>> len(maps), maps.pattern(0).shape
        (1, torch.Size([2, 5, 5]))

    Raises:
        AttentionMonitorError: when the text cannot be encoded, or the model does not take it.
        NoAttentionError: when the model runs it without an attention call.
    """
    probe = TextProbe(text) if isinstance(text, str) else text
    encoded = probe.encode(tokenizer)
    calls = encoded.run(model, capture(model, sites))
    order, stacks, labels = in_order([call.site for call in calls], [not call.is_self_attention for call in calls])
    return AttentionMaps([calls[i].first_samples(1) for i in order], labels, stacks, encoded.labels)


def top_attended(pattern: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """List for each query the keys with the largest weights, and these weights, from the largest.

    Keys without weight are left out.

    Args:
        pattern: (Q, K) of a head, or a mean over heads.
        k: number of keys for each query, at most.

    Example:
        >>> top_attended(torch.tensor([[1.0, 0.0], [0.25, 0.75]]), 2)
        [[(0, 1.0)], [(1, 0.75), (0, 0.25)]]
    """
    weights, keys = pattern.topk(min(k, pattern.shape[-1]), dim=-1)  # (Q, k) each
    rows = zip(keys.tolist(), weights.tolist(), strict=True)
    return [[(key, weight) for key, weight in zip(*row, strict=True) if weight > 0] for row in rows]


# What a map may look like: most of the weight at one kind of place, or spread evenly, or on few keys.
KINDS = (DIAGONAL, PREVIOUS_TOKEN, SINK, UNIFORM, SPARSE)


def head_kinds(values: Mapping[str, Any]) -> list[list[str]]:
    """Name the ``KINDS`` that each head of a layer is of, none or several.

    Args:
        values: statistic -> (H,), of ``HEAD_STATISTICS``, as ``maps.snapshot().values`` has them.

    Example:
        >>> import numpy as np
        >>> even = {name: np.array([0.1]) for name in HEAD_STATISTICS} | {"normalized_entropy": np.array([0.99])}
        >>> head_kinds(even | {"weight_std": np.array([0.01])})
        [['uniform']]

    Raises:
        AttentionMonitorError: when one is missing.
    """
    if absent := [name for name in HEAD_STATISTICS if name not in values]:
        raise AttentionMonitorError(
            f"head_kinds needs {', '.join(absent)} too; maps.snapshot() takes all that it needs."
        )
    found = [(kind.name, kind.holds(values).tolist()) for kind in KINDS]
    return [[name for name, holds in found if holds[head]] for head in range(len(values["entropy"]))]


def ranking(snapshot: Snapshot, name: str) -> list[Ranked]:
    """Put heads in order, from the largest value of a statistic or score: (layer, head, value), without NaN.

    Args:
        snapshot: what was seen of the heads.
        name: name of one of its columns.

    Example:
        >>> import numpy as np
        >>> from attention_monitor.snapshots import SiteRecord
        >>> records = [SiteRecord("L00", "h.0", values={"entropy": np.array([0.5, 1.5])})]
        >>> ranking(Snapshot(0, "live", records), "entropy")
        [(0, 1, 1.5), (0, 0, 0.5)]
    """
    return rank_heads([values[name] for values in snapshot.values])


def rank_heads(values: Sequence[Any]) -> list[Ranked]:
    """Put heads in order, from the largest of the values (H,) of each layer: (layer, head, value), without NaN."""
    heads = [(layer, head, value) for layer, row in enumerate(values) for head, value in enumerate(row.tolist())]
    return sorted((one for one in heads if not math.isnan(one[2])), key=lambda one: -one[2])


def attention_flow(snapshot: Snapshot) -> dict[str, list[np.ndarray]]:
    """Return where attention goes in each layer, as shares (H,): to the token itself, to earlier and to later ones.

    Needs ``diagonal_mean``, ``past_mass`` and ``future_mass``; for ``plot_flow``. Later tokens are left out where
    nothing looks at them.
    """
    lines = {"itself": "diagonal_mean", "earlier tokens": "past_mass", "later tokens": "future_mass"}
    shares = {what: [values[name] for values in snapshot.values] for what, name in lines.items()}
    if not any((share > 0).any() for share in shares["later tokens"]):
        del shares["later tokens"]
    return shares


def weight_shift(before: AttentionMaps, after: AttentionMaps) -> list[np.ndarray]:
    """Measure how much of each head's weight is elsewhere, (H,) for each layer, 0..1.

    Total variation distance, half the sum over keys of |difference|, mean over rows that see two keys or more.

    Raises:
        AttentionMonitorError: when the two do not have the same layers, heads and tokens.
    """
    sizes = [[call.shape for call in maps.calls] for maps in (before, after)]
    for name, found in (
        ("tokens", [before.tokens, after.tokens]),
        ("layers", [before.labels, after.labels]),
        ("sizes of maps (B, H, Q, K)", sizes),
    ):
        if found[0] != found[1]:
            raise AttentionMonitorError(
                f"Only models with the same layers and heads that read the same tokens can be compared; {name} are "
                f"{_short(found[0])} and {_short(found[1])}."
            )
    changes = []
    for a, b in zip(before.calls, after.calls, strict=True):
        one, other = (RowBlock(call, 0, call.shape[2]) for call in (a, b))
        distance = (one.weights - other.weights).abs().sum(-1) / 2  # (1, H, Q)
        counted = one.informative.expand(distance.shape)
        share = distance.masked_fill(~counted, 0).sum((0, 2)) / counted.sum((0, 2))
        changes.append(share.float().cpu().numpy())
    return changes


def _short(x: Any) -> str:
    text = str(x)
    return text if len(text) <= 100 else text[:99] + "…"
