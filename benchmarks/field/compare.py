"""What capture made of a model, beside the truth.

Shapes: B sequences and all that is batch-like, H heads, Q queries, K keys.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_monitor import AttentionCall, NoAttentionError, capture

from .expectation import call
from .truth import TrueSite

TOLERANCE = 1e-4

VERDICTS = ("right", "refused with a sentence", "left out in silence", "wrong")  # from good to bad


@dataclass
class Outcome:
    """What became of a model's sites.

    Attributes:
        verdicts: verdict of each site, and of each call that is no site.
        found: number of calls that capture handed out.
        heads: heads of each of them.
        error: greatest difference of a pattern; None: none could be compared.
        kinds_right: number of sites whose being self- or cross-attention is known and said rightly.
        kinds_known: number of sites that were found and of which it is known.
        sentences: what was said of what is not shown.
        notes: what is wrong, in a few words each.
    """

    verdicts: list[str] = field(default_factory=list)
    found: int = 0
    heads: list[int] = field(default_factory=list)
    error: float | None = None
    kinds_right: int = 0
    kinds_known: int = 0
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst of the verdicts."""
        return max(self.verdicts, key=VERDICTS.index, default="right")


def captured(model: nn.Module, inputs: Any) -> tuple[list[AttentionCall], list[str]]:
    """Run a model under capture and return its calls, and what was said."""
    sentences = []
    calls: list[AttentionCall] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # the same formula as for the truth, so that both are of the same numbers
            with sdpa_kernel(SDPBackend.MATH), capture(model) as calls:
                call(model, inputs)
        except NoAttentionError as error:
            sentences.append(str(error))
    said = [str(warning.message) for warning in caught]
    return calls, [text for text in said if re.search("attention_?monitor", text, re.IGNORECASE)] + sentences


def compare(sites: Sequence[TrueSite], calls: Sequence[AttentionCall], sentences: Sequence[str]) -> Outcome:
    """Tell what became of each site."""
    outcome = Outcome(found=len(calls), heads=[call.shape[1] for call in calls], sentences=list(sentences))
    of_path: dict[str, list[AttentionCall]] = defaultdict(list)
    for one in calls:
        of_path[_owner(one.site, sites)].append(one)
    counts: dict[str, int] = defaultdict(int)
    for site in sites:
        if site.pattern is not None:
            counts[site.name] += 1
    for site in sites:
        ours = of_path[site.name]
        if site.pattern is None:
            verdict = _judge_nothing(site, ours, sentences)
            if ours:
                outcome.notes.append(f"{site.name}: {tuple(ours[0].shape)} shown, but it has no pattern")
            ours.clear()
        elif not ours:
            verdict = "refused with a sentence" if _is_said(site.name, sentences) else "left out in silence"
        else:
            verdict = _judge(site, ours.pop(0), outcome)
        outcome.verdicts.append(verdict)
        if verdict == "left out in silence":
            outcome.notes.append(f"{site.name}: left out in silence")
    for path, left in of_path.items():
        if left:
            where = path or left[0].site
            outcome.notes.append(f"{where}: {counts[path] + len(left)} calls for {counts[path]}")
            outcome.verdicts += ["wrong"] * len(left)
    return outcome


def _owner(site: str, sites: Sequence[TrueSite]) -> str:
    """Return the name of the true site that a call is of: that of its module, or of the nearest around it."""
    path = re.sub(r"\[\d+\]$", "", site)
    around = [true for true in sites if not true.path or path == true.path or path.startswith(true.path + ".")]
    return max(around, key=lambda true: len(true.path)).name if around else ""


def _judge_nothing(site: TrueSite, calls: Sequence[AttentionCall], sentences: Sequence[str]) -> str:
    if calls:
        return "wrong"
    is_right = site.kind.shows == "silence" or _is_said(site.name, sentences)
    return "right" if is_right else "left out in silence"


def _judge(site: TrueSite, call: AttentionCall, outcome: Outcome) -> str:
    assert site.pattern is not None
    wrong = []
    if site.kind.is_self is not None and site.kind.shows == "tokens":
        outcome.kinds_known += 1
        if call.is_self_attention == site.kind.is_self:
            outcome.kinds_right += 1
        else:
            wrong.append(f"called {'self' if call.is_self_attention else 'cross'}")
    if site.kind.shows == "channels" and call.has_positions:
        wrong.append("channels have positions")
    if site.kind.offset is not None and call.has_positions and call.query_offset != site.kind.offset:
        wrong.append(f"query 0 at {call.query_offset} instead of {site.kind.offset}")
    if call.shape[1:] != site.pattern.shape[1:] or call.shape[0] != len(site.pattern):
        wrong.append(f"{tuple(call.shape)} instead of {tuple(site.pattern.shape)}")
    else:
        error = difference(call.pattern().double(), site.pattern)
        outcome.error = max(outcome.error or 0.0, error)
        if not error <= TOLERANCE:
            wrong.append(f"pattern differs by {error:.1g}")
    if wrong:
        outcome.notes.append(f"{site.name}: {', '.join(wrong)}")
    return "wrong" if wrong else "right"


def difference(ours: Tensor, true: Tensor) -> float:
    """Return the greatest difference of two patterns (B, H, Q, K), whatever the order of their B."""
    if (error := float((ours - true).abs().max())) <= TOLERANCE:
        return error
    flat = ours.flatten(1), true.flatten(1)
    nearest = torch.cdist(flat[1], flat[0]).argmin(1)  # (B,)
    if len(nearest.unique()) < len(nearest):  # two are alike
        return error
    return float((ours[nearest] - true).abs().max())


def _is_said(path: str, sentences: Sequence[str]) -> bool:
    """Whether a sentence names a module, by its path or by that of its stack; an error that nothing was seen does."""
    stack = re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
    names = "|".join(re.escape(name) for name in (path, stack))
    return any(
        text.startswith("No attention call") or re.search(rf"(?<![\w.])({names})(?!\w)", text) for text in sentences
    )
