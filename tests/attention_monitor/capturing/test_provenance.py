"""Where tensors come from."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_monitor.capturing.axes import tag_of
from attention_monitor.capturing.provenance import Origins, same_sequence
from attention_monitor.capturing.running_modules import Frame


class Tape:
    """Calls functions and lets the origins follow."""

    def __init__(self):
        self.origins = Origins()

    def __call__(self, func, *args, **kwargs):
        result = func(*args, **kwargs)
        self.origins.record(func, args, kwargs, result)
        return result

    def frame(self):
        return Frame("module", nn.Identity(), self.origins.next_serial())

    def same(self, q, k, *frames):
        return same_sequence(self.origins.of(q), self.origins.of(k), frames)


@pytest.fixture
def tape():
    return Tape()


@pytest.fixture
def weights():
    return [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]


def test_a_product_of_data_is_a_product_and_one_with_a_weight_is_a_projection(tape, weights):
    x = torch.randn(2, 5, 4)
    q, k = tape(F.linear, x, weights[0]), tape(torch.matmul, x, weights[1])
    assert tape.origins.of(q).is_projection
    assert tape.origins.of(k).is_projection
    assert tag_of(tape.origins.layout_of(k).axes[-1]) is None
    scores = tape(Tensor.__matmul__, q, tape(Tensor.transpose, k, 1, 2))
    masked = tape(Tensor.masked_fill, tape(Tensor.__mul__, scores, 0.5), torch.ones(5, 5).bool().triu(1), -1e9)
    assert tag_of(tape.origins.layout_of(masked).axes[-1]).side == 1
    assert tag_of(tape.origins.layout_of(tape(F.linear, scores, torch.randn(3, 5))).axes[-1]) is None


def test_the_innermost_module_that_projects_decides(tape, weights):
    x = torch.randn(2, 5, 4)
    outside = tape.frame()
    h, memory = tape(torch.sin, x), tape(F.linear, x, weights[2])
    inside = tape.frame()
    q, k, other = tape(F.linear, h, weights[0]), tape(F.linear, h, weights[1]), tape(F.linear, memory, weights[1])
    assert tape.same(q, k, outside, inside) is True
    assert tape.same(q, other, outside, inside) is False
    assert tape.same(q, other, outside) is True  # seen from there, both come from x
    core = tape.frame()
    assert tape.same(q, k, outside, inside, core) is True
    assert tape.same(q, other, outside, inside, core) is False


def test_what_is_handed_in_may_have_been_normed_each_for_itself(tape, weights):
    x = torch.randn(2, 5, 4)
    outside = tape.frame()
    one, other, memory = tape(torch.sin, x), tape(torch.sin, x), tape(F.linear, x, weights[2])
    inside = tape.frame()
    q, k, cross = (tape(F.linear, h, w) for h, w in zip((one, other, memory), weights, strict=True))
    assert tape.same(q, k, outside, inside) is True
    assert tape.same(q, cross, outside, inside) is False


def test_what_both_are_turned_by_is_not_where_they_come_from(tape, weights):
    x, memory, angles = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(5, 4)
    frame = tape.frame()
    q = tape(torch.mul, tape(F.linear, x, weights[0]), angles)
    k = tape(torch.mul, tape(F.linear, memory, weights[1]), angles)
    assert tape.same(q, k, frame) is False


def test_where_a_function_was_not_seen_it_is_not_known(tape, weights):
    x = torch.randn(2, 5, 4)
    frame = tape.frame()
    q, k = tape(F.linear, x, weights[0]), tape(F.linear, x, weights[1])
    assert tape.same(q * 2, k * 2, frame) is None  # not on the tape


def test_what_is_written_in_place_has_a_new_origin(tape, weights):
    x, cache = torch.randn(2, 5, 4), torch.zeros(2, 9, 4)
    frame = tape.frame()
    q, k = tape(F.linear, x, weights[0]), tape(F.linear, x, weights[1])
    tape(Tensor.__setitem__, cache, (slice(None), slice(0, 5)), k)
    assert tape.same(q, tape(Tensor.__getitem__, cache, (slice(None), slice(0, 5))), frame) is True


def test_tensors_are_not_kept_alive(tape):
    x = torch.randn(3)
    for _ in range(5):
        x = tape(torch.sin, x)
    gc.collect()
    assert len(tape.origins._records) == 1
