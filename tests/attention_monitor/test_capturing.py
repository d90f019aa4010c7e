import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_monitor import NoAttentionError, capture, summarize
from attention_monitor.capturing import Capture, layer_labels


class Attention(nn.Module):
    def __init__(self, n_head=2, n_embd=8, **options):
        super().__init__()
        self.n_head, self.options = n_head, options
        self.qkv = nn.Linear(n_embd, 3 * n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).reshape(B, T, C)


class Stack(nn.Module):
    def __init__(self, n_layer=3, **options):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(**options)}) for _ in range(n_layer))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["attn"](x)
        return x


def installed(model):
    """What a capture may leave behind: hooks in the model, function modes."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + torch._C._len_torch_function_stack()


def reference(q, k, scale, mask=None, is_causal=False):
    """Pattern in float64."""
    scores = scale * q.double() @ k.double().transpose(-1, -2)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril().logical_not(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


class Call(nn.Module):
    """One attention call with the arguments it is given."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


def captured(*args, **kwargs):
    with capture(model := Call()) as calls:
        model(*args, **kwargs)
    return calls


def test_pattern_is_what_the_model_multiplied_v_with():
    q, k, v = (torch.randn(2, 3, 7, 4) for _ in range(3))
    with capture(model := Call()) as calls:
        z = model(q, k, v, is_causal=True)
    torch.testing.assert_close(calls[0].pattern() @ v, z, atol=1e-6, rtol=1e-5)


MASK = torch.rand(2, 1, 6, 6) < 0.7
MASK |= torch.eye(6, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": MASK},
        {"attn_mask": torch.randn(6, 6)},
        {"attn_mask": torch.randn(2, 1, 6, 6)},
        {"attn_mask": torch.zeros(6, 6).masked_fill(~MASK[0, 0], -torch.inf)},
        {"attn_mask": torch.randn(1, 3, 1, 6)},
        {"dropout_p": 0.5},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_pattern_honours_the_arguments_of_the_call(options):
    q, k, v = (torch.randn(2, 3, 6, 4) for _ in range(3))
    [call] = captured(q, k, v, **options)
    expected = reference(q, k, options.get("scale", 0.5), options.get("attn_mask"), options.get("is_causal", False))
    torch.testing.assert_close(call.pattern().double(), expected, atol=1e-6, rtol=0)


def test_grouped_keys_are_shared_among_query_heads():
    q, k = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4)
    [call] = captured(q, k, k, is_causal=True, enable_gqa=True)
    expected = reference(q, k.repeat_interleave(3, 1), 0.5, is_causal=True)
    torch.testing.assert_close(call.pattern().double(), expected, atol=1e-6, rtol=0)
    assert summarize(call)["entropy"].shape == (6,)


@pytest.mark.parametrize(("q_shape", "k_shape"), [((2, 3), (1, 1)), ((1, 3), (2, 3)), ((2, 1), (2, 3))])
def test_batch_and_heads_broadcast(q_shape, k_shape):
    q, k = torch.randn(*q_shape, 5, 4), torch.randn(*k_shape, 5, 4)
    [call] = captured(q, k, k, is_causal=True)
    torch.testing.assert_close(call.pattern() @ k, F.scaled_dot_product_attention(q, k, k, is_causal=True))
    assert summarize(call)["entropy"].shape == (3,)


@pytest.mark.parametrize(("Q", "K"), [(3, 7), (7, 3), (1, 5)])
def test_causal_call_with_fewer_or_more_queries_than_keys(Q, K):
    q, k = torch.randn(1, 2, Q, 4), torch.randn(1, 2, K, 4)
    [call] = captured(q, k, k, is_causal=True)
    torch.testing.assert_close(call.pattern() @ k, F.scaled_dot_product_attention(q, k, k, is_causal=True))
    assert not call.is_self_attention


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 3, 2, 5, 4)])
def test_inputs_of_other_than_four_axes(shape):
    q, k = torch.randn(shape), torch.randn(shape)
    [call] = captured(q, k, k)
    expected = F.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
    torch.testing.assert_close(call.pattern().flatten(), expected.flatten())


@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 5, 5), (1, 1, 2, 5, 5), (5, 5)])
@pytest.mark.parametrize("k_shape", [(2, 3, 2), (2, 1, 2), (1, 1, 1)])
def test_five_axes_with_masks_and_broadcast_keys(mask_shape, k_shape):
    q, k = torch.randn(2, 3, 2, 5, 4), torch.randn(*k_shape, 5, 4)
    mask = (torch.rand(mask_shape) < 0.6) | torch.eye(5, dtype=torch.bool)
    [call] = captured(q, k, k, attn_mask=mask)
    expected = reference(q, k, 0.5, mask).flatten(1, 2)
    torch.testing.assert_close(call.pattern().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)])
def test_empty_inputs_give_nan(shape):
    [call] = captured(*[torch.randn(shape)] * 3)
    assert summarize(call)["entropy"].isnan().all()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9])
def test_rows_masked_by_a_finite_number_have_the_weights_that_the_model_gave_them(low):
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mask = torch.zeros(3, 3)
    mask[1] = low
    [call] = captured(q, k, k, attn_mask=mask)
    torch.testing.assert_close(call.pattern() @ k, F.scaled_dot_product_attention(q, k, k, attn_mask=mask))


def test_nan_in_a_masked_key_is_seen_as_it_reaches_the_output():
    q, k = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    k[0, 0, 3] = math.nan
    mask = torch.tensor([True, True, True, False]).expand(4, 4)
    [call] = captured(q, k, torch.randn(1, 1, 4, 4), attn_mask=mask)
    assert F.scaled_dot_product_attention(q, k, torch.ones(1, 1, 4, 4), attn_mask=mask).isnan().all()
    assert call.pattern().isnan().all()


def test_calls_of_other_models_are_not_counted():
    model, other = Stack(1), Stack(1)
    with capture(model) as calls:
        other(torch.randn(1, 4, 8))
        model(torch.randn(1, 4, 8))
        F.scaled_dot_product_attention(*[torch.randn(1, 1, 3, 4)] * 3)
    assert [call.site for call in calls] == ["layers.0.attn"]


def test_a_script_module_in_the_model_is_passed_over():
    model = nn.Sequential(torch.jit.trace(nn.Linear(8, 8), torch.randn(1, 8)), Stack(1))
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["1.layers.0.attn"]


def test_fully_masked_rows_are_0_as_the_fused_kernel_makes_them():
    q = torch.randn(1, 1, 3, 4)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    [call] = captured(q, q, q, attn_mask=mask)
    assert call.pattern()[0, 0, 1].tolist() == [0, 0, 0]
    assert F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[0, 0, 1].tolist() == [0, 0, 0, 0]


def test_under_autocast_queries_are_rounded_as_the_call_rounds_them():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [call] = captured(q, k, k)
    assert call.query.dtype == torch.bfloat16
    assert call.pattern().dtype == torch.float32
    torch.testing.assert_close(call.pattern().double(), reference(q.bfloat16(), k.bfloat16(), 0.5), atol=1e-6, rtol=0)


def test_sites_are_module_paths_in_order_of_execution():
    with capture(model := Stack()) as calls:
        model(torch.randn(2, 5, 8))
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn", "layers.2.attn"]


def test_a_module_that_calls_twice_in_a_forward_is_indexed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = Attention()

        def forward(self, x):
            return self.shared(self.shared(x))

    with capture(model := Twice()) as calls:
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["shared[0]", "shared[1]"]


def test_two_forwards_have_the_same_sites():
    with capture(model := Stack(2)) as calls:
        model(torch.randn(1, 4, 8))
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn"] * 2


def test_a_model_that_calls_attention_itself_is_named_by_its_class():
    assert captured(*[torch.randn(1, 1, 3, 4)] * 3)[0].site == "Call"


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.Sequential(model)[0]])
def test_wrappers_leave_no_trace_in_site_names(wrap):
    model = nn.ModuleDict({"net": wrap(Stack(1))})
    with capture(model) as calls:
        model["net"](torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["net.layers.0.attn"]


def test_a_compiled_model_is_captured_and_not_compiled_again():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = Stack(2, is_causal=True)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(1, 4, 8)
    before = compiled(x)
    n = len(compilations)
    assert n > 0
    for _ in range(3):
        with capture(compiled) as calls:
            torch.testing.assert_close(compiled(x), before)
        assert len(calls) == 2
        torch.testing.assert_close(compiled(x), before)
    assert len(compilations) == n


def test_captures_that_overlap_leave_compilation_as_it_was():
    compiled = torch.compile(Stack(1), backend="eager")
    x = torch.randn(1, 4, 8)
    compiled(x)
    one, other = Capture(compiled, lambda call: None), Capture(compiled, lambda call: None)
    one.__enter__()
    other.__enter__()
    one.__exit__()
    other.__exit__()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert installed(compiled) == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_is_counted_once(use_reentrant):
    model = Stack(2)
    x = torch.randn(1, 4, 8, requires_grad=True)
    with capture(model) as calls:
        loss = checkpoint(model, x, use_reentrant=use_reentrant).sum()
    loss.backward()
    assert len(calls) == 2


def test_output_and_gradients_do_not_change():
    model, x = Stack(2, is_causal=True), torch.randn(2, 5, 8)

    def run():
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = run()
    with capture(model):
        watched = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_captured_tensors_are_detached():
    with capture(model := Stack(1)) as calls:
        model(torch.randn(1, 4, 8))
    assert not calls[0].query.requires_grad
    assert not calls[0].key.requires_grad


def test_nothing_stays_installed():
    model = Stack()
    assert installed(model) == 0
    with capture(model):
        assert installed(model) > 0
        model(torch.randn(1, 4, 8))
    assert installed(model) == 0


def test_nothing_stays_installed_after_an_exception():
    model = Stack()
    with pytest.raises(RuntimeError, match="shape"), capture(model):
        model(torch.randn(1, 4, 9))
    assert installed(model) == 0
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn", "layers.2.attn"]


def test_a_failing_observer_is_reported_and_does_not_stop_the_model():
    def fail(call):
        raise ZeroDivisionError("oops")

    model, x = Stack(2), torch.randn(1, 4, 8)
    with pytest.warns(UserWarning, match=r"layers\.0\.attn: ZeroDivisionError: oops"), Capture(model, fail):
        watched = model(x)
    assert torch.equal(watched, model(x))


def test_no_attention_is_an_error_that_names_what_looks_like_it():
    class MyAttention(nn.Linear):
        pass

    model = nn.Sequential(MyAttention(2, 2))
    with pytest.raises(NoAttentionError, match=r"0 \(MyAttention\).*scaled_dot_product_attention"), capture(model):
        model(torch.randn(1, 2))
    with (
        pytest.raises(NoAttentionError, match="no module in it looks like attention"),
        capture(model := nn.Linear(2, 2)),
    ):
        model(torch.randn(1, 2))


def test_an_error_of_the_model_is_not_replaced_by_the_lack_of_attention():
    with pytest.raises(ZeroDivisionError), capture(nn.Linear(2, 2)):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("sites", "labels"),
    [
        (["gpt.h.0.attn", "gpt.h.1.attn"], ["L00", "L01"]),
        (["h.0.attn", "h.2.attn"], ["L00", "L02"]),
        (["h.0.attn.3", "h.1.attn.3"], ["L00", "L01"]),
        (["attn"], ["L00"]),
        (["enc.0.attn", "dec.0.attn"], ["enc.0.attn", "dec.0.attn"]),
        (["stage.0.block.0", "stage.0.block.1", "stage.1.block.0"],) * 2,
        (["shared[0]", "shared[1]"],) * 2,
        ([], []),
    ],
)
def test_layers_of_a_plain_stack_are_numbered_and_others_keep_their_path(sites, labels):
    assert layer_labels(sites) == labels


def test_capture_does_not_load_the_compiler():
    code = (
        "import sys, torch; from attention_monitor import capture\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x): return torch.nn.functional.scaled_dot_product_attention(x, x, x)\n"
        "m = M()\n"
        "with capture(m): m(torch.zeros(1, 1, 2, 2))\n"
        "assert before or 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_scale_is_one_over_the_root_of_the_head_dimension():
    [call] = captured(*[torch.randn(1, 1, 3, 16)] * 3)
    assert call.scale == 1 / math.sqrt(16)
