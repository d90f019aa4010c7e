"""An attention call: positions, padding, columns that are no position."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention_monitor import AttentionCall, summarize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(Q, K, **options):
    return AttentionCall("attn", torch.randn(2, 3, Q, 4), torch.randn(2, 3, K, 4), **options)


def written(scores, **options):
    return AttentionCall("attn", None, None, model_scores=scores, **options)


@pytest.mark.parametrize(
    ("options", "K", "offset"),
    [
        ({}, 5, 0),
        ({"self_attention": True}, 8, 3),  # three tokens are cached
        ({"self_attention": False}, 8, 0),
        ({"self_attention": True, "is_causal": True}, 8, 0),  # row i sees keys 0..i, by definition
        ({"self_attention": True, "n_sinks": 2}, 7, 0),
        ({"self_attention": True, "n_sinks": 1, "sinks_in_pattern": True}, 9, 3),
        ({"self_attention": True, "mask": torch.arange(12) <= torch.arange(2, 7)[:, None]}, 12, 2),  # filled up to 7
    ],
)
def test_queries_of_a_self_attention_are_at_the_end_of_what_they_see(options, K, offset):
    if "mask" in options:
        options = {**options, "mask": options["mask"][None, None]}
    assert make(5, K, **options).query_offset == offset


def test_without_an_origin_equal_lengths_are_taken_for_self_attention():
    assert make(5, 5).is_self_attention
    assert not make(5, 6).is_self_attention
    assert make(5, 7, n_sinks=2).is_self_attention
    assert not make(5, 5, self_attention=False).is_self_attention


@pytest.mark.parametrize("length", [7, 256, 300, 600])  # looked at 256 rows at a time
@pytest.mark.parametrize("form", ["mask", "function", "scores"])
def test_padding_is_what_nobody_looks_at(length, form):
    hidden = torch.zeros(2, 1, 1, length, dtype=torch.bool)
    hidden[0, ..., -3:] = True
    hidden[1, ..., :2] = True
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    causal = causal | torch.eye(length, dtype=torch.bool)
    if form == "mask":
        call = make(length, length, mask=~hidden)
    elif form == "function":
        call = make(length, length, mask_mod=lambda start, stop: (~hidden).expand(2, 1, stop - start, length))
    else:
        call = written(torch.randn(2, 3, length, length).masked_fill(hidden, -1e9))
    expected = hidden[:, 0, 0].unsqueeze(1)
    assert torch.equal(call.padded_queries.expand(2, 3, length), expected.expand(2, 3, length))


@pytest.mark.parametrize("length", [7, 300])
def test_a_mask_that_hides_the_diagonal_says_nothing_about_padding(length):
    mask = ~torch.eye(length, dtype=torch.bool)
    mask[:, -1] = False
    assert make(length, length, mask=mask[None, None]).padded_queries is None


def test_the_first_sequences_of_a_call():
    mask = torch.rand(2, 1, 5, 5) < 0.8
    for call in (make(5, 5, mask=mask), written(torch.randn(2, 3, 5, 5))):
        torch.testing.assert_close(call.first_sequences(1).pattern(), call.pattern()[:1])


@pytest.mark.parametrize("sinks_in_pattern", [True, False])
def test_columns_that_are_no_position_take_their_share(sinks_in_pattern):
    scores = torch.randn(2, 3, 5, 7)
    call = written(scores, n_sinks=2, sinks_in_pattern=sinks_in_pattern)
    whole = scores.softmax(-1)
    torch.testing.assert_close(call.pattern(), whole if sinks_in_pattern else whole[..., :5])
    assert call.shape == (2, 3, 5, 7 if sinks_in_pattern else 5)
    values = summarize(call)
    torch.testing.assert_close(values["entropy"], -(whole * whole.log()).sum(-1).mean((0, 2)))
    torch.testing.assert_close(values["diagonal_mean"], whole.diagonal(0, 2, 3)[..., :5].mean((0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [-torch.inf, "min", -1e9, -1e4])
def test_masked_entries_of_scores_are_told_from_low_scores(dtype, mask):
    mask = torch.finfo(dtype).min if mask == "min" else max(mask, torch.finfo(dtype).min) if mask > -torch.inf else mask
    scores = torch.randn(2, 3, 6, 6).to(dtype) * 50
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for masked in (scores.masked_fill(hidden, mask), scores + torch.zeros(6, 6, dtype=dtype).masked_fill(hidden, mask)):
        assert torch.equal(written(masked).scores(0, 6)[1], ~hidden.expand(2, 3, 6, 6))


def test_one_head_whose_scores_have_blown_up_does_not_change_what_is_masked_in_another():
    scores = torch.randn(2, 2, 64, 64)
    scores[:, 0] *= 2e4
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    allowed = written(scores.masked_fill(hidden, -1e9)).scores(0, 64)[1]
    assert torch.equal(allowed, ~hidden.expand(2, 2, 64, 64))


@pytest.fixture
def precision():
    """Sets how exactly float32 is multiplied, for one test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


class Products(TorchDispatchMode):
    """Keeps the precision in which each product of matrices is computed."""

    def __init__(self):
        super().__init__()
        self.precisions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


# Both marks go when this is mended, which the strict one tells: it fails then. The other cannot be strict, because the
# numbers are equal already where sizes or the CPU let "medium" change nothing.
PRECISION_REACHES_US = "scores are multiplied in the precision that the user has set for the model"


@pytest.mark.xfail(reason=PRECISION_REACHES_US, strict=False)
@pytest.mark.parametrize("head_dim", [64, 384])  # short products are computed otherwise than long ones
@pytest.mark.parametrize("set_to", ["high", "medium"])
def test_numbers_do_not_depend_on_the_precision_set_for_the_model(precision, set_to, head_dim):
    query, key = torch.randn(2, 2, 32, head_dim), torch.randn(2, 2, 32, head_dim)

    def numbers():
        call = AttentionCall("attn", query, key, scale=head_dim**-0.5)
        return {"pattern": call.pattern(), **summarize(call)}

    precision("highest")
    expected = numbers()
    precision(set_to)
    found = numbers()
    assert torch.get_float32_matmul_precision() == set_to
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.xfail(reason=PRECISION_REACHES_US, strict=True)
@pytest.mark.parametrize("numbers", [AttentionCall.pattern, summarize])
def test_scores_are_multiplied_in_full_precision_whatever_is_set_for_the_model(precision, numbers):
    precision("medium")
    with Products() as products:
        numbers(make(5, 5))
    assert products.precisions
    assert set(products.precisions) == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"
