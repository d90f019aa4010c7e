"""Looking into a model that has read a text."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from attention_monitor import (
    AttentionCall,
    AttentionMaps,
    AttentionMonitorError,
    BatchProbe,
    TextProbe,
    attention_maps,
    capture,
    head_kinds,
    ranking,
    top_attended,
)
from attention_monitor.analysis import HEAD_STATISTICS, KINDS, attention_flow, rank_heads, weight_shift
from attention_monitor.diagnosis.roles import HeadRoles

from .project import Project, Tokenizer, installed

V = 40
SMALL = {"vocab_size": V, "attn_implementation": "sdpa"}


def gpt2():
    return transformers.GPT2Model(transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def bert():
    config = transformers.BertConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return transformers.BertModel(config)


def t5():
    config = transformers.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return transformers.T5Model(config)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_maps_equal_what_transformers_puts_out(make):
    model, ids = make().eval(), torch.randint(V, (1, 9))
    maps = attention_maps(model, BatchProbe({"input_ids": ids}))
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    assert len(maps) == len(expected) == 2
    assert maps.labels == ["L00", "L01"]
    for layer, pattern in enumerate(expected):
        assert maps.n_heads(layer) == 4
        torch.testing.assert_close(maps.pattern(layer), pattern[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(maps.pattern(layer).sum(-1), torch.ones(4, 9))


def test_maps_of_an_encoder_decoder_come_in_stacks_with_labels_of_their_own():
    model, ids, of_decoder = t5().eval(), torch.randint(V, (1, 9)), torch.randint(V, (1, 6))
    maps = attention_maps(model, BatchProbe({"input_ids": ids, "decoder_input_ids": of_decoder}))
    maps = AttentionMaps(maps.calls, maps.labels, maps.stacks, [f"s{i}" for i in range(9)], [f"t{i}" for i in range(6)])
    model.set_attn_implementation("eager")
    found = model(input_ids=ids, decoder_input_ids=of_decoder, output_attentions=True)
    expected = [*found.encoder_attentions, *found.decoder_attentions, *found.cross_attentions]
    assert len(maps) == len(expected) == 6
    for layer, pattern in enumerate(expected):
        torch.testing.assert_close(maps.pattern(layer), pattern[0], atol=1e-6, rtol=0)
    sides = [tuple(None if of is None else of[0][0] for of in maps.tokens_of(layer)) for layer in range(6)]
    assert sides == [("s", "s")] * 2 + [("t", "t")] * 2 + [("t", "s")] * 2


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_decoder_has_its_own_labels_where_its_encoder_is_not_seen(n_layers):
    config = transformers.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=32, num_layers=n_layers, num_heads=4)
    ids = torch.randint(V, (1, 6))
    probe = BatchProbe({"input_ids": ids, "decoder_input_ids": ids})
    maps = attention_maps(transformers.T5Model(config), probe, sites="decoder*")
    maps = AttentionMaps(maps.calls, maps.labels, maps.stacks, [f"s{i}" for i in range(6)], [f"t{i}" for i in range(6)])
    sides = [tuple(of[0][0] for of in maps.tokens_of(layer)) for layer in range(len(maps))]
    assert sides == [("t", "t")] * n_layers + [("t", "s")] * n_layers


def test_of_a_layer_with_windows_the_first_is_shown_and_all_are_measured():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "local_radius": 4}
    model = transformers.LongT5Model(transformers.LongT5Config(vocab_size=V, **sizes)).eval()
    ids = torch.randint(V, (2, 20))  # 4 windows of 5 tokens, which see those around them
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    maps = attention_maps(model, BatchProbe(inputs))
    with torch.no_grad(), capture(model) as calls:
        model(**inputs)
    windows = calls[0].pattern()[:4].double()  # (windows, H, Q, K) of the first text
    torch.testing.assert_close(maps.pattern(0).double(), windows[0])
    entropy = -torch.xlogy(windows, windows).sum(-1).mean((0, 2))  # (H,)
    torch.testing.assert_close(torch.tensor(maps.snapshot().values[0]["entropy"]).double(), entropy, atol=1e-5, rtol=0)


def test_labels_that_do_not_fit_a_map_are_left_out():
    maps = attention_maps(Project(), TextProbe("hello", Tokenizer()))
    assert maps.tokens_of(0) == (maps.tokens, maps.tokens)
    shorter = AttentionMaps(maps.calls, maps.labels, maps.stacks, ["a", "b"])
    assert shorter.tokens_of(0) == (None, None)


def test_columns_of_sinks_have_a_label():
    scores = torch.randn(1, 2, 3, 4)
    call = AttentionCall("a", None, None, model_scores=scores, n_sinks=1, sinks_in_pattern=True, self_attention=True)
    assert AttentionMaps([call], ["L00"], ["a"], ["x", "y", "z"]).tokens_of(0) == (
        ["x", "y", "z"],
        ["x", "y", "z", "(sink)"],
    )


def test_a_text_is_read_without_a_trace_and_its_tokens_are_labels():
    model = Project()
    before = torch.get_rng_state()
    maps = attention_maps(model, "hello", Tokenizer())
    assert maps.tokens == [str(ord(c) % 11) for c in "hello"]
    assert maps.pattern(0).shape == (2, 5, 5)
    assert model.training
    assert installed(model) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_of_a_batch_the_first_sequence_is_looked_at():
    batch = torch.randint(11, (3, 6))
    alone, first = (attention_maps(Project(), BatchProbe(x)) for x in (batch[:1], batch))
    torch.testing.assert_close(first.pattern(1), alone.pattern(1))


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(layer):
    maps = attention_maps(Project(), "hello", Tokenizer())
    with pytest.raises(AttentionMonitorError, match=f"There is no layer {layer}: this model has layers 0 to 1"):
        maps.pattern(layer)


def test_a_text_without_a_tokenizer_is_refused():
    with pytest.raises(AttentionMonitorError, match="no tokenizer was found"):
        attention_maps(Project(), "hello")


def test_top_attended_keys_come_from_the_largest_weight_on_and_have_some():
    pattern = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.5, 0.3]])
    assert top_attended(pattern, 2) == [
        [(0, 1.0)],
        [(1, 0.75), (0, 0.25)],
        [(1, 0.5), (2, pytest.approx(0.3))],
    ]
    assert [len(row) for row in top_attended(pattern, 99)] == [1, 2, 3]


def shifted(offset, T=20):
    """All weight at one place: ``offset`` back, and where there is none at the first token."""
    return F.one_hot((torch.arange(T) - offset).clamp(min=0), T).float()


def made_of(*patterns, causal=True):
    """A model's maps, of a layer with these heads (T, T); weights of 0 are those of keys that could have been seen."""
    scores = (torch.stack(patterns)[None] + 1e-30).log()
    seen = torch.ones_like(scores, dtype=torch.bool).tril() if causal else torch.ones_like(scores, dtype=torch.bool)
    scores = scores.masked_fill(~seen, -torch.inf)
    call = AttentionCall("a", None, None, model_scores=scores, self_attention=True)
    return AttentionMaps([call], ["L00"], ["a"])


UNIFORM = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]


def test_kinds_of_heads_that_were_made_to_be_of_them():
    halves = (shifted(0) + shifted(1) + shifted(5) + shifted(7)) / 4
    first = F.one_hot(torch.zeros(20, dtype=torch.long), 20).float()
    maps = made_of(shifted(0), shifted(1), first, UNIFORM, shifted(3), halves)
    values = maps.snapshot(HEAD_STATISTICS).values[0]
    assert head_kinds(values) == [
        ["diagonal", "sparse"], ["previous-token", "sparse"], ["sink", "sparse"], ["uniform"], ["sparse"], [],
    ]  # fmt: skip
    assert all(kind.rule for kind in KINDS)
    with pytest.raises(AttentionMonitorError, match=r"head_kinds needs max_entropy, normalized_entropy.* too"):
        head_kinds({"entropy": values["entropy"]})


def test_ranking_goes_down_and_leaves_nan_out():
    assert rank_heads([torch.tensor([0.5, math.nan]), torch.tensor([0.75])]) == [(1, 0, 0.75), (0, 0, 0.5)]
    found = ranking(made_of(UNIFORM, shifted(1)).snapshot(["normalized_entropy"]), "normalized_entropy")
    assert [one[:2] for one in found] == [(0, 0), (0, 1)]
    assert found[0][2] == pytest.approx(1)


def test_roles_follow_from_the_text():
    first = F.one_hot(torch.zeros(20, dtype=torch.long), 20).float()
    roles = HeadRoles()
    roles.update(made_of(first, shifted(2), UNIFORM).snapshot([], step=7))
    assert roles.since() == {"L00H00": {"sink": 7}, "L00H01": {"positional": 7}}


def test_flow_is_what_goes_to_itself_to_earlier_and_to_later_tokens():
    both = (torch.eye(20) + shifted(1)) / 2
    shares = attention_flow(made_of(both, shifted(0)).snapshot(HEAD_STATISTICS))
    assert shares["itself"][0] == pytest.approx([0.5, 1.0])
    assert shares["earlier tokens"][0] == pytest.approx([0.5, 0.0])
    assert set(shares) == {"itself", "earlier tokens"}
    ahead = attention_flow(made_of(both.flip(0, 1), causal=False).snapshot(HEAD_STATISTICS))
    assert ahead["later tokens"][0].item() == pytest.approx(19 * 0.5 / 20)  # the last row has none
    assert ahead["earlier tokens"][0].item() == pytest.approx(0)


def test_what_has_moved_is_half_the_absolute_difference_of_rows_that_see_two_keys():
    before, after = made_of(shifted(0), UNIFORM), made_of(shifted(1), UNIFORM)
    [share] = weight_shift(before, after)
    assert share.tolist() == [pytest.approx(1.0), 0.0]  # of row 0, which sees one key, nothing can move
    [half] = weight_shift(made_of(UNIFORM), made_of((UNIFORM + shifted(1)) / 2))
    expected = ((UNIFORM - shifted(1)).abs().sum(-1) / 4)[1:].mean()
    assert half.item() == pytest.approx(expected.item())


def test_models_that_differ_in_shape_or_tokens_are_not_compared():
    maps = made_of(UNIFORM)
    with pytest.raises(AttentionMonitorError, match=r"same layers and heads.*sizes of maps"):
        weight_shift(maps, made_of(UNIFORM, UNIFORM))
    with pytest.raises(AttentionMonitorError, match=r"tokens are \['a'\] and \['b'\]"):
        weight_shift(AttentionMaps(maps.calls, ["L00"], ["a"], ["a"]), AttentionMaps(maps.calls, ["L00"], ["a"], ["b"]))
    with pytest.raises(AttentionMonitorError, match="layers are"):
        weight_shift(maps, AttentionMaps(maps.calls, ["other"], ["a"]))


def test_a_model_without_attention_is_told_so():
    class Plain(nn.Module):
        def forward(self, tokens):
            return tokens

    with pytest.raises(AttentionMonitorError, match="No attention call was seen in Plain"):
        attention_maps(Plain(), "hello", Tokenizer())
