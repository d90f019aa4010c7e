import copy
import functools
import subprocess
import sys
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_monitor import NoAttentionError, capture, summarize
from attention_monitor.capturing.capture_mode import Capture

from ..project import installed


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


def test_a_module_that_is_registered_twice_is_one_site_with_two_calls():
    model = Stack(2)
    model.layers[1] = model.layers[0]
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["layers.0.attn[0]", "layers.0.attn[1]"]


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("static_graph", [True, False])
def test_distributed_data_parallel(one_process, static_graph):
    model = nn.parallel.DistributedDataParallel(Stack(2), static_graph=static_graph)
    x = torch.randn(2, 4, 8)
    plain = model(x)
    with capture(model) as calls:
        watched = model(x)
    watched.sum().backward()
    assert torch.equal(plain, watched)
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn"]


@pytest.mark.filterwarnings("ignore:.*FSDP.*", "ignore:.*fully_shard.*")
def test_fully_sharded_data_parallel(one_process):
    from torch.distributed.fsdp import fully_shard

    model, x = Stack(2), torch.randn(2, 4, 8)
    plain = model(x)
    for layer in model.layers:
        fully_shard(layer["attn"])
    fully_shard(model)
    with capture(model) as calls:
        watched = model(x)
    watched.sum().backward()
    assert torch.equal(plain, watched)
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn"]


def test_modules_that_are_called_like_a_wrapper_s_child_keep_their_names():
    model = nn.ModuleDict({"module": nn.ModuleDict({"model": Stack(1)}), "model": Stack(1)})
    with capture(model) as calls:
        model["model"](model["module"]["model"](torch.randn(1, 4, 8)))
    assert [call.site for call in calls] == ["module.model.layers.0.attn", "model.layers.0.attn"]


def test_a_parametrized_or_hooked_model_has_the_same_sites():
    model = Stack(1)
    nn.utils.parametrizations.weight_norm(model.layers[0]["attn"].qkv)
    order = []
    model.layers[0]["attn"].register_forward_pre_hook(lambda *_: order.append("before"))
    model.layers[0]["attn"].register_forward_hook(lambda *_: order.append("after"))
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["layers.0.attn"]
    assert order == ["before", "after"]


@pytest.mark.parametrize(
    ("sites", "seen"),
    [
        ("layers.1.*", ["layers.1.attn"]),
        (["layers.0.*", "layers.2.attn"], ["layers.0.attn", "layers.2.attn"]),
        ("*", ["layers.0.attn", "layers.1.attn", "layers.2.attn"]),
        ("layers.[01].attn", ["layers.0.attn", "layers.1.attn"]),
        ("*[[]0]", ["layers.0.attn", "layers.1.attn", "layers.2.attn"]),
    ],
)
def test_sites_are_chosen_by_patterns(sites, seen):
    with capture(model := Stack(), sites) as calls:
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == seen


def test_patterns_that_match_nothing_are_an_error_that_says_what_there_is():
    with (
        pytest.raises(NoAttentionError, match=r"sites=\['decoder.*'\] matches none of those seen, layers.0.attn"),
        capture(model := Stack(1), "decoder.*"),
    ):
        model(torch.randn(1, 4, 8))


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


def test_calls_of_other_models_are_not_counted():
    model, other = Stack(1), Stack(1)
    with capture(model) as calls:
        other(torch.randn(1, 4, 8))
        model(torch.randn(1, 4, 8))
        other(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["layers.0.attn"]


def test_attention_outside_of_any_forward_is_the_model_s():
    """A LightningModule's training_step, or a method called instead of the module."""
    model = Stack(1)
    with capture(model) as calls:
        model.layers[0]["attn"].forward(torch.randn(1, 4, 8))
        model.forward(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["Stack", "layers.0.attn"]


def test_vmap_is_reported():
    class Ensemble(Attention):
        def forward(self, x):
            return torch.vmap(super().forward)(x)

    with (
        pytest.warns(UserWarning, match="Ensemble: it runs inside torch.vmap"),
        pytest.raises(NoAttentionError),
        capture(model := Ensemble()),
    ):
        model(torch.randn(3, 1, 4, 8))


@pytest.mark.parametrize("how", ["whole", "fullgraph", "per block", "method"])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_compiled_training_steps(how, backward_inside):
    torch._dynamo.reset()
    model = Stack(2, is_causal=True)
    if how == "per block":
        for layer in model.layers:
            layer["attn"].compile(backend="eager")
        run = model
    elif how == "method":
        model.compile(backend="eager")
        run = model
    else:
        run = torch.compile(model, backend="eager", fullgraph=how == "fullgraph")
    x = torch.randn(2, 5, 8)

    def step():
        model.zero_grad()
        loss = run(x).square().sum()
        return loss

    losses = []
    for watch in (False, True, False, True):
        if watch:
            with capture(run) as calls:
                loss = step()
                if backward_inside:
                    loss.backward()
            assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn"]
        else:
            loss = step()
        if not (watch and backward_inside):
            loss.backward()
        losses.append((loss.item(), model.layers[0]["attn"].qkv.weight.grad.clone()))
    assert all(loss == losses[0][0] and torch.equal(grad, losses[0][1]) for loss, grad in losses)


def test_captures_that_overlap_leave_compilation_as_it_was():
    compiled = torch.compile(Stack(1), backend="eager")
    x = torch.randn(1, 4, 8)
    compiled(x)
    before = installed(compiled)
    one, other = Capture(compiled, lambda call: None), Capture(compiled, lambda call: None)
    one.__enter__()
    other.__enter__()
    one.__exit__()
    other.__exit__()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert installed(compiled) == before


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_checkpointed_forward_is_counted_once(use_reentrant, backward_inside):
    model = Stack(2)
    for layer in model.layers:
        layer["attn"].forward = functools.partial(checkpoint, layer["attn"].forward, use_reentrant=use_reentrant)
    x = torch.randn(1, 4, 8, requires_grad=True)
    with capture(model) as calls:
        loss = model(x).sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_precisions(dtype):
    model, x = Stack(1).to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    with capture(model) as calls:
        watched = model(x)
    assert torch.equal(watched, model(x))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert calls[0].pattern().dtype == expected
    assert all(value.dtype == torch.float32 for value in summarize(calls[0]).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    model, x = Stack(1), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype):
        plain = model(x)
        with capture(model) as calls:
            watched = model(x)
    assert torch.equal(plain, watched)
    assert calls[0].query.dtype == dtype
    assert not summarize(calls[0])["entropy"].isnan().any()


def test_another_default_dtype_and_device():
    model, x = Stack(1), torch.randn(2, 5, 8)
    with capture(model) as calls:
        model(x)
    expected = summarize(calls[0])
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # what is made without naming a device is of no use
    try:
        with capture(model) as calls:
            model(x)
        values, pattern = summarize(calls[0]), calls[0].pattern()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert pattern.device.type == "cpu"
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value)


def test_inference_mode():
    model, x = Stack(2), torch.randn(2, 5, 8)
    with torch.inference_mode(), capture(model) as calls:
        model(x)
    with torch.no_grad(), capture(model) as expected:
        model(x)
    assert [call.site for call in calls] == ["layers.0.attn", "layers.1.attn"]
    torch.testing.assert_close(calls[1].pattern(), expected[1].pattern())


def test_batches_of_variable_length():
    with capture(model := Stack(1)) as calls:
        for length in (3, 7, 1):
            model(torch.randn(1, length, 8))
    assert [call.shape for call in calls] == [(1, 2, length, length) for length in (3, 7, 1)]


def test_a_copy_of_the_model_made_meanwhile_is_its_own():
    model = Stack(1)
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
        other = copy.deepcopy(model)
        other(torch.randn(1, 4, 8))
    assert len(calls) == 1
    assert installed(other) == 0


def test_a_model_that_runs_in_another_thread_is_left_alone():
    model = Stack(1)
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
        thread = Thread(target=model, args=(torch.randn(1, 4, 8),))
        thread.start()
        thread.join()
        model(torch.randn(1, 4, 8))
    assert [call.site for call in calls] == ["layers.0.attn"] * 2


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
    assert not torch.nn.modules.module._has_any_global_hook()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("fast_path", [True, False])
def test_nothing_stays_installed_after_an_interruption(error, fast_path):
    class Interrupted(nn.Linear):
        def forward(self, x):
            raise error

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(not fast_path)
    layer.linear2 = Interrupted(16, 8)
    layer.activation_relu_or_gelu = 0  # so that the fast path is not taken after all, and linear2 is reached
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(not fast_path)
    user_mode = torch.device("cpu")
    with torch.set_grad_enabled(not fast_path), pytest.raises(error), capture(encoder):
        encoder(torch.randn(1, 3, 8))
    assert installed(encoder) == 0
    with user_mode, pytest.raises(error), capture(encoder):
        encoder(torch.randn(1, 3, 8))
    assert installed(encoder) == 0


def test_a_mode_of_the_user_s_that_is_left_on_stays_on():
    model, mode = Stack(1), torch.device("cpu")
    with capture(model):
        mode.__enter__()
        model(torch.randn(1, 4, 8))
    assert torch._C._len_torch_function_stack() == 1
    mode.__exit__(None, None, None)
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
