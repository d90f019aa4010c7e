import collections
import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

from attention_monitor import (
    AttentionCall,
    AttentionMonitorError,
    BatchProbe,
    RelationProbe,
    RepeatedTokensProbe,
    TextProbe,
    run_probe,
)
from attention_monitor.probes.base import EncodedProbe, ProbeBatch, undisturbed
from attention_monitor.probes.position import position_scores
from attention_monitor.probes.repeated import repeat_scores

BYTES = tiktoken.Encoding(
    "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
)


def encoded(*inputs, name="text"):
    return EncodedProbe(name, [ProbeBatch(one, position_scores) for one in inputs])


def written(pattern):
    """A call whose pattern is given: (B, H, T, T)."""
    return AttentionCall("attn", None, None, model_scores=pattern.log(), self_attention=True)


class Given(nn.Module):
    """Attention with the patterns that a function of the tokens (B, T) gives, (B, H, T, T)."""

    def __init__(self, pattern, layers=1):
        super().__init__()
        self.pattern, self.layers = pattern, layers

    def forward(self, tokens):
        B, T = tokens.shape
        mask = self.pattern(tokens).log()
        x = torch.zeros(B, mask.shape[1], T, 4)
        for _ in range(self.layers):
            F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x


class Meddler(nn.Module):
    """A model whose forward changes everything that a probe must not change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Dropout().eval()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.cache = torch.randn(5)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return self.norm(torch.randn(4, 3))


def everything(model):
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "modes": [module.training for module in model.modules()],
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "buffer identity": {name: id(buffer) for name, buffer in model.named_buffers()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "grad": torch.is_grad_enabled(),
    }


def test_running_a_probe_leaves_no_trace():
    model = Meddler()
    before = everything(model)
    encoded(torch.tensor([[1, 2]])).run(model, nullcontext())
    assert everything(model) == before


def test_a_probe_that_fails_leaves_no_trace_either():
    model = Meddler()
    before = everything(model)
    with pytest.raises(TypeError), undisturbed(model):
        model(model(torch.zeros(1)), "too much")
    assert everything(model) == before


def test_a_text_is_encoded_by_the_tokenizer_given_and_labelled_by_token():
    probe = TextProbe("Hé").encode(BYTES)
    assert probe.batches[0].inputs.tolist() == [[72, 195, 169]]
    assert probe.labels == ["H", "é", "⋯"]


def test_a_text_may_be_given_as_token_ids():
    assert TextProbe([72, 105], BYTES).encode().batches[0].inputs.tolist() == [[72, 105]]
    assert TextProbe([72, 105], BYTES).encode().labels == ["H", "i"]
    assert TextProbe([72, 105]).encode().labels == ["72", "105"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (b"a\xf0\x9f\x99\x82b", ["a", "🙂", "⋯", "⋯", "⋯", "b"]),
        (b"\xf0\x9f\x99", ["�", "�", "�"]),  # not all of it
        (b"\xff!", ["�", "!"]),
        ("�".encode(), ["�", "�", "�"]),
    ],
)
def test_of_a_character_that_several_tokens_share_the_first_has_it(text, labels):
    assert TextProbe(list(text), BYTES).encode().labels == labels


def test_the_probes_own_tokenizer_comes_first():
    class Shout:
        def encode(self, text):
            return [len(text)]

        def decode(self, ids):
            return f"<{ids[0]}>"

    probe = TextProbe("abc", tokenizer=Shout()).encode(BYTES)
    assert (probe.batches[0].inputs.tolist(), probe.labels) == ([[3]], ["<3>"])


def test_special_tokens_in_a_text_are_plain_text():
    special = tiktoken.Encoding(
        "s", pat_str=r"\S+|\s+", mergeable_ranks=BYTES._mergeable_ranks, special_tokens={"<|x|>": 256}
    )
    assert 256 not in TextProbe("<|x|>").encode(special).batches[0].inputs


def test_a_text_without_a_tokenizer_or_without_tokens_is_refused():
    with pytest.raises(AttentionMonitorError, match=r"no tokenizer was found.*TextProbe\(text, tokenizer\)"):
        TextProbe("abc").encode(None)
    with pytest.raises(AttentionMonitorError, match="has no tokens"):
        TextProbe("").encode(BYTES)


def test_a_model_that_does_not_take_the_probe_is_named_with_its_own_complaint():
    with pytest.raises(AttentionMonitorError, match=r"'text' of shape \(1, 2\) .* Linear: RuntimeError: .*shape"):
        encoded(torch.tensor([[1.0, 2.0]])).run(nn.Linear(5, 1), nullcontext())


def test_tensors_of_a_batch_reach_the_model_as_they_are_written():
    seen = []

    class Spy(nn.Module):
        def forward(self, *args, **kwargs):
            seen.append((args, kwargs))

    for batch in (torch.zeros(2), (torch.zeros(2), 3), {"x": torch.zeros(2), "y": None}):
        BatchProbe(batch).encode().run(Spy(), nullcontext())
    assert [(len(args), sorted(kwargs)) for args, kwargs in seen] == [(1, []), (2, []), (0, ["x", "y"])]
    with pytest.raises(AttentionMonitorError, match="a tensor, a tuple of arguments or a dict of them, got int"):
        BatchProbe(3).encode()


# position


def test_a_sink_is_the_mean_weight_on_the_first_token():
    T = 64
    uniform = torch.ones(1, 1, T, T).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    assert position_scores(written(uniform))["sink"].item() == pytest.approx(0.074, abs=5e-4)  # Gu et al. 2024


def test_a_short_text_says_nothing_of_positions():
    assert position_scores(written(torch.ones(1, 1, 15, 15).tril())) == {}


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_a_positional_head_looks_at_one_offset_in_most_rows(block, monkeypatch):
    monkeypatch.setattr("attention_monitor.probes.position.MIN_TOKENS", 9)
    monkeypatch.setattr("attention_monitor.statistics.row_blocks.BLOCK_ROWS", block)
    monkeypatch.setattr("attention_monitor.statistics.row_blocks.BLOCK_ELEMENTS", 3 * 9 * block)
    T = 9
    rows = torch.full((1, 3, T, T), 0.01).tril()
    for i in range(1, T):
        rows[0, 0, i, i - 1] = 0.9  # always the token before
        rows[0, 1, i, max(0, i - 4)] = 0.9  # four back, where there is a token there: rows 4..8
        rows[0, 2, i, i // 2] = 0.9  # offsets 1, 1, 2, 2, 3, 3, 4, 4
    rows = rows / rows.sum(-1, keepdim=True)
    scores = position_scores(written(rows))
    assert scores["positional"].flatten().tolist() == pytest.approx([1, 5 / 8, 2 / 8])


# repeated random tokens


def test_repeated_tokens_are_a_first_token_and_blocks_that_are_the_same():
    encoded = RepeatedTokensProbe(vocab_size=100, n_tokens=10, n_repeats=3, n_draws=5, bos=7).encode()
    tokens = encoded.batches[0].inputs
    assert tokens.shape == (5, 31)
    assert (tokens[:, 0] == 7).all()
    assert (tokens[:, 1:11] == tokens[:, 11:21]).all()
    assert (tokens[:, 1:11] == tokens[:, 21:]).all()
    assert all(len(set(row[1:11].tolist())) == 10 for row in tokens)  # what followed a token is one place
    assert not (tokens[0] == tokens[1]).all()


def test_random_tokens_do_not_depend_on_the_global_random_state_and_leave_it_alone():
    torch.manual_seed(1)
    first = RepeatedTokensProbe(50).encode().batches[0].inputs
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert (torch.get_rng_state() == after).all()
    torch.manual_seed(2)
    assert (RepeatedTokensProbe(50).encode().batches[0].inputs == first).all()
    assert (RepeatedTokensProbe(50, seed=1).encode().batches[0].inputs != first).any()


def test_the_vocabulary_is_the_tokenizers_or_has_to_be_given():
    assert RepeatedTokensProbe().encode(BYTES).batches[0].inputs.max() < 256
    with pytest.raises(AttentionMonitorError, match=r"give RepeatedTokensProbe\(vocab_size=...\)"):
        RepeatedTokensProbe().encode()
    with pytest.raises(AttentionMonitorError, match=r"n_repeats of 2 or more.*got 9, 25, 1, 4 and 0"):
        RepeatedTokensProbe(9, n_repeats=1).encode()


def lookback(offset):
    """Tokens (B, T) -> patterns that look ``offset`` back, or at themselves where there is nothing."""

    def pattern(tokens):
        B, T = tokens.shape
        weights = torch.full((B, 1, T, T), 1e-9)
        for i in range(T):
            weights[:, :, i, i - offset if i >= offset else i] = 1
        return weights.tril()

    return pattern


@pytest.mark.parametrize(("role", "offset"), [("induction", 24), ("duplicate_token", 25), ("previous_token", 1)])
def test_a_head_made_for_a_role_scores_1_and_the_others_0(role, offset):
    snapshot = run_probe(Given(lookback(offset)), RepeatedTokensProbe(1000))
    scores = {name: values.item() for name, values in snapshot.values[0].items()}
    assert scores == pytest.approx({name: float(name == role) for name in scores}, abs=1e-3)


def head_detector(pattern, tokens, kind):
    """The score ``mul`` of TransformerLens' head_detector with exclude_bos, from its formula: the share of the weight
    (H, T, T) that lies where a head of that kind looks; without the first column, of rows that have such a place.
    """
    T = len(tokens)
    where = np.zeros((T, T))
    for i in range(T):
        for j in range(i):
            duplicate = tokens[i] == tokens[j]
            where[i, j] = {
                "previous_token": j == i - 1,
                "duplicate_token": duplicate,
                "induction": j >= 1 and tokens[i] == tokens[j - 1],
            }[kind]
    pattern, where = pattern.copy(), where.copy()
    pattern[:, :, 0] = where[:, 0] = 0
    return (pattern * where).sum((1, 2)) / pattern.sum((1, 2))


def test_an_induction_head_may_look_at_any_earlier_occurrence():
    for repeats_back in (1, 2, 3):
        scores = run_probe(Given(lookback(25 * repeats_back - 1)), RepeatedTokensProbe(1000)).values[0]
        assert scores["induction"].item() == pytest.approx((4 - repeats_back) / 3, abs=1e-3)


@pytest.mark.parametrize("kind", ["induction", "duplicate_token", "previous_token"])
def test_scores_follow_from_those_of_transformer_lens(kind):
    n, n_repeats, H = 6, 3, 3
    probe = RepeatedTokensProbe(50, n_tokens=n, n_repeats=n_repeats, n_draws=1, bos=0)
    tokens = probe.encode().batches[0].inputs[0]
    tokens[1:] += 1  # none is the first token
    T = len(tokens)
    pattern = torch.rand(1, H, T, T).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    ours = repeat_scores(written(pattern), n, (1, T))[kind][0].numpy()
    # theirs is the share of all weight, ours the mean over rows
    n_rows = T - 1 if kind == "previous_token" else n * (n_repeats - 1)
    weights = pattern[0].numpy()
    if kind == "previous_token":  # exclude_bos leaves out row 1, which looks at it
        ours = ours - weights[:, 1, 0] / n_rows
    theirs = head_detector(weights, tokens.tolist(), kind) * weights[:, :, 1:].sum((1, 2)) / n_rows
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_formula_of_head_detector_is_that_of_transformer_lens():
    detector = pytest.importorskip(
        "transformer_lens.head_detector", reason="transformer-lens is not installed: pip install transformer-lens"
    )
    tokens = torch.tensor([[0, 3, 1, 4, 3, 1, 4, 2]])
    functions = {
        "previous_token": detector.get_previous_token_head_detection_pattern,
        "duplicate_token": detector.get_duplicate_token_head_detection_pattern,
        "induction": detector.get_induction_head_detection_pattern,
    }
    pattern = torch.rand(2, 8, 8).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    for kind, function in functions.items():
        theirs = [
            detector.compute_head_attention_similarity_score(
                head.clone(),
                detection_pattern=function(tokens),
                exclude_bos=True,
                exclude_current_token=False,
                error_measure="mul",
            )
            for head in pattern
        ]
        np.testing.assert_allclose(head_detector(pattern.numpy(), tokens[0].tolist(), kind), theirs, rtol=1e-5)


# relations


def find(*pairs):
    """Tokens (B, T) -> a pattern that has most weight on these (query, key) pairs, and else on the token itself."""

    def pattern(tokens):
        B, T = tokens.shape
        weights = torch.full((B, 1, T, T), 1e-6) + torch.eye(T)
        for query, key in pairs:
            if query < T:
                weights[:, :, query, key] = 0.5
        return weights

    return pattern


def test_relations_are_scored_per_head_beside_the_best_fixed_offset():
    examples = [
        ([5, 6, 7, 8, 9], [(3, 1, "a"), (4, 1, "a")]),
        ([5, 6, 7], [(2, 0, "a"), (1, 0, "b")]),
        ([4, 3, 2], [(2, 1, "b")]),
    ]
    snapshot = run_probe(Given(find((3, 1), (2, 0))), RelationProbe(examples))
    # in the first text one of two, in the second its pair: the token itself and later ones do not count
    assert snapshot.values[0]["a"].tolist() == pytest.approx([2 / 3])
    assert snapshot.values[0]["b"].tolist() == [0.5]  # (1, 0): no weight but 1e-6 anywhere before, so the first
    a, b = snapshot.scores
    assert (a.name, a.n, a.baseline, a.offset) == ("a", 3, pytest.approx(2 / 3), -2)
    assert a.threshold == pytest.approx(2 / 3 + 0.1)
    assert (b.n, b.baseline, b.offset) == (2, 1, -1)


def test_words_are_found_in_the_tokens_of_a_text():
    text = "The cat sat. It purred."
    probe = RelationProbe([(text, [("It", "cat", "pronoun"), ((13, 15), (0, 3), "article")])], BYTES)
    [batch] = probe.encode().batches
    pairs = [pair for _, pair in batch.score.keywords["pairs"]]
    assert [(pair.query, pair.keys, pair.relation) for pair in pairs] == [
        (14, range(4, 7), "pronoun"),  # the query is the last token of its word, the key any token of it
        (14, range(0, 3), "article"),
    ]


def test_a_fast_tokenizer_of_transformers_says_itself_where_tokens_stand():
    class Fast:
        is_fast = True

        def encode(self, text):
            raise AssertionError

        decode = encode

        def __call__(self, text, return_offsets_mapping):
            return {"input_ids": [0, 11, 12, 13, 1], "offset_mapping": [(0, 0), (0, 3), (4, 7), (7, 10), (0, 0)]}

    [batch] = RelationProbe([("The catsat", [("catsat", "The", "x")])], Fast()).encode().batches
    assert batch.inputs.tolist() == [[0, 11, 12, 13, 1]]
    [(_, pair)] = batch.score.keywords["pairs"]
    assert (pair.query, pair.keys) == (3, range(1, 2))


def test_texts_are_cut_at_max_tokens_and_lose_the_pairs_beyond():
    examples = [([1, 2, 3, 4], [(3, 0, "a"), (1, 0, "a")])]
    encoded = RelationProbe(examples, max_tokens=3).encode()
    assert encoded.batches[0].inputs.tolist() == [[1, 2, 3]]
    assert encoded.scores[0].n == 1


def test_examples_may_come_from_a_function():
    assert RelationProbe(lambda: [([1, 2], [(1, 0, "a")])]).encode().scores[0].name == "a"


@pytest.mark.parametrize("pair", [(1, 1, "a"), (1, 2, "a"), (5, 1, "a"), (1, -1, "a")])
def test_a_relation_that_does_not_look_back_is_refused(pair):
    with pytest.raises(AttentionMonitorError, match="key must come before the query"):
        RelationProbe([([1, 2, 3], [pair])]).encode()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("It", "dog", "a"), "'dog' occurs 0 times"),
        (("the", "cat", "a"), "'the' occurs 2 times in .* give \\(start, stop\\)"),
        (("It", (90, 99), "a"), r"of its 28 characters, got \(90, 99\)"),
    ],
)
def test_a_word_that_is_not_one_place_is_refused(pair, message):
    with pytest.raises(AttentionMonitorError, match=message):
        RelationProbe([("cat on the mat, the end. It.", [pair])], BYTES).encode()


def test_a_tokenizer_that_changes_the_text_is_refused():
    class Lower:
        def encode(self, text):
            return [ord(c) for c in text.lower()]

        def decode(self, ids):
            return "".join(map(chr, ids))

    with pytest.raises(AttentionMonitorError, match=r"makes 'the cat' of 'The cat'.*give token ids"):
        RelationProbe([("The cat", [("cat", "The", "a")])], Lower()).encode()


def test_a_relation_probe_without_pairs_is_refused():
    with pytest.raises(AttentionMonitorError, match="has no pairs"):
        RelationProbe([([1, 2], [])]).encode()


# any probe on a model whose positions are not those of the tokens


def test_a_model_that_puts_a_token_before_the_text_has_no_scores_by_position_of_tokens():
    class Prefixed(Given):
        def forward(self, tokens):
            return super().forward(F.pad(tokens, (1, 0)))

    values = run_probe(Prefixed(lookback(1)), RelationProbe([([1, 2, 3], [(2, 1, "a")])])).values[0]
    assert np.isnan(values["a"]).all()
    values = run_probe(Prefixed(lookback(1)), RepeatedTokensProbe(90)).values[0]
    assert np.isnan(values["induction"]).all()
    assert run_probe(Prefixed(lookback(1)), TextProbe("hello" * 4, BYTES)).values[0]["positional"].item() == 1


# what must not happen


class LoRA(nn.Module):
    """Merges its weights in evaluation mode, as LoRA layers do, and takes them apart again in training."""

    def __init__(self):
        super().__init__()
        self.base, self.low, self.merged = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.base.weight.data += -self.low if self.merged else self.low
            self.merged = not self.merged
        return self

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + x @ self.low


def test_a_model_that_changes_with_its_mode_is_not_changed():
    model = LoRA().train()
    weight = model.base.weight.clone()
    with undisturbed(model):
        assert not model.training
        model(torch.zeros(4))
    assert (model.training, model.merged) == (True, False)
    assert torch.equal(model.base.weight, weight)


def test_a_buffer_that_is_registered_on_the_way_is_taken_out_again():
    class Lazy(nn.Module):
        def forward(self, x):
            if not hasattr(self, "cache"):
                self.register_buffer("cache", x.clone())
            return x + self.cache

    model = Lazy()
    BatchProbe(torch.zeros(3)).encode().run(model, nullcontext())
    assert dict(model.named_buffers()) == {}
    model(torch.zeros(5))


def test_buffers_made_in_inference_mode_are_left_as_they_are():
    model = nn.Module()
    with torch.inference_mode():
        model.register_buffer("made", torch.ones(2))
    with undisturbed(model):
        pass
    assert model.made.tolist() == [1, 1]


@pytest.mark.parametrize("first", [0, 4, 40])
def test_a_head_is_positional_wherever_its_queries_are(first):
    """Beyond the keys too: those of BigBird's blocks are picked from a longer text."""
    offsets = torch.tensor([2] * 16 + [3] * 4)  # of the largest weight, from the first key on
    scores = torch.eye(30)[torch.arange(20) + offsets] * 50
    positions = torch.arange(20) + first
    call = AttentionCall(
        "attn", None, None, model_scores=scores[None, None], self_attention=True, query_positions=positions
    )
    assert position_scores(call)["positional"].item() == pytest.approx(0.8)


def test_a_head_whose_other_weights_are_exactly_0_is_positional_still():
    T = 32
    scores = torch.zeros(1, 1, T, T)
    scores[0, 0, range(1, T), range(T - 1)] = 200.0
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    call = AttentionCall("attn", None, None, model_scores=scores, self_attention=True)
    assert position_scores(call)["positional"].item() == 1


def test_a_sequence_that_is_all_padding_is_left_out():
    T = 20
    mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    mask[1] = False
    q = torch.zeros(2, 1, T, 4)
    scores = position_scores(AttentionCall("attn", q, q, mask, self_attention=True))
    assert scores["sink"].shape == (1, 1)
    assert scores["sink"].isfinite().all()


@pytest.mark.parametrize("pattern", [math.nan, 0.0])
def test_a_head_that_looks_at_no_earlier_token_hits_nothing(pattern):
    def weights(tokens):
        return torch.full((1, 1, 3, 3), pattern) + torch.eye(3)

    values = run_probe(Given(weights), RelationProbe([([1, 2, 3], [(2, 0, "a")])])).values[0]
    assert values["a"].tolist() == [0]


def test_a_mapping_that_is_no_dict_is_handed_on_as_one():
    seen = []

    class Spy(nn.Module):
        def forward(self, **kwargs):
            seen.append(kwargs["x"].device.type)

    batch = collections.UserDict(x=torch.zeros(2))
    EncodedProbe("b", [ProbeBatch(batch, position_scores)]).batches[0].run(Spy(), torch.device("meta"))
    assert seen == ["meta"]


def test_special_tokens_are_not_drawn():
    class Special:
        all_special_ids, vocab_size, bos_token_id = [0, 1, 2], 60, 0

    tokens = RepeatedTokensProbe(n_draws=50).encode(Special()).batches[0].inputs
    assert (tokens[:, 0] == 0).all()
    assert tokens[:, 1:].min() == 3


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("text", r"is \(text, \[\(query, key, relation\), ...\]\).*; got 'text'"),
        (None, "got None"),
        ([(5, [])], r"got \(5, \[\]\)"),
        ([("a b", [("b", "a", "x/y")])], "a name of letters, digits, spaces, - and _"),
        ([("text", [("a", "b")])], r"got \('text', \[\('a', 'b'\)\]\)"),
        ([("text", [("a", "b", 3)])], "An example of the probe 'relation'"),
        ([("text it", [("it", 3, "a")])], r"a word, or \(start, stop\) of its 7 characters, got 3"),
        ([("text it", [((5, 99), "text", "a")])], r"of its 7 characters, got \(5, 99\)"),
        ([("text it", [(("a", "b"), "text", "a")])], r"of its 7 characters, got \('a', 'b'\)"),
    ],
)
def test_malformed_examples_are_refused(examples, message):
    with pytest.raises(AttentionMonitorError, match=message):
        RelationProbe(examples, BYTES).encode()


@pytest.mark.parametrize("max_tokens", [0, 2.5, "a", True])
def test_max_tokens_that_cannot_be_is_refused(max_tokens):
    with pytest.raises(AttentionMonitorError, match="max_tokens of the probe 'relation' must be 1 or more, got"):
        RelationProbe([], max_tokens=max_tokens).encode()


def test_punctuation_is_found_beside_words():
    probe = RelationProbe([("Ann! He sat.", [(".", "!", "end")])], BYTES).encode()
    assert probe.scores[0].offset == 3 - 11


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (RepeatedTokensProbe(vocab_size=10.5), "vocab_size, n_tokens and n_repeats of 2 or more.*got 10.5"),
        (RepeatedTokensProbe(vocab_size=10, n_tokens=2.5), "got 10, 2.5"),
        (RepeatedTokensProbe(vocab_size=10, seed=None), "and None"),
        (RepeatedTokensProbe(vocab_size=10, bos=[1]), r"a token to begin with, got 10 of 10 and bos=\[1\]"),
        (TextProbe(5, BYTES), "makes a list of token ids of, or that list; got 5"),
        (TextProbe([1, "a"], BYTES), r"or that list; got \[1, 'a'\]"),
        (TextProbe([], BYTES), r"The probe \[\] has no tokens"),
    ],
)
def test_probes_that_cannot_be_are_refused(probe, message):
    with pytest.raises(AttentionMonitorError, match=message):
        probe.encode()


@pytest.mark.parametrize(
    ("encode", "decode", "message"),
    [
        (lambda text: None, str, "or that list; got None"),
        (lambda text: "ab", str, "or that list; got 'ab'"),
        (lambda text: torch.zeros(2, 2), str, "or that list"),
        (lambda text: {}["x"], str, "The tokenizer could not encode the probe 'abc': KeyError"),
        (lambda text: [1], lambda ids: None, "decode gives None for a token"),
    ],
)
def test_a_tokenizer_that_does_not_do_its_work_is_named(encode, decode, message):
    tokenizer = type("Tokenizer", (), {"encode": staticmethod(encode), "decode": staticmethod(decode)})
    with pytest.raises(AttentionMonitorError, match=message):
        TextProbe("abc", tokenizer).encode()


def test_a_vocabulary_of_special_tokens_alone_is_refused():
    tokenizer = type("Tokenizer", (), {"vocab_size": 3, "all_special_ids": [0, 1, 2]})
    with pytest.raises(AttentionMonitorError, match=r"needs tokens that are not special.*got 0 of 3"):
        RepeatedTokensProbe().encode(tokenizer)


def test_a_model_that_writes_into_its_inputs_does_not_change_the_probe():
    class Norm(nn.Module):
        def forward(self, x):
            x.div_(2)
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])

    given = torch.randn(2, 6, 8)
    before, probe = given.clone(), BatchProbe(given)
    first, second = (run_probe(Norm(), probe, statistics=["entropy"]).values[0]["entropy"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("model", "probe", "message"),
    [
        (nn.Linear(1, 1), [TextProbe("a"), TextProbe("b", name="b")], "run_probe takes one probe"),
        (nn.Linear(1, 1), None, "run_probe takes one probe, got None"),
        (3, TextProbe("a"), "run_probe runs a torch.nn.Module, got 3"),
    ],
)
def test_what_cannot_be_run_is_refused(model, probe, message):
    with pytest.raises(AttentionMonitorError, match=message):
        run_probe(model, probe, BYTES)
