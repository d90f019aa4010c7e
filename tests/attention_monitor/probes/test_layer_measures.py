import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention_monitor import AttentionMonitorError, LayerProbe, run_probe
from attention_monitor.probes.layer_measures import head_distance, layer_of, rollout, token_spread


class Letters:
    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return chr(97 + ids[0])


def patterns(*shape):
    return torch.rand(*shape).tril().softmax(-1)


class Layer(nn.Module):
    """Attention, and what is the same for every token as ``collapse`` goes to 1."""

    def __init__(self, collapse=0.0):
        super().__init__()
        self.collapse, self.attention = collapse, nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x * (1 - self.collapse) + self.collapse * x.mean(1, keepdim=True)


class Model(nn.Module):
    def __init__(self, collapse):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(26, 8)
        self.layers = nn.ModuleList(Layer(c) for c in collapse)

    def forward(self, tokens):
        x = self.embedding(tokens)
        self.seen = []
        for layer in self.layers:
            x = layer(x)
            self.seen.append(x)
        return x


def test_the_distance_of_heads_is_the_jensen_shannon_divergence_to_the_nearest():
    pattern = patterns(4, 6, 6)
    expected = np.full((4, 4), np.inf)
    smooth = (pattern + 0.001).numpy()
    smooth = smooth / smooth.sum(-1, keepdims=True)
    for i in range(4):
        for j in range(4):
            if i != j:
                middle = (smooth[i] + smooth[j]) / 2
                kl = [(p * np.log(p / middle)).sum(-1) for p in (smooth[i], smooth[j])]
                expected[i, j] = np.mean((kl[0] + kl[1]) / 2)
    np.testing.assert_allclose(head_distance(pattern), expected.min(1), atol=1e-6)


def test_a_copied_head_has_no_distance_and_heads_that_share_nothing_have_ln_2():
    pattern = torch.zeros(3, 1, 4000)
    pattern[0, 0, 0] = pattern[1, 0, 0] = pattern[2, 0, 1] = 1
    assert head_distance(pattern)[:2].tolist() == [0, 0]
    apart = torch.eye(2)[:, None]
    assert head_distance(apart).tolist() == pytest.approx([math.log(2)] * 2, abs=0.01)
    assert head_distance(apart[:1]).isnan().all()


def test_rollout_multiplies_attention_and_the_residual_stream():
    first, second = patterns(2, 3, 5, 5)
    A, B = ((p.double().mean(0) + torch.eye(5)) / 2 for p in (first, second))
    found = rollout([first, second])
    torch.testing.assert_close(found[0], A.float())
    torch.testing.assert_close(found[1], (B @ A).float())
    torch.testing.assert_close(found[1].sum(-1), torch.ones(5))


def test_tokens_that_are_the_same_have_no_spread():
    x = torch.randn(5, 8)
    assert token_spread(x[:1].expand(5, 8)) == pytest.approx(0, abs=1e-7)
    assert token_spread(x - x.mean(0)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("site", "stack", "layer"),
    [
        ("transformer.h.3.attn", "transformer.h.*.attn", "transformer.h.3"),
        ("encoder.1.attention.2", "encoder.*.attention.2", "encoder.1"),
        ("h.0.attn", "h.0.attn", "h.0"),
        ("attn", "attn", ""),
    ],
)
def test_a_site_is_in_the_layer_that_its_stack_counts(site, stack, layer):
    assert layer_of(site, stack) == layer


def test_a_layer_probe_shows_where_tokens_become_one():
    model = Model(collapse=[0.0, 0.9, 0.9])
    snapshot = run_probe(model, LayerProbe("abcdefgh"), Letters())
    expected = [token_spread(x.detach()[0]) for x in model.seen]
    assert snapshot.layers["token_spread"] == pytest.approx(expected)
    assert expected[2] < expected[1] < expected[0]
    assert list(snapshot.rollout) == ["L00", "L01", "L02"]
    patterns = [torch.from_numpy(pattern) for pattern in snapshot.patterns]
    np.testing.assert_array_equal(snapshot.rollout["L02"], rollout(patterns)[2])
    np.testing.assert_array_equal(snapshot.values[1]["head_distance"], head_distance(patterns[1]))
    assert nn.modules.module._global_forward_hooks == {}


def test_a_model_that_is_no_stack_has_no_spread_but_the_rest():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(26, 8)

        def forward(self, tokens):
            x = self.embedding(tokens)[:, None]
            return F.scaled_dot_product_attention(x, x, x)

    snapshot = run_probe(Flat(), LayerProbe("abc"), Letters())
    assert math.isnan(snapshot.layers["token_spread"][0])
    assert len(snapshot.rollout) == 1


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(AttentionMonitorError, match="96 tokens at most, got 97"):
        LayerProbe("a" * 97).encode(Letters())


def test_the_axis_of_tokens_is_found_where_the_sequence_comes_first():
    class Turned(Layer):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    usual, turned = Model([0.0, 0.5]), Model([0.0, 0.5])
    for layer in turned.layers:
        layer.__class__ = Turned
    turned.forward = lambda tokens: turned.layers[1](turned.layers[0](turned.embedding(tokens).transpose(0, 1)))
    spread = [run_probe(m, LayerProbe("abcdefgh"), Letters()).layers["token_spread"] for m in (usual, turned)]
    assert spread[1] == pytest.approx(spread[0])
