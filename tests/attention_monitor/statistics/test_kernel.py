"""The GPU kernel against the blocks of rows that a CPU goes through: on a GPU, or by Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/attention_monitor/statistics/test_kernel.py
"""

import math
import os

import pytest
import torch

from attention_monitor import STATISTICS, AttentionCall, summarize
from attention_monitor.statistics import totals
from attention_monitor.statistics.catalogue import DEFAULT_STATISTICS
from attention_monitor.statistics.row_blocks import RowBlock, row_spans
from attention_monitor.statistics.rows import QUANTITIES, RowColumns

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)

from attention_monitor.statistics import kernel  # noqa: E402 - Triton reads its setting when it is imported

DEVICE = "cpu" if INTERPRETED else "cuda"


def make_call(Q, K, H=2, H_kv=2, D=16, dtype=torch.float32, peak=1.0, **options):
    torch.manual_seed(Q * 1000 + K)
    q, k = peak * torch.randn(2, Q, H, D, device=DEVICE), torch.randn(2, K, H_kv, D, device=DEVICE)
    q, k = (x.to(dtype).transpose(1, 2) for x in (q, k))  # not contiguous, as models have them
    return AttentionCall("attn", q, k, scale=1 / math.sqrt(D), value=k, **options)


def by_blocks(call):
    """The same quantities, a block of rows after the other."""
    blocks = list(row_spans(call))
    row = torch.cat([torch.arange(*span, device=call.device) for span in blocks])
    collected = RowColumns(row)
    for start, stop in blocks:
        block = RowBlock(call, start, stop)
        named = {name: getattr(block, name) for name in QUANTITIES}
        collected.add({**named, "n_keys": block.n_keys.expand(block.max_score.shape)})
    return collected


def check(call):
    assert kernel.supports(call)
    expected = by_blocks(call)
    row = torch.arange(call.shape[2], device=call.device)
    found = kernel.rows_of(call, row)
    counts = expected["n_keys"] > 0
    assert torch.equal(found.n_keys, expected["n_keys"].float())
    for name in QUANTITIES:
        ours, theirs = getattr(found, name)[counts], expected[name][counts]
        scale = theirs.abs().nan_to_num().clamp(min=1)  # of what is no share, rounding grows with the value
        assert torch.allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5, equal_nan=True), name


SIZES = [(1, 1), (7, 7), (64, 64), (65, 65), (130, 130), (20, 70), (70, 20)]


@pytest.mark.parametrize(("Q", "K"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_keys(Q, K, dtype):
    check(make_call(Q, K, dtype=dtype))


@pytest.mark.parametrize(("Q", "K"), [(7, 7), (65, 65), (130, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_causal(Q, K, dtype):
    check(make_call(Q, K, dtype=dtype, is_causal=True))


@pytest.mark.parametrize(("H", "H_kv"), [(4, 2), (6, 1)])
def test_grouped_queries(H, H_kv):
    check(make_call(70, 70, H, H_kv, is_causal=True))


@pytest.mark.parametrize("D", [1, 8, 40, 96])
def test_head_dimensions_that_are_no_power_of_two(D):
    check(make_call(33, 33, D=D))


@pytest.mark.parametrize("form", ["bool", "float", "per sequence", "per head", "keys", "fully masked rows"])
def test_windowed_and_padded(form):
    T = 70
    window = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril().triu(-9)[None, None]
    padded = (torch.arange(T, device=DEVICE) < torch.tensor([T, 50], device=DEVICE)[:, None])[:, None, None]
    mask = {
        "bool": window,
        "float": torch.where(window, 0.5, -torch.inf),
        "per sequence": window & padded,
        "per head": window & (torch.rand(2, 2, T, T, device=DEVICE) < 0.9),
        "keys": padded,
        "fully masked rows": window & (torch.arange(T, device=DEVICE) % 7 > 0)[:, None],
    }[form]
    check(make_call(T, T, mask=mask))


@pytest.mark.parametrize("peak", [0.0, 10.0, 100.0])
def test_uniform_and_peaked(peak):
    check(make_call(70, 70, peak=peak, is_causal=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key"])
def test_rows_that_are_not_finite_are_found(which, value):
    call = make_call(70, 70, is_causal=True)
    getattr(call, which)[0, 1, 66, 3] = value
    row = torch.arange(70, device=DEVICE)
    finite = kernel.rows_of(call, row).entropy.isfinite()
    assert torch.equal(finite, torch.isfinite(totals.Rows(call, row, row, by_blocks(call)).entropy))


def test_some_rows_only():
    call = make_call(130, 130, is_causal=True)
    row = torch.tensor([3, 4, 70, 129], device=DEVICE)
    torch.testing.assert_close(kernel.rows_of(call, row).entropy, by_blocks_entropy(call)[..., row], rtol=0, atol=1e-5)


def by_blocks_entropy(call):
    found = by_blocks(call)
    return found["sum_exp"].log() - found["sum_exp_shifted"] / found["sum_exp"]


def test_statistics_are_the_same_with_the_kernel_as_without(monkeypatch):
    call = make_call(70, 70, 4, 2, is_causal=True)
    names = [name for name in STATISTICS if STATISTICS[name].needs is not None]
    assert set(DEFAULT_STATISTICS) <= set(names)
    monkeypatch.setattr(totals, "_kernel_for", lambda call: kernel)
    found = summarize(call, names)
    monkeypatch.setattr(totals, "_kernel_for", lambda call: None)
    expected = summarize(call, names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"score_mod": lambda s, start: s}, {"mask_mod": lambda a, b: None}, {"n_sinks": 1}]
)
def test_calls_that_it_does_not_take_go_the_other_way(options):
    assert not kernel.supports(make_call(4, 4, **options))
    assert not kernel.supports(AttentionCall("a", None, None, model_scores=torch.zeros(1, 1, 2, 2)))
    assert not kernel.supports(make_call(4, 4, dtype=torch.float64))
