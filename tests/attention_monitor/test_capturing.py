import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_monitor import NoAttentionError, capture
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
    with capture(model := Attention()) as calls:
        model(torch.randn(1, 4, 8))
    assert calls[0].site == "Attention"


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
