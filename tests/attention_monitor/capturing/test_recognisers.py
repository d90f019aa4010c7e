"""Each kind of attention call is read as it is, and nothing else is taken for one."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from attention_monitor import AttentionCall, NoAttentionError, capture, summarize
from attention_monitor.capturing.recognisers.base import RECOGNISERS, Recogniser

from ..handwritten import WRITTEN, Bahdanau, C, Einsum, NanoGPT, T


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Attend(nn.Module):
    """Hands what it gets to a function."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args, **kwargs):
        return self.function(*args, **self.options, **kwargs)


# scaled_dot_product_attention


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
    expected = reference(q, k, 0.5, mask).flatten(0, 1)  # the documented shape: (..., heads, queries, features)
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


def test_the_default_scale_is_one_over_the_root_of_the_head_dimension():
    [call] = captured(*[torch.randn(1, 1, 3, 16)] * 3)
    assert call.scale == 1 / math.sqrt(16)


def test_values_may_have_another_width():
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 7)
    [call] = captured(q, k, v)
    torch.testing.assert_close(call.pattern() @ v, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize(("Q", "K"), [(3, 7), (5, 5), (1, 6)])
def test_causal_bias_objects_are_masks(bias, Q, K):
    q, k = torch.randn(1, 2, Q, 4), torch.randn(1, 2, K, 4)
    [call] = captured(q, k, k, attn_mask=bias(Q, K))
    torch.testing.assert_close(call.pattern() @ k, F.scaled_dot_product_attention(q, k, k, attn_mask=bias(Q, K)))


def test_nested_tensors_are_reported_with_the_way_out():
    q = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged).unflatten(-1, (2, 2))
    q = q.transpose(1, 2)
    with (
        pytest.warns(UserWarning, match="Call: its queries and keys are nested tensors; pad them"),
        pytest.raises(NoAttentionError, match="seen but not understood: Call"),
    ):
        captured(q, q, q)


# Written out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_attention_as_people_write_it(name, training):
    model, x = WRITTEN[name]().train(training), torch.randn(3, T, C)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    with capture(model) as calls:
        watched = model(x)
    assert torch.equal(watched, plain)
    [call] = calls
    torch.testing.assert_close(call.pattern(), model.kept, atol=1e-6, rtol=0)
    assert call.is_self_attention == (not name.startswith("pooling"))


@pytest.mark.parametrize("name", ["textbook, -1e9", "textbook, finfo.min", "softcapped", "sinks"])
def test_keys_masked_by_a_number_do_not_count(name):
    model = WRITTEN[name]()
    with capture(model) as calls:
        model(torch.randn(2, T, C))
    allowed = calls[0].scores(0, T)[1].expand(2, 2, T, -1)[..., :T]
    assert torch.equal(allowed, torch.ones(2, 2, T, T, dtype=torch.bool).tril())


@pytest.mark.parametrize("factor", [1, 300])
def test_written_out_and_fused_attention_have_the_same_statistics(factor):
    """Also when scores have blown up: what is far below zero is not masked then."""
    x, written, fused = torch.randn(2, T, C), NanoGPT(flash=False).eval(), NanoGPT(flash=True).eval()
    with torch.no_grad():
        written.c_attn.weight *= factor
    fused.load_state_dict(written.state_dict())
    summaries = []
    for model in (written, fused):
        with capture(model) as calls:
            model(x)
        summaries.append(summarize(calls[0]))
    assert (summaries[0]["max_score"].max() > 1e4) == (factor == 300)
    for name in summaries[0]:
        torch.testing.assert_close(summaries[0][name], summaries[1][name], atol=1e-5, rtol=1e-5)


def test_padding_is_seen_in_scores_too():
    class Padded(NanoGPT):
        def forward(self, x):
            q, k, v = self.c_attn(x).view(2, T, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
            att = (q @ k.mT).masked_fill(torch.arange(T) >= T - 2, -1e9).softmax(-1)
            return att @ v

    with capture(model := Padded(False)) as calls:
        model(torch.randn(2, T, C))
    assert calls[0].padded_queries.expand(2, 2, T).tolist() == [[[False] * (T - 2) + [True] * 2] * 2] * 2


def test_a_half_precision_softmax_is_read_in_float32():
    model = WRITTEN["textbook"]().bfloat16()
    with capture(model) as calls:
        model(torch.randn(2, T, C, dtype=torch.bfloat16))
    assert calls[0].pattern().dtype == torch.float32
    torch.testing.assert_close(calls[0].pattern(), model.kept, atol=1e-2, rtol=0)


def test_learned_sinks_take_their_share_and_are_no_key():
    with capture(model := WRITTEN["sinks"]()) as calls:
        model(torch.randn(2, T, C))
    [call] = calls
    assert call.pattern().shape == (2, 2, T, T)
    assert (call.pattern().sum(-1) < 1).all()
    assert summarize(call)["diagonal_mean"].allclose(model.kept.diagonal(0, -2, -1).mean((0, 2)), atol=1e-6)


# Not attention


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(C, 5), nn.Softmax(dim=-1))


class LinearAttention(nn.Module):
    """Softmaxes over features, and no weights of keys for queries."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Buffered(nn.Module):
    """A codebook that is not learned by gradients."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, C))

    def forward(self, x):
        return (x @ self.codes.T).softmax(-1) @ self.codes


class NormedFeatures(nn.Module):
    """A softmax of normed features, in which nothing is left of the product that they once were."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        x = x @ x.mT @ x
        return self.norm(x).softmax(-1) @ x.mT


class Experts(nn.Module):
    """Every token mixes the outputs of all experts; ``mix`` says how."""

    def __init__(self, mix):
        super().__init__()
        self.gate, self.mix = nn.Linear(C, 3), mix
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(3))

    def forward(self, x):
        weights = F.softmax(self.gate(x), dim=-1)  # (B, T, experts)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)  # (B, T, experts, C)
        return self.mix(weights, outputs)


class ExpertAttention(Experts):
    """A router that is called an attention."""


class CosineRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(3, C))
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(3))

    def forward(self, x):
        weights = (x @ self.centroids.T).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return (weights.unsqueeze(-2) @ outputs).squeeze(-2)


class Codebook(nn.Module):
    """Soft quantisation: the values are weights."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(4, C)

    def forward(self, x):
        return (x @ self.codes.weight.T).softmax(-1) @ self.codes.weight


class ExpectedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embedding = nn.Linear(C, 11), nn.Embedding(11, C)

    def forward(self, x):
        return self.head(x).softmax(-1) @ self.embedding.weight


class Contrastive(nn.Module):
    """Similarities of all pairs in the batch, and a loss in the forward."""

    def forward(self, x):
        logits = x[:, 0] @ x[:, 1].T
        return logits.softmax(-1), F.cross_entropy(logits, torch.arange(len(x)))


class Parser(nn.Module):
    """Biaffine scores are the output."""

    def __init__(self):
        super().__init__()
        self.head, self.dependent = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        return (self.head(x) @ self.dependent(x).mT).softmax(-1)


MIXES = {
    "einsum": lambda w, y: torch.einsum("bte,btec->btc", w, y),
    "matmul": lambda w, y: (w.unsqueeze(-2) @ y).squeeze(-2),
    "bmm": lambda w, y: torch.bmm(w.reshape(-1, 1, 3), y.reshape(-1, 3, C)).view(2, T, C),
    "sum": lambda w, y: (w.unsqueeze(-1) * y).sum(2),
    "top-k": lambda w, y: (w.topk(2, -1).values.unsqueeze(-1) * y[:, :, :2]).sum(2),
}

NOT_ATTENTION = {
    "classifier": Classifier,
    **{f"experts, {name}": (lambda mix=mix: Experts(mix)) for name, mix in MIXES.items()},
    **{f"called attention, {name}": (lambda mix=mix: ExpertAttention(mix)) for name, mix in MIXES.items()},
    "cosine router": CosineRouter,
    "linear attention": LinearAttention,
    "buffered codebook": Buffered,
    "normed features": NormedFeatures,
    "codebook": Codebook,
    "expected embedding": ExpectedEmbedding,
    "contrastive": Contrastive,
    "parser": Parser,
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_a_softmax_that_is_not_attention_is_not_taken_for_it(name):
    model = nn.Sequential(WRITTEN["einsum"](), NOT_ATTENTION[name]())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attention_monitor could not look at a call of 1: its softmax")
        with capture(model) as calls:
            model(torch.randn(2, T, C))
    assert [call.site for call in calls] == ["0"]


@pytest.mark.parametrize(
    "name", [n for n in NOT_ATTENTION if not n.startswith(("called attention", "linear attention"))]
)
def test_a_softmax_that_is_not_attention_is_not_warned_about(name, recwarn):
    model = nn.Sequential(WRITTEN["einsum"](), NOT_ATTENTION[name]())
    with capture(model):
        model(torch.randn(2, T, C))
    assert [str(w.message) for w in recwarn] == []


def test_additive_scores_are_attention_only_where_the_module_is_called_so():
    with capture(model := nn.Sequential(WRITTEN["additive"](), Bahdanau())) as calls:
        model(torch.randn(2, T, C))
    assert [call.site for call in calls] == ["0"]


def test_attention_that_uses_its_weights_in_another_way_is_reported():
    class SlidingAttention(Einsum):
        def forward(self, x):
            q, k, v = self.to_qkv(x).chunk(3, -1)
            return ((q @ k.mT).softmax(-1)[..., None] * v[:, None]).sum(-2)

    reason = "its softmax was not seen to be multiplied with values by a matmul or einsum"
    model = nn.ModuleDict({"layer": SlidingAttention(), "other": Einsum()})
    with pytest.warns(UserWarning, match=f"call of layer: {reason}") as caught, capture(model) as calls:
        for _ in range(3):
            model["other"](model["layer"](torch.randn(2, T, C)))
    assert len(caught) == 1
    assert {call.site for call in calls} == {"other"}
    with (
        pytest.warns(UserWarning, match="could not look"),
        pytest.raises(NoAttentionError, match=reason),
        capture(model),
    ):
        model["layer"](torch.randn(2, T, C))


# Self- and cross-attention


class Cross(nn.Module):
    def __init__(self, written):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.written = written

    def forward(self, x, context=None):
        q, (k, v) = self.q(x), self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (2, C // 2)).transpose(1, 2) for z in (q, k, v))
        z = (q @ k.mT).softmax(-1) @ v if self.written else F.scaled_dot_product_attention(q, k, v)
        return self.out(z.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Queries and keys are normed apart, and handed to the attention by name."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.norm_q, self.norm_kv = attention, nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x, memory=None):
        return x + self.attention(self.norm_q(x), context=None if memory is None else self.norm_kv(memory))


class SplitCore(nn.Module):
    """The product is in a module of its own, which is handed q, k and v."""

    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    def __init__(self, written=False):
        super().__init__()
        self.q, self.k, self.v, self.core = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C), self.Core()

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.core(self.q(x)[:, None], self.k(context)[:, None], self.v(context)[:, None]).squeeze(1)


def rotary(x, angles):
    return x * angles.cos() + torch.cat([-x[..., C // 4 :], x[..., : C // 4]], -1) * angles.sin()


class Rotary(nn.Module):
    """Queries and keys share the angles, also where they come from different sequences."""

    def __init__(self, written=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C // 2), nn.Linear(C, C // 2), nn.Linear(C, C // 2)
        self.out = nn.Linear(C // 2, C)
        self.register_buffer("angles", torch.arange(T)[:, None] * torch.ones(C // 2))

    def forward(self, x, context=None):
        context = x if context is None else context
        angles = self.angles
        q, k = rotary(self.q(x), angles), rotary(self.k(context), angles)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], self.v(context)[:, None]).squeeze(1))


class Torch(nn.Module):
    def __init__(self, written=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x, context=None):
        if context is None:
            return self.attention(x + 1, x + 1, x)[0]  # positions added to each
        return self.attention(x, context, context)[0]


class NormedApart(nn.Module):
    """Norms and positions are applied to what is handed in, each time anew."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(C)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return x + self.attention(self.norm(x) + 1, self.norm(memory) + 1)


@pytest.mark.parametrize("wrap", [lambda attention: attention, Layer, NormedApart])
@pytest.mark.parametrize(
    "attention", [lambda: Cross(True), lambda: Cross(False), SplitCore, Rotary, Torch], ids=lambda f: f.__name__
)
def test_self_and_cross_attention_are_told_apart_also_at_equal_lengths(attention, wrap):
    if attention is Torch and wrap is NormedApart:
        attention = SplitCore  # two modules that only hand on: too far out to be told
    model = wrap(attention())
    x, memory = torch.randn(2, T, C), torch.randn(2, T, C)
    with capture(model) as calls:
        model(x)
        model(x, memory)
    assert [call.is_self_attention for call in calls] == [True, False]
    values = summarize(calls[1])
    assert values["diagonal_mean"].isnan().all()
    assert values["previous_token"].isnan().all()
    assert not values["entropy"].isnan().any()


def test_pooled_keys_have_no_positions():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(C, C), nn.Linear(C, 2 * C)

        def forward(self, x):
            k, v = self.kv(F.avg_pool1d(x.mT, 2).mT).chunk(2, -1)
            return F.scaled_dot_product_attention(self.q(x)[:, None], k[:, None], v[:, None])

    with capture(model := Pooled()) as calls:
        model(torch.randn(2, T, C))
    assert summarize(calls[0])["diagonal_mean"].isnan().all()


def test_weights_that_no_longer_sum_to_1_are_reported():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.gate = nn.Linear(C, 3 * C), nn.Parameter(torch.rand(T))

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return ((q @ k.mT).softmax(-1) * self.gate) @ v

    with (
        pytest.warns(UserWarning, match="Gated: after the softmax its weights were changed to others that do not sum"),
        pytest.raises(NoAttentionError),
        capture(model := Gated()),
    ):
        model(torch.randn(2, T, C))


def test_learned_queries_that_look_at_data_are_cross_attention():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.kv = nn.Parameter(torch.randn(T, C)), nn.Linear(C, 2 * C)

        def forward(self, x):
            k, v = self.kv(x).chunk(2, -1)
            return (self.query @ k.mT).softmax(-1) @ v

    with capture(model := Pooling()) as calls:
        model(torch.randn(2, T, C))
    assert [call.is_self_attention for call in calls] == [False]


class Cached(nn.Module):
    """One token after the other, with what came before in a cache."""

    def __init__(self, preallocated):
        super().__init__()
        self.qkv, self.preallocated = nn.Linear(C, 3 * C), preallocated
        self.keys = self.values = torch.zeros(1, 0, C)
        if preallocated:
            self.keys, self.values = torch.zeros(1, 10, C), torch.zeros(1, 10, C)
        self.seen = 0

    def forward(self, x):
        n = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = None
        if self.preallocated:
            if self.preallocated == "copied":
                self.keys[:, self.seen : self.seen + n].copy_(k.detach())
            else:
                self.keys[:, self.seen : self.seen + n] = k.detach()
            self.values[:, self.seen : self.seen + n] = v.detach()
            mask = torch.arange(10) <= torch.arange(self.seen, self.seen + n)[:, None]
        else:
            self.keys, self.values = torch.cat([self.keys, k], 1), torch.cat([self.values, v], 1)
            mask = torch.arange(self.keys.shape[1]) <= torch.arange(self.seen, self.seen + n)[:, None]
        self.seen += n
        return F.scaled_dot_product_attention(q[:, None], self.keys[:, None], self.values[:, None], attn_mask=mask)


@pytest.mark.parametrize("preallocated", [False, "assigned", "copied"])
def test_a_token_that_looks_into_a_cache_is_at_its_own_position(preallocated):
    x = torch.randn(1, 5, C)
    with capture(whole := Cached(False)) as calls:
        whole(x)
    expected = calls[0].pattern()
    model = Cached(preallocated)
    model.load_state_dict(whole.state_dict())
    with capture(model) as calls:
        model(x[:, :2])
        for i in range(2, 5):
            model(x[:, i : i + 1])
    assert [call.is_self_attention for call in calls] == [True] * 4
    for i, call in zip((2, 3, 4), calls[1:], strict=True):
        values = summarize(call)
        torch.testing.assert_close(values["diagonal_mean"], expected[0, :, i, i])
        torch.testing.assert_close(values["previous_token"], expected[0, :, i, i - 1])


# nn.MultiheadAttention, nn.Transformer


def multihead_cases():
    for bias, bias_kv, zero, batch_first, other_dim, padding, mask in itertools.product(
        [True, False],
        [True, False],
        [True, False],
        [True, False],
        [None, 6],
        [None, bool, float],
        [None, bool, float, 3],
    ):
        if not (padding and mask) or padding == mask or mask == 3:
            yield bias, bias_kv, zero, batch_first, other_dim, padding, mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("is_self", [True, False])
def test_multihead_attention_has_the_weights_that_it_returns(is_self, batched, training):
    E, H, B, Q = 8, 2, 3, 5
    K = Q if is_self else 6
    for case in multihead_cases():
        bias, bias_kv, zero, batch_first, other_dim, padding, mask = case
        if is_self and other_dim:
            continue
        model = nn.MultiheadAttention(
            E, H, bias=bias, add_bias_kv=bias_kv, add_zero_attn=zero, batch_first=batch_first, kdim=other_dim,
            vdim=other_dim,
        ).train(training)  # fmt: skip
        q, k = torch.randn(B, Q, E), torch.randn(B, K, other_dim or E)
        if not batched:
            q, k = q[0], k[0]
        elif not batch_first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        k = q if is_self else k
        hidden = torch.zeros(B, K, dtype=torch.bool) if batched else torch.zeros(K, dtype=torch.bool)
        hidden[..., -2:] = True
        later = torch.ones(Q, K, dtype=torch.bool).triu(1)
        options = {
            "key_padding_mask": {bool: hidden, float: hidden.float() * -1e9, None: None}[padding],
            "attn_mask": {
                bool: later, float: torch.zeros(Q, K).masked_fill(later, -torch.inf), None: None,
                3: later.expand(B * H if batched else H, Q, K),
            }[mask],
        }  # fmt: skip
        if padding is float and mask == 3:
            options["attn_mask"] = options["attn_mask"].float() * -1e9
        weights = model(q, k, k, average_attn_weights=False, **options)[1]
        for need_weights, grad in itertools.product([True, False], [True, False]):
            with torch.set_grad_enabled(grad):
                plain = model(q, k, k, need_weights=need_weights, **options)
                with capture(model) as calls:
                    watched = model(q, k, k, need_weights=need_weights, **options)
            [call] = calls
            assert torch.equal(watched[0], plain[0]), case
            assert watched[1] is plain[1] or torch.equal(watched[1], plain[1]), case
            expected = weights if batched else weights[None]
            torch.testing.assert_close(call.pattern(), expected, atol=1e-6, rtol=0, msg=str(case))
            assert call.is_self_attention == is_self, case


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", ["training", "evaluation", "fast path"])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_transformer_layers_are_seen_and_give_the_same_numbers(norm_first, batch_first, mode, padding, mask):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 16, **options), 2).train(mode == "training")
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(C, 2, 16, **options), 2).train(mode == "training")
    x = torch.randn(3, T, C) if batch_first else torch.randn(T, 3, C)
    memory = x + 1
    hidden = torch.zeros(3, T, dtype=torch.bool)
    hidden[0, -2:] = True
    hidden = hidden if padding else None
    later = torch.ones(T, T, dtype=torch.bool).triu(1) if mask else None

    def run():
        encoded = encoder(x, mask=later, src_key_padding_mask=hidden)
        return encoded, decoder(x, memory, tgt_mask=later, memory_key_padding_mask=hidden)

    with torch.set_grad_enabled(mode != "fast path"):
        plain = run()
        with capture(nn.ModuleDict({"e": encoder, "d": decoder})) as calls:
            watched = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [(call.site, call.is_self_attention) for call in calls] == [
        ("e.layers.0.self_attn", True),
        ("e.layers.1.self_attn", True),
        ("d.layers.0.self_attn", True),
        ("d.layers.0.multihead_attn", False),
        ("d.layers.1.self_attn", True),
        ("d.layers.1.multihead_attn", False),
    ]
    layer = encoder.layers[0]
    given = layer.norm1(x) if norm_first else x
    layer.train()  # for the weights from the ordinary path
    weights = layer.self_attn(given, given, given, hidden, attn_mask=later, average_attn_weights=False)[1]
    torch.testing.assert_close(calls[0].pattern(), weights, atol=1e-6, rtol=0)


# flex_attention


def distance_bias(score, b, h, q, k):
    return score + 0.1 * (h + 1) * (k - q)


def softcap(score, b, h, q, k):
    return 2 * torch.tanh(score / 2)


def causal(b, h, q, k):
    return q >= k


LENGTHS = torch.tensor([4, 6])


def padded(b, h, q, k):
    return k < LENGTHS[b]


@pytest.mark.parametrize("n_kv_head", [1, 4])
@pytest.mark.parametrize("score_mod", [None, distance_bias, softcap])
@pytest.mark.parametrize("mask_mod", [None, causal, padded])
def test_flex_attention_is_read_with_its_functions(mask_mod, score_mod, n_kv_head):
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, n_kv_head, T, 8), torch.randn(2, n_kv_head, T, 8)
    mask = None if mask_mod is None else flex.create_block_mask(mask_mod, 2, None, T, T, device="cpu")
    model = Attend(flex.flex_attention, score_mod=score_mod, block_mask=mask, enable_gqa=True, scale=0.4)
    plain = model(q, k, v)
    with capture(model) as calls:
        watched = model(q, k, v)
    assert torch.equal(plain, watched)
    scores = 0.4 * q @ k.repeat_interleave(4 // n_kv_head, 1).mT
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.arange(4).view(1, 4, 1, 1)
    i, j = torch.arange(T).view(1, 1, T, 1), torch.arange(T)
    scores = scores if score_mod is None else score_mod(scores, b, h, i, j)
    allowed = torch.ones(2, 1, T, T, dtype=torch.bool) if mask_mod is None else mask_mod(b, h, i, j)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(calls[0].pattern(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(calls[0].pattern(2, 4), expected[:, :, 2:4], atol=1e-6, rtol=0)
    torch.testing.assert_close(calls[0].first_sequences(1).pattern(), expected[:1], atol=1e-6, rtol=0)
    padding = calls[0].padded_queries
    assert (padding is not None and bool(padding.any())) == (mask_mod is padded)


def test_compiled_flex_attention_stays_compiled():
    """Its own numbers, to the bit: run eagerly it would hold all scores, which at long contexts fit nowhere."""
    compiled = torch.compile(flex.flex_attention)
    q = torch.randn(1, 2, 32, 16)
    model = Attend(compiled, score_mod=distance_bias)
    plain = model(q, q, q)
    with capture(model) as calls:
        watched = model(q, q, q)
    assert torch.equal(plain, watched)
    assert len(calls) == 1


def test_flex_attention_may_be_compiled_for_many_functions_and_shapes():
    with capture(model := Attend(flex.flex_attention)) as calls:
        for i in range(12):  # torch's limit for recompilations is 8
            mod = eval(f"lambda score, b, h, q, k: score * {i}")
            q = torch.randn(1, i + 1, 3 + i, 8)
            model(q, q, q, score_mod=mod)
    assert len(calls) == 12
    torch.testing.assert_close(calls[0].pattern(), torch.full((1, 1, 3, 3), 1 / 3))


def test_gradients_go_through_what_flex_attention_uses(monkeypatch):
    # torch refuses to train flex_attention on a CPU, where its fused kernel has no backward; the other path has
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    bias = nn.Parameter(torch.randn(T))
    q = torch.randn(1, 2, T, 8, requires_grad=True)
    model = Attend(flex.flex_attention, score_mod=lambda score, b, h, i, j: score + bias[i] * bias[j])
    plain = torch.autograd.grad(model(q, q, q).square().sum(), [q, bias])
    with capture(model):
        watched = model(q, q, q)
    watched = torch.autograd.grad(watched.square().sum(), [q, bias])
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


# flash_attn, xformers


@pytest.fixture(scope="module")
def flash_operator():
    """Operators with the names and schemas of flash_attn's, which needs a GPU; this does not test flash_attn itself."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define(
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
        "-> (Tensor, Tensor)"
    )
    library.define(
        "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "int max_seqlen_q, int max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
        "int window_size_left=-1, int window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
        "bool return_softmax=False, Tensor? block_table=None) -> (Tensor, Tensor)"
    )
    for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"):
        library.impl(name, lambda q, *args, **kwargs: (q.clone(), q.new_empty(0)), "CompositeExplicitAutograd")
    yield torch.ops.flash_attn
    library._destroy()


class FlashFunction(torch.autograd.Function):
    """flash_attn calls its operators inside one."""

    @staticmethod
    def forward(ctx, operator, q, k, v, args, kwargs):
        return operator(q.detach(), k.detach(), v.detach(), *args, **kwargs)[0]

    @staticmethod
    def backward(ctx, grad):
        return None, grad, None, None, None, None


def flash(operator, q, k, *args, **kwargs):
    with capture(model := Attend(FlashFunction.apply)) as calls:
        model(operator, q, k, k, args, kwargs)
    [call] = calls
    return call


@pytest.mark.parametrize("K", [T, T + 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (2, 1)])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.1])])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_flash_attn_is_read_from_its_operator(flash_operator, K, causal, window, slopes, softcap):
    q, k = torch.randn(2, T, 2, 4, requires_grad=True), torch.randn(2, K, 2, 4)
    call = flash(
        flash_operator._flash_attn_forward, q, k, 0.0, 0.3, causal, *window, softcap, slopes, return_softmax=False
    )
    scores = 0.3 * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    i, j = torch.arange(K - T, K)[:, None], torch.arange(K)  # the last query is aligned with the last key
    scores = scores if slopes is None else scores - slopes.view(2, 1, 1) * (i - j).abs()
    right = 0 if causal else window[1]
    hidden = torch.zeros(T, K, dtype=torch.bool)
    hidden |= (i - j > window[0]) if window[0] >= 0 else False
    hidden |= (j - i > right) if right >= 0 else False
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(call.pattern(), expected, atol=1e-6, rtol=0)


def test_packed_sequences_of_flash_attn_see_only_themselves(flash_operator):
    lengths, cu = (3, 4, 2), torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    q = torch.randn(9, 2, 4)
    call = flash(flash_operator._flash_attn_varlen_forward, q, q, cu, cu, 4, 4, 0.0, 0.5, True)
    blocks = [torch.ones(n, n).tril() for n in lengths]
    scores = 0.5 * q.transpose(0, 1) @ q.permute(1, 2, 0)
    expected = scores.masked_fill(torch.block_diag(*blocks) == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(call.pattern()[0], expected, atol=1e-6, rtol=0)


def test_a_paged_cache_of_flash_attn_is_reported(flash_operator):
    q, cu = torch.randn(4, 2, 4), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.warns(UserWarning, match="was given block_table"), pytest.raises(NoAttentionError, match="block_table"):
        flash(flash_operator._flash_attn_varlen_forward, q, q, cu, cu, 4, 4, 0.0, 0.5, True, block_table=cu)


@pytest.fixture(scope="module")
def xformers_operator():
    library = torch.library.Library("xformers", "FRAGMENT")
    library.define(
        "efficient_attention_forward_cutlass(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, float dropout_p, bool compute_logsumexp, "
        "int custom_mask_type, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) -> (Tensor, Tensor)"
    )
    library.impl(
        "efficient_attention_forward_cutlass",
        lambda query, *args, **kwargs: (query.clone(), query.new_empty(0)),
        "CompositeExplicitAutograd",
    )
    yield torch.ops.xformers.efficient_attention_forward_cutlass
    library._destroy()


@pytest.mark.parametrize(("mask_type", "offset"), [(0, None), (1, 0), (2, 3)])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("bias", [None, torch.randn(1, 2, T, T + 3)])
def test_xformers_is_read_from_its_operator(xformers_operator, mask_type, offset, window, bias):
    """An operator with the name and the schema of xformers', which needs a GPU; this does not test xformers itself."""
    q, k = torch.randn(2, T, 2, 4), torch.randn(2, T + 3, 2, 4)
    model = Attend(xformers_operator)
    with capture(model) as calls:
        model(q, k, k, bias, None, None, -1, 0.0, True, mask_type, scale=0.5, window_size=window)
    scores = 0.5 * q.transpose(1, 2) @ k.permute(0, 2, 3, 1) + (0 if bias is None else bias)
    i, j = torch.arange(T)[:, None] + (3 if offset is None else offset), torch.arange(T + 3)
    hidden = torch.zeros(T, T + 3, dtype=torch.bool)
    hidden |= (j > i) if mask_type else False
    hidden |= (j <= i - window) if window else False
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(calls[0].pattern(), expected, atol=1e-6, rtol=0)


# Your own


@pytest.fixture
def my_kernel(monkeypatch):
    def kernel(q, k, v):
        if torch.overrides.has_torch_function((q, k, v)):
            return torch.overrides.handle_torch_function(kernel, (q, k, v), q, k, v)
        return (q @ k.mT).softmax(-1) @ v

    monkeypatch.setitem(RECOGNISERS, kernel, None)  # what the test registers goes with it
    return kernel


def test_another_kind_of_call_is_one_class(my_kernel):
    class MyKernel(Recogniser):
        functions = (my_kernel,)

        def read(self, call):
            q, k, _ = call.args
            return AttentionCall("", q.detach(), k.detach(), self_attention=call.same_sequence(q, k))

    q = torch.randn(1, 2, T, 4)
    with capture(model := Attend(my_kernel)) as calls:
        model(q, q, q)
    torch.testing.assert_close(calls[0].pattern(), (q @ q.mT).softmax(-1))
    with (
        pytest.raises(NoAttentionError, match=r"that is multiplied with values, and MyKernel\. Use one of them"),
        capture(model := nn.Linear(2, 2)),
    ):
        model(torch.randn(2, 2))


def test_a_recogniser_may_run_around_a_call_and_judge_a_forward(my_kernel):
    class Judge(Recogniser):
        functions = (my_kernel,)
        reads = "two kernels in a row"

        def __init__(self):
            self.paths = []

        def around(self, func, args, kwargs):
            return func(*args, **kwargs) + 1

        def read(self, call):
            self.paths.append(call.frames[-1].name)

        def at_end_of_forward(self, understood):
            yield from ((path, f"only {len(self.paths)} after {sorted(understood)}") for path in self.paths)
            self.paths.clear()

    q = torch.randn(1, 1, T, 4)
    model = nn.Sequential(Call(), Attend(my_kernel))
    for _ in range(2):  # a capture of its own has a recogniser of its own
        with (
            pytest.warns(UserWarning, match=r"a call of model.1: only 1 after \['model.0'\]") as caught,
            capture(whole := Both(model)),
        ):
            outputs = [whole(q) for _ in range(2)]
        assert len(caught) == 1
    torch.testing.assert_close(outputs[0], (q @ q.mT).softmax(-1) @ q + 1)
    with (
        pytest.warns(UserWarning, match="a call of Attend: only 1 after"),
        pytest.raises(NoAttentionError, match=r", and two kernels in a row\. Use one of them"),
        capture(model[1]),
    ):
        model[1](q, q, q)


def test_a_recogniser_that_fails_does_not_stop_the_model(my_kernel):
    class Failing(Recogniser):
        functions = (my_kernel,)

        def read(self, call):
            return None

        def at_end_of_forward(self, understood):
            raise ZeroDivisionError("oops")

    q = torch.randn(1, 1, T, 4)
    model = Both(nn.ModuleList([Call(), Attend(my_kernel)]))
    with pytest.warns(UserWarning, match="a call of Both: ZeroDivisionError: oops"), capture(model) as calls:
        model(q)
    assert len(calls) == 1


class Both(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, q):
        for attend in self.model:
            z = attend(q, q, q)
        return z
