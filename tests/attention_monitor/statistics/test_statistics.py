import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_monitor import STATISTICS, AttentionCall, AttentionMonitorError, capture, statistic, summarize
from attention_monitor.statistics import row_blocks as rows_module
from attention_monitor.statistics.catalogue import resolve_statistics, where_finite
from attention_monitor.statistics.totals import HeadTotals

from ..oracle import NAMES, head_statistics


def make_call(q, k, mask=None, is_causal=False, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return AttentionCall("attn", q, k, mask, is_causal, scale, value=torch.zeros_like(k))


def expected(call, allowed, padded=None):
    """statistic -> (H,) by the oracle; allowed (B, H, Q, K) bool, padded (B, Q) bool."""
    B, H, Q, _ = call.query.shape
    q = call.query.double().numpy()
    k = call.key.double().repeat_interleave(H // call.key.shape[1], 1).numpy()
    with np.errstate(all="ignore"):
        scores = np.einsum("bhqd,bhkd->bhqk", q, k) * call.scale
    if call.mask is not None and call.mask.dtype != torch.bool:
        scores = scores + call.mask.double().numpy()
    padded = np.zeros((B, Q), bool) if padded is None else padded
    v = call.value.double().repeat_interleave(H // call.value.shape[1], 1).numpy()
    heads = [head_statistics(scores[:, h], allowed[:, h], padded, q[:, h], k[:, h], v[:, h]) for h in range(H)]
    return {name: np.array([head[name] for head in heads]) for name in NAMES}


def check(call, allowed, padded=None, atol=1e-5):
    found = summarize(call, NAMES)
    for name, values in expected(call, allowed, padded).items():
        # rounding grows with what is counted in keys, tokens or scores
        scale = 1 if STATISTICS[name].range.endswith("..1") else max(1, np.nanmax(np.abs(values), initial=0))
        np.testing.assert_allclose(found[name].numpy(), values, atol=atol * scale, rtol=0, err_msg=name)


def causal(B, H, T):
    return np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, H, T, T))


@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_says_what_it_is(name):
    stat = STATISTICS[name]
    assert stat.function.__doc__
    assert stat.unit
    assert ".." in stat.range


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 3),
    H_kv=st.integers(1, 3),
    group=st.integers(1, 2),
    Q=st.integers(1, 20),
    K=st.integers(1, 20),
    peak=st.sampled_from([0.1, 1.0, 5.0]),
    kind=st.sampled_from(["none", "causal", "bool", "float", "per_head"]),
    block=st.sampled_from([1, 100, 1 << 20]),
)
def test_equals_the_oracle_on_random_masked_and_peaked_inputs(data, B, H_kv, group, Q, K, peak, kind, block):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    H = H_kv * group
    q, k = peak * torch.randn(B, H, Q, 8, generator=rng), torch.randn(B, H_kv, K, 8, generator=rng)
    mask, allowed = None, np.ones((B, H, Q, K), bool)
    if kind == "causal":
        allowed = np.broadcast_to(np.tril(np.ones((Q, K), bool)), allowed.shape)
    elif kind != "none":
        shape = (B, H, Q, K) if kind == "per_head" else (B, 1, Q, K)
        mask = torch.rand(shape, generator=rng) < 0.6
        mask |= torch.eye(Q, K, dtype=torch.bool)  # or the mask might look like padding
        allowed = mask.expand(B, H, Q, K).numpy()
        if kind == "float":
            mask = torch.where(mask, torch.randn(shape, generator=rng), -torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "BLOCK_ELEMENTS", block)
        check(make_call(q, k, mask, is_causal=kind == "causal"), allowed)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    B=st.integers(1, 2),
    H_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    T=st.integers(2, 70),
    largest=st.sampled_from([1.0, 10.0, 98.0]),
    kind=st.sampled_from(["none", "causal", "bool"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from([1, 7, 64]),
)
def test_equals_the_oracle_for_scores_up_to_100_in_every_dtype(data, B, H_kv, group, T, largest, kind, dtype, block):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    H = H_kv * group
    # eighths of at most 3.5, eight of them: their products are exact in every dtype, and so are the scores
    q, k = (torch.randint(-28, 29, (B, h, T, 8), generator=rng).div(8).to(dtype) for h in (H, H_kv))
    q[:, :, 0], k[:, :, T // 2] = 3.5, 3.5
    allowed, mask = np.ones((B, H, T, T), bool), None
    if kind == "causal":
        allowed = causal(B, H, T)
    elif kind == "bool":
        mask = (torch.rand(B, 1, T, T, generator=rng) < 0.5) | torch.eye(T, dtype=torch.bool)
        allowed = mask.expand(B, H, T, T).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "BLOCK_ROWS", block)
        patch.setattr(rows_module, "BLOCK_ELEMENTS", block * B * H * T)
        check(make_call(q, k, mask, is_causal=kind == "causal", scale=largest / 98), allowed)


@pytest.mark.parametrize("largest", [100.0, 1000.0])
def test_equals_the_oracle_for_large_scores(largest):
    q, k = torch.randn(2, 3, 40, 16, dtype=torch.float64), torch.randn(2, 3, 40, 16, dtype=torch.float64)
    scale = largest / float((q @ k.transpose(-1, -2)).abs().max())
    # in float64: the rounding of q and k, times scores this large, is not the statistics' doing
    check(make_call(q, k, is_causal=True, scale=scale), causal(2, 3, 40), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    q, k = torch.randn(2, 2, 30, 16).to(dtype), torch.randn(2, 2, 30, 16).to(dtype)
    check(make_call(q, k, is_causal=True), causal(2, 2, 30))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["key_padding", "bool", "min", "-1e9", "-1e4"])
def test_padded_rows_and_keys_are_left_out(side, is_causal, form):
    B, H, T = 3, 2, 12
    q, k = torch.randn(B, H, T, 8), torch.randn(B, H, T, 8)
    real = torch.arange(T) < torch.tensor([12, 7, 4])[:, None]
    real = real.flip(1) if side == "left" else real  # (B, T)
    mask = real[:, None, None, :]
    if form != "key_padding" or is_causal:
        mask = mask.expand(B, 1, T, T)
    if is_causal:
        mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
    allowed = mask.expand(B, H, T, T).numpy()
    if form not in ("key_padding", "bool"):
        low = torch.finfo(torch.float32).min if form == "min" else float(form)
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    check(make_call(q, k, mask), allowed, ~real.numpy())


def test_a_mask_that_hides_the_diagonal_is_not_padding():
    T = 6
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril(-1)  # nobody sees the last token
    call = make_call(torch.randn(1, 1, T, 4), torch.randn(1, 1, T, 4), mask)
    assert call.padded_queries is None
    check(call, mask.numpy())


def test_uniform_causal_attention_has_normalized_entropy_1_and_known_entropy():
    T = 32
    found = summarize(make_call(torch.zeros(2, 3, T, 4), torch.randn(2, 3, T, 4), is_causal=True))
    torch.testing.assert_close(found["normalized_entropy"], torch.ones(3))
    torch.testing.assert_close(found["entropy"], torch.full((3,), math.lgamma(T + 1) / (T - 1)))
    torch.testing.assert_close(found["max_score"], torch.zeros(3))


def test_a_head_that_looks_at_the_previous_token_scores_1():
    T = 16
    q, k = torch.eye(T)[None, None] * 100, torch.eye(T).roll(-1, 0)[None, None]
    found = summarize(make_call(q, k, is_causal=True, scale=1.0))
    assert found["previous_token"].item() == pytest.approx(1)
    assert found["collapse_fraction"].item() == 1
    # in both directions row 0 has nothing before it and does not count against the head
    assert summarize(make_call(q, k, scale=1.0))["previous_token"].item() == pytest.approx(1)


def test_entropy_does_not_depend_on_the_order_of_keys():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    one, other = summarize(make_call(q, k)), summarize(make_call(q, k[:, :, torch.randperm(9)]))
    torch.testing.assert_close(one["entropy"], other["entropy"])


def test_adding_to_a_row_of_scores_changes_nothing_but_max_score():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    one, other = (summarize(make_call(q, k, mask), NAMES) for mask in (None, torch.full((1, 1, 9, 9), 7.0)))
    for name in NAMES:
        torch.testing.assert_close(other[name], one[name] + (7 if name == "max_score" else 0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["query", "key", "mask"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_with_nan_or_infinity_are_counted_and_poison_the_means(where, value):
    T = 10
    q, k = torch.randn(1, 2, T, 4), torch.randn(1, 2, T, 4)
    mask = torch.zeros(1, 1, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    if where == "query":
        q[0, 0, 3, 1] = value
        rows, heads = 1, 1
    elif where == "key":
        k[0, 0, 6, 1] = value
        rows, heads = 4, 1
    else:
        mask[0, 0, 5, 2] = value
        rows, heads = 1, 2
    call = make_call(q, k, mask) if where == "mask" else make_call(q, k, is_causal=True)
    found = summarize(call)
    assert found["nonfinite_fraction"].tolist() == pytest.approx([rows / T, rows / T if heads == 2 else 0])
    assert found["entropy"].isnan().tolist() == [True, heads == 2]
    if heads == 1:
        assert found["max_score"][1].isfinite()


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_queries_keys_and_values_that_are_not_finite_are_counted_each(which, value):
    tensors = {"query": torch.randn(2, 4, 5, 4), "key": torch.randn(2, 2, 5, 4), "value": torch.randn(2, 2, 5, 3)}
    tensors[which][0, 1, 3, 1] = value
    found = summarize(AttentionCall("attn", **tensors), [f"nonfinite_{name}" for name in tensors])
    for name, values in found.items():
        heads = {"query": [0, 0.1, 0, 0]}.get(which, [0, 0, 0.1, 0.1])  # two heads share a key
        assert values.tolist() == pytest.approx(heads if name == f"nonfinite_{which}" else [0] * 4)


def test_queries_and_keys_of_a_model_that_shows_its_scores_alone_are_not_known():
    call = AttentionCall("attn", None, None, model_scores=torch.randn(1, 2, 3, 3))
    found = summarize(call, ["nonfinite_query", "nonfinite_key", "nonfinite_value", "nonfinite_fraction"])
    assert [values.isnan().all().item() for values in found.values()] == [True, True, True, False]


def test_nan_in_the_first_row_is_not_overlooked():
    q = torch.randn(1, 1, 5, 4)
    q[0, 0, 0, 0] = math.nan
    assert summarize(make_call(q, torch.randn(1, 1, 5, 4), is_causal=True))[
        "nonfinite_fraction"
    ].item() == pytest.approx(0.2)


def test_overflow_in_half_precision_queries_is_seen():
    q = torch.full((1, 1, 4, 4), 6e4, dtype=torch.float16) * 2  # inf
    assert summarize(make_call(q, torch.ones(1, 1, 4, 4, dtype=torch.float16)))["nonfinite_fraction"].item() == 1


def test_no_row_that_counts_gives_nan():
    found = summarize(make_call(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)))
    assert found["entropy"].isnan().all()
    assert found["nonfinite_fraction"].tolist() == [0, 0]
    hidden = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    found = summarize(make_call(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), hidden))
    assert all(values.isnan().all() for values in found.values())


def test_statistics_of_one_position_against_itself_are_nan_for_cross_attention():
    found = summarize(make_call(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 6, 4)))
    assert found["diagonal_mean"].isnan().all()
    assert found["previous_token"].isnan().all()
    assert found["entropy"].isfinite().all()


def test_totals_of_two_calls_are_those_of_one_with_both_batches():
    q, k = torch.randn(5, 2, 7, 4), torch.randn(5, 2, 7, 4)
    totals = HeadTotals(resolve_statistics(list(STATISTICS)))
    totals.add(make_call(q[:2], k[:2], is_causal=True))
    totals.add(make_call(q[2:], k[2:], is_causal=True))
    whole = summarize(make_call(q, k, is_causal=True), list(STATISTICS))
    for name, values in totals.values().items():
        torch.testing.assert_close(values, whole[name])


def test_first_takes_the_mask_along():
    mask = torch.rand(4, 1, 6, 6) < 0.7
    mask |= torch.eye(6, dtype=torch.bool)
    call = make_call(torch.randn(4, 2, 6, 4), torch.randn(4, 2, 6, 4), mask)
    check(call.first_sequences(2), mask[:2].expand(2, 2, 6, 6).numpy())


def test_memory_does_not_grow_with_the_square_of_the_length():
    T = 4096
    call = make_call(torch.randn(1, 2, T, 8), torch.randn(1, 2, T, 8), is_causal=True)
    largest = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.extend(x.untyped_storage().nbytes() for x in [result] if isinstance(x, torch.Tensor))
            return result

    with Spy():
        summarize(call)
    assert max(largest) <= 4 * rows_module.BLOCK_ELEMENTS  # the whole matrix has ten times that


def test_a_statistic_of_the_users_own_is_registered_by_the_decorator():
    try:

        @statistic(unit="1", range="0..1")
        def weight_on_last_key(block):
            """Weight on the last key of the block."""
            return block.weights[..., -1]

        q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
        found = summarize(make_call(q, k), ["weight_on_last_key"])
        torch.testing.assert_close(found["weight_on_last_key"], make_call(q, k).pattern()[0, :, :, -1].mean(-1))
    finally:
        STATISTICS.pop("weight_on_last_key", None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("good", {"range": "positive"}, "range='positive'"),
        ("good", {"range": None}, "range=None"),
        ("good", {"range": "0..1", "rows": "nonsense"}, "rows='nonsense'"),
        ("good", {"range": "0..1", "rows": "weights"}, "rows='weights'.*one of informative, "),
        ("good", {"range": "0..1", "reduce": "min"}, "reduce='min'.*reduce is mean or max"),
        ("entropy", {"range": "0..1"}, "There is a statistic 'entropy' already"),
    ],
)
def test_a_statistic_that_cannot_be_is_refused_when_it_is_made(name, options, message):
    def function(block):
        return block.max_score

    function.__name__ = name
    before = dict(STATISTICS)
    with pytest.raises(AttentionMonitorError, match=message):
        statistic(unit="1", **options)(function)
    assert before == STATISTICS


def test_blocks_may_give_numbers_of_different_types(monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(rows_module, "BLOCK_ROWS", 1)
    try:

        @statistic(unit="1", range="0..1")
        def late(block):
            """False in the first block, 0.5 in the others."""
            first = int(block.row[0]) == 0
            return (
                torch.zeros_like(block.max_score, dtype=torch.bool) if first else 0.5 * torch.ones_like(block.max_score)
            )

        q = torch.randn(1, 2, 5, 4)
        assert summarize(make_call(q, q), ["late"])["late"].tolist() == pytest.approx([0.4, 0.4])
    finally:
        STATISTICS.pop("late", None)


def test_an_infinite_query_behind_a_soft_cap_is_seen():
    q, k = torch.randn(1, 2, 16, 8), torch.rand(1, 2, 16, 8)
    q[0, 0, 3] = 0
    q[0, 0, 3, 0] = torch.inf
    call = AttentionCall("attn", q, k, score_mod=lambda scores, start: 20 * torch.tanh(scores / 20))
    assert summarize(call, ["nonfinite_fraction"])["nonfinite_fraction"].tolist() == [1 / 16, 0]


def test_a_statistic_is_named_once():
    with pytest.raises(AttentionMonitorError, match="'entropy' is named twice; name each once"):
        resolve_statistics(["entropy", "entropy"])


def test_one_statistic_may_be_asked_for_by_its_name_alone():
    found = summarize(make_call(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)), "entropy")
    assert list(found) == ["entropy"]


def test_an_unknown_statistic_is_refused_with_the_list_of_known_ones():
    with pytest.raises(AttentionMonitorError, match=r"'entropi'; known are collapse_fraction, .*entropy"):
        summarize(make_call(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)), ["entropi"])


def test_shared_quantities_of_a_block_satisfy_their_definitions():
    call = make_call(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), is_causal=True)
    block = rows_module.RowBlock(call, 0, 6)
    scores = (call.query @ call.key.transpose(-1, -2) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(block.lse, scores.logsumexp(-1))
    torch.testing.assert_close(block.weights, scores.softmax(-1))
    torch.testing.assert_close(block.expected_score, (scores.softmax(-1) * scores.nan_to_num(neginf=0)).sum(-1))
    assert block.n_keys.flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_statistics_of_a_captured_call_are_those_of_what_the_model_used():
    class Model(torch.nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.7)

    q, k = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4)
    with capture(model := Model()) as calls:
        model(q, k)
    pattern = (0.7 * q @ k.transpose(-1, -2)).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)
    diagonal = pattern.diagonal(dim1=-2, dim2=-1)[:, :, 1:].mean((0, 2))
    torch.testing.assert_close(summarize(calls[0])["diagonal_mean"], diagonal)


@pytest.mark.parametrize(("T", "max_rows"), [(128, 64), (128, 127), (100, 7), (9, 1), (5000, 512)])
def test_rows_that_are_looked_at_are_spread_evenly_and_no_more_than_allowed(T, max_rows):
    call = make_call(torch.zeros(1, 2, T, 1), torch.zeros(1, 2, T, 1))
    rows = [row for span in rows_module.row_spans(call, max_rows) for row in range(*span)]
    assert len(rows) == len(set(rows)) <= max_rows
    assert len(rows) > max_rows / 2
    assert min(rows) >= 0
    assert max(rows) < T
    assert np.mean(rows) == pytest.approx((T - 1) / 2, abs=1 + T / 50)


def test_of_a_part_of_the_rows_values_are_of_these_rows():
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    call = make_call(q, k, is_causal=True)
    totals = HeadTotals(resolve_statistics(["entropy", "previous_token"]), max_rows=16)
    totals.add(call)
    rows = [row for span in rows_module.row_spans(call, 16) for row in range(*span)]
    pattern = call.pattern()[0, :, rows]  # (H, rows, T)
    torch.testing.assert_close(totals.values()["entropy"], torch.special.entr(pattern).sum(-1).mean(-1))
    previous = torch.stack([pattern[:, i, row - 1] for i, row in enumerate(rows)], -1)
    torch.testing.assert_close(totals.values()["previous_token"], previous.mean(-1))


def test_a_statistic_that_reads_what_it_does_not_ask_for_is_told_so():
    try:

        @statistic(unit="1", range="0..1", needs=[])
        def greedy(rows):
            """Reads what it has not asked for."""
            return rows.sum_of_squares

        call = make_call(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
        with pytest.raises(AttentionMonitorError, match=r"say so in @statistic\(needs=\['sum_of_squares'\]\)"):
            summarize(call, ["greedy"])
    finally:
        STATISTICS.pop("greedy", None)
    with pytest.raises(AttentionMonitorError, match=r"'greedy' has needs=\['nothing'\]; known are"):
        statistic(unit="1", range="0..1", needs=["nothing"])(greedy)


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float16).min, -1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_in_half_precision(dtype, low):
    T = 9
    mask = torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), low).to(dtype)[None, None]
    q, k = torch.randn(1, 2, T, 8).to(dtype), torch.randn(1, 2, T, 8).to(dtype)
    found, expected = (
        summarize(call, list(STATISTICS)) for call in (make_call(q, k, mask), make_call(q, k, is_causal=True))
    )
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], msg=name)


@pytest.mark.parametrize("values", [[True, False, True], [3, 4, 5], [0.5, 0.25, 1.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_of_a_row_that_is_not_finite_becomes_nan(values, dtype):
    witness = torch.tensor([1.0, math.nan, -math.inf], dtype=dtype)
    found = where_finite(torch.tensor(values), witness)
    assert found.dtype == dtype
    assert found[0] == values[0]
    assert found[1:].isnan().all()


def test_nan_is_in_every_mean():
    q = torch.randn(1, 1, 5, 4)
    q[0, 0, 3] = math.nan
    found = summarize(make_call(q, torch.randn(1, 1, 5, 4), is_causal=True), list(STATISTICS))
    finite = {name for name, values in found.items() if values.isfinite().all()}
    assert finite == {"nonfinite_fraction", "nonfinite_query", "nonfinite_key", "nonfinite_value", "fully_masked_rows"}


def test_an_infinite_key_that_is_masked_and_does_no_harm_is_no_alarm():
    q, k = -torch.rand(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    k[0, 0, 5] = torch.tensor([torch.inf, 0, 0, 0])
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 5] = False
    for one in (mask, torch.zeros(1, 1, 6, 6).masked_fill(~mask, -torch.inf)):
        found = summarize(make_call(q, k, one))
        assert found["nonfinite_fraction"].item() == 0
        assert found["entropy"].isfinite()
    seen = summarize(make_call(q, k))
    assert seen["nonfinite_fraction"].item() == 1


def test_the_oracle_has_every_statistic():
    own = {name for name, stat in STATISTICS.items() if stat.function.__module__.startswith("attention_monitor.")}
    assert own == set(NAMES)


@pytest.mark.parametrize("name", [name for name, stat in STATISTICS.items() if stat.self_attention_only])
def test_a_nan_in_any_row_is_seen_in_statistics_of_positions(name):
    for row in range(3):
        query = torch.randn(1, 1, 3, 4)
        query[0, 0, row] = torch.nan
        call = AttentionCall("a", query, torch.randn(1, 1, 3, 4), self_attention=True)
        assert summarize(call, [name])[name].isnan().all() or (name == "previous_token" and row == 0)
