import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention_monitor import STATISTICS, AttentionRecorder, statistic
from attention_monitor.errors import Once, is_whole


def test_a_thing_is_said_once_and_another_kind_of_the_same_name_is_another_thing():
    once = Once()
    assert once.is_new("module", "attn")
    assert not once.is_new("module", "attn")
    assert once.is_new("statistic", "attn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            once.warn("probe", "attn", "a sentence")
    assert [str(w.message) for w in caught] == ["a sentence"]
    assert caught[0].filename == __file__


class Unread(nn.Module):
    """Called an attention, with a softmax that is not multiplied with values."""

    def forward(self, x):
        return x * (x @ x.mT).softmax(-1).sum(-1, keepdim=True)


class Fused(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attn = Fused(), Unread()
        self.attn.__class__ = type("UnreadAttention", (Unread,), {})

    def forward(self, x):
        return self.attn(self.first(x))


def test_a_failing_statistic_called_as_a_module_does_not_silence_the_warning_of_that_module():
    @statistic(unit="1", range="0..1")
    def attn(block):
        raise ZeroDivisionError("of the statistic")

    try:
        recorder = AttentionRecorder(Both(), 1, statistics=["attn"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(2):
                with recorder.step(step):
                    recorder.model(torch.randn(2, 3, 5, 4))
            recorder.close()
    finally:
        del STATISTICS["attn"]
    said = [str(w.message) for w in caught]
    assert len([one for one in said if "the statistic 'attn' failed" in one]) == 1
    assert len([one for one in said if "could not look at a call of attn" in one]) == 1


@pytest.mark.parametrize(
    ("x", "least", "expected"), [(1, 1, True), (0, 1, False), (True, 1, False), (1.0, 1, False), ("1", 1, False)]
)
def test_whole_numbers(x, least, expected):
    assert is_whole(x, least) == expected
