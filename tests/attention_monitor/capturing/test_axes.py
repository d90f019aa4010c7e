"""Heads are heads and positions are positions, whatever order a model keeps its axes in."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention_monitor import AttentionRecorder, capture, summarize

from ..layouts import LAYOUTS, B, C, D, H, T, Written, split


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def calls_of(model, *inputs):
    with capture(model) as calls:
        model(*inputs)
    return calls


# One attention in many layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_attention_is_the_same_in_every_layout(name, recwarn):
    model, x = Written(LAYOUTS[name]), torch.randn(B, T, C)
    pattern, out = model.truth(x)
    with capture(model) as calls:
        result = model(x)
    torch.testing.assert_close(result, out, atol=1e-6, rtol=0)  # the layout itself is right
    [call] = calls
    assert call.pattern().shape == (B, H, T, T)
    torch.testing.assert_close(call.pattern().double(), pattern, atol=1e-6, rtol=0)
    assert call.is_self_attention
    assert call.has_positions
    assert call.windows == 1
    expected = pattern.diagonal(0, -2, -1).mean((0, 2))
    torch.testing.assert_close(summarize(call)["diagonal_mean"].double(), expected, atol=1e-6, rtol=0)
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_are_told_apart_also_when_sizes_are_alike(name, monkeypatch):
    """Where B, H, T and D are equal, sizes say nothing."""
    for module in ("tests.attention_monitor.layouts",):
        for size, value in {"B": 4, "T": 4, "H": 4, "D": 4, "C": 16, "SCALE": 0.5}.items():
            monkeypatch.setattr(f"{module}.{size}", value)
    model, x = Written(LAYOUTS[name]), torch.randn(4, 4, 16)
    pattern, _ = model.truth(x)
    [call] = calls_of(model, x)
    torch.testing.assert_close(call.pattern().double(), pattern, atol=1e-6, rtol=0)


def test_there_are_at_least_forty_layouts():
    assert len(LAYOUTS) >= 40


# Windows


class Windows(nn.Module):
    """Attention in windows of a sequence, whose scores have five axes, or are merged with sequences or heads."""

    num_heads = 2

    def __init__(self, how):
        super().__init__()
        self.qkv, self.how = nn.Linear(8, 24), how

    def forward(self, x):
        B, W, T, C = x.shape
        if self.how in ("of a sequence", "of a turned sequence"):
            x = x.reshape(B, W * T, C)
            x = x.roll(1, 1) if self.how == "of a turned sequence" else x
            x = x.view(B, W, T, C)
        q, k, v = self.qkv(x).view(B, W, T, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)  # (B, W, H, T, D)
        if self.how == "heads before windows":
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if self.how == "windows first":
            q, k, v = (z.transpose(0, 1).flatten(0, 1) for z in (q, k, v))
        if self.how == "all merged":
            q, k, v = (z.flatten(0, 2) for z in (q, k, v))
        self.kept = (q @ k.mT / 2).softmax(-1).detach()
        if self.how == "written out":
            return (q @ k.mT / 2).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v)


WINDOWS = (
    "fused", "written out", "heads before windows", "windows first", "all merged", "of a sequence",
    "of a turned sequence",
)  # fmt: skip


@pytest.mark.parametrize("how", WINDOWS)
def test_windows_are_sequences_and_no_heads(how):
    model = Windows(how)
    [call] = calls_of(model, torch.randn(3, 16, 5, 8))
    assert call.shape == (48, 2, 5, 5)
    assert (call.n_samples, call.windows) == (3, 16)
    kept = model.kept
    if how == "heads before windows":
        kept = kept.transpose(1, 2)
    if how == "windows first":
        kept = kept.unflatten(0, (16, 3)).transpose(0, 1)
    torch.testing.assert_close(call.pattern(), kept.reshape(48, 2, 5, 5), atol=1e-6, rtol=0)
    assert call.has_positions


def test_a_table_attends_along_rows_and_along_columns():
    class Axial(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):  # (B, rows, columns, C)
            x = self.attend(x)
            return self.attend(x.transpose(1, 2)).transpose(1, 2)

        def attend(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 2, 4).permute(3, 0, 1, 4, 2, 5)
            return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)

    for samples in (1, 3):
        along_columns, along_rows = calls_of(Axial(), torch.randn(samples, 6, 4, 8))
        assert (along_columns.shape, along_columns.windows) == ((samples * 6, 2, 4, 4), 6)
        assert (along_rows.shape, along_rows.windows) == ((samples * 4, 2, 6, 6), 4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_windows_in_the_batch_of_multihead_attention(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x):  # (B, 3 windows x 4 tokens, C)
            x = x.view(2, 3, 4, 8).flatten(0, 1)
            x = x if batch_first else x.transpose(0, 1)
            return self.attention(x, x, x, need_weights=False)[0]

    [call] = calls_of(Net(), torch.randn(2, 12, 8))
    assert (call.shape, call.n_samples, call.windows) == ((6, 2, 4, 4), 2, 3)


@pytest.mark.parametrize("sample", range(4))
@pytest.mark.parametrize("window", [0, 7, 15])
def test_nan_in_any_window_is_seen_when_all_samples_are_looked_at(sample, window):
    model, x = Windows("fused"), torch.randn(4, 16, 5, 8)
    x[sample, window] = math.nan
    recorder = AttentionRecorder(model, max_sequences=4, statistics=["nonfinite_fraction"])
    with pytest.warns(UserWarning, match="non-finite"), recorder.step(0):
        model(x)
    [values] = recorder.snapshots["live"].values
    torch.testing.assert_close(torch.tensor(values["nonfinite_fraction"]), torch.full((2,), 1 / 64))


def test_few_tokens_are_spread_over_the_windows_of_all_samples():
    """Each window has a weight of its own on the diagonal, so that a mean tells which were looked at."""
    model = Windows("fused")
    with torch.no_grad():
        model.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
        model.qkv.bias.zero_()
    x = torch.randn(2, 16, 5, 8)
    [call] = calls_of(model, x)
    recorder = AttentionRecorder(model, max_sequences=2, max_tokens=40, statistics=["diagonal_mean"])
    with recorder.step(0):
        model(x)
    expected = call.pattern()[::4].diagonal(0, -2, -1).mean((0, 2))  # 8 of 32 windows
    torch.testing.assert_close(torch.tensor(recorder.snapshots["live"].values[0]["diagonal_mean"]), expected)


# Positions


class Picks(nn.Module):
    """Every query looks at itself: keys are an orthonormal code of the places."""

    def __init__(self, pick, written=True):
        super().__init__()
        self.pick, self.written = pick, written
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.q.weight)
        nn.init.eye_(self.k.weight)

    def forward(self, x):
        q, k = 100 * self.pick(self, x), self.k(x)
        if self.written:
            return (q @ k.mT).softmax(-1) @ x
        return F.scaled_dot_product_attention(q, k, x, scale=1.0)


PICKS = {
    "last": lambda m, x: m.q(x[:, 7:]),
    "first": lambda m, x: m.q(x[:, :1]),
    "selected, with an axis again": lambda m, x: m.q(x[:, 3]).unsqueeze(1),
    "in the middle": lambda m, x: m.q(x[:, 2:6]),
    "after the projection": lambda m, x: m.q(x)[:, 2:6],
    "narrow": lambda m, x: m.q(x).narrow(1, 2, 4),
    "from the end": lambda m, x: m.q(x)[:, -3:-1],
    "every second": lambda m, x: m.q(x)[:, ::2],
    "a list": lambda m, x: m.q(x[:, [6, 1, 3]]),
    "an index": lambda m, x: m.q(x)[:, torch.tensor([6, 1, 3])],
    "index_select": lambda m, x: m.q(x).index_select(1, torch.tensor([5, 0])),
    "a chunk": lambda m, x: m.q(x).chunk(4, 1)[2],
    "a part of a split": lambda m, x: m.q(x).split([3, 5], 1)[1],
    "a slice of a slice": lambda m, x: m.q(x[:, 1:7][:, 1:4]),
    "put together again": lambda m, x: torch.cat([m.q(x[:, :3]), m.q(x[:, 3:])], 1),
    "put together in another order": lambda m, x: torch.cat([m.q(x[:, 4:]), m.q(x[:, :4])], 1),
    "picked from a slice": lambda m, x: m.q(x[:, 2:])[:, [3, 0]],
}


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("name", PICKS)
def test_queries_that_are_some_of_the_keys_have_their_own_positions(name, written):
    x = torch.eye(8).expand(2, 8, 8).clone()
    [call] = calls_of(Picks(PICKS[name], written), x)
    assert call.is_self_attention
    values = summarize(call, ["diagonal_mean", "previous_token", "mean_distance", "max_weight"])
    if not call.has_positions:  # may be left out, and may not be wrong
        assert name == "put together in another order"
        assert values["diagonal_mean"].isnan().all()
        return
    assert values["diagonal_mean"].item() == pytest.approx(1, abs=1e-4)
    assert values["mean_distance"].item() == pytest.approx(0, abs=1e-3)
    if name not in ("first",):
        assert values["previous_token"].item() == pytest.approx(0, abs=1e-4)


def test_positions_that_differ_from_sequence_to_sequence_are_left_out():
    x = torch.eye(8).expand(2, 8, 8).clone()
    pick = torch.tensor([[6, 1, 3], [0, 2, 4]])
    [call] = calls_of(Picks(lambda m, x: m.q(x)[torch.arange(2)[:, None], pick]), x)
    assert call.is_self_attention
    assert not call.has_positions
    values = summarize(call)
    assert values["diagonal_mean"].isnan().all()
    assert not values["max_weight"].isnan().any()
    assert "not known" in call.note


class LooksAround(nn.Module):
    """Windows of queries against the window itself and those around, as in local attention."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):  # (B, 4 windows x 3, C)
        q = 100 * x.view(2, 4, 3, 12)
        if self.how == "unfold":
            k = F.pad(x, (0, 0, 3, 3)).unfold(1, 9, 3).mT
        else:
            padded = F.pad(x.view(2, 4, 3, 12), (0, 0, 0, 0, 1, 1))
            k = torch.cat([padded[:, i : i + 4] for i in range(3)], dim=2)
        return (q @ k.mT).softmax(-1) @ k


@pytest.mark.parametrize("how", ["unfold", "cat"])
def test_a_window_that_looks_around_has_its_positions_in_the_middle(how):
    [call] = calls_of(LooksAround(how), torch.eye(12).expand(2, 12, 12).clone())
    assert call.shape == (8, 1, 3, 9)
    assert call.query_positions.tolist() == [3, 4, 5]
    assert summarize(call)["diagonal_mean"].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("how", ["matmul", "einsum", "fused"])
def test_neighbours_of_each_query_are_its_keys(how):
    class Neighbours(nn.Module):
        num_heads = 2

        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            k, v = (F.pad(z, (0, 0, 1, 1)).unfold(2, 3, 1).transpose(-1, -2) for z in (k, v))  # (B, H, T, 3, D)
            self.kept = (q[..., None, :] @ k.mT).softmax(-1)[..., 0, :].detach()
            if how == "matmul":
                return ((q[..., None, :] @ k.mT).softmax(-1) @ v)[..., 0, :]
            if how == "fused":
                return F.scaled_dot_product_attention(q[..., None, :], k, v, scale=1.0)[..., 0, :]
            return torch.einsum("bhij,bhijd->bhid", torch.einsum("bhid,bhijd->bhij", q, k).softmax(-1), v)

    model = Neighbours()
    [call] = calls_of(model, torch.randn(3, 10, 8))
    assert call.shape == (3, 2, 10, 3)
    assert call.over == "neighbours"
    torch.testing.assert_close(call.pattern(), model.kept, atol=1e-6, rtol=0)
    values = summarize(call)
    torch.testing.assert_close(values["diagonal_mean"], model.kept[..., 1].mean((0, 2)))
    torch.testing.assert_close(values["previous_token"], model.kept[..., 0].mean((0, 2)), atol=0.05, rtol=0)
    assert values["first_token"].isnan().all()


def test_queries_picked_by_a_mask_have_their_own_positions():
    x, mask = torch.eye(8).expand(2, 8, 8).clone(), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    [call] = calls_of(Picks(lambda m, x: m.q(x)[:, mask]), x)
    assert call.query_positions.tolist() == [0, 2, 3, 6]
    mask = torch.stack([mask, mask.flip(0)])
    [call] = calls_of(Picks(lambda m, x: m.q(x)[mask].view(2, 4, 8)), x)
    assert not call.has_positions  # they differ from sequence to sequence


@pytest.mark.parametrize("order", ["b t h d -> b (h t) d", "b t h d -> b (t h) d"])
@pytest.mark.parametrize("fused", [True, False])
def test_heads_in_the_rows_of_a_call_with_one_key_head_are_heads(fused, order):
    class OneKeyHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(12, 12), nn.Linear(12, 8)

        def forward(self, x):
            q = self.q(x).view(2, 5, 3, 4)
            q = (q.transpose(1, 2) if "(h t)" in order else q).reshape(2, 15, 4)
            k, v = self.kv(x).chunk(2, -1)
            if fused:
                return F.scaled_dot_product_attention(q, k, v)
            return (q @ k.mT / 2).softmax(-1) @ v

    model, x = OneKeyHead(), torch.randn(2, 5, 12)
    [call] = calls_of(model, x)
    q, k = model.q(x).view(2, 5, 3, 4).transpose(1, 2), model.kv(x)[:, None, :, :4]
    torch.testing.assert_close(call.pattern(), (q @ k.mT / 2).softmax(-1), atol=1e-6, rtol=0)
    assert call.has_positions


@pytest.mark.parametrize("letters", ["hd,bhtd->bht", "hd,bthd->bth", "hd,bhtd->hbt", "hnd,bhtd->bhnt"])
def test_learned_queries_look_at_each_sequence(letters):
    """The batch is in the keys alone, and no axis of queries."""
    many = "n" in letters

    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.seeds, self.kv = nn.Parameter(torch.randn(*((3, 2, 4) if many else (3, 4)))), nn.Linear(12, 24)

        def forward(self, x):
            k, v = (z.view(2, 5, 3, 4) for z in self.kv(x).chunk(2, -1))
            given = letters.partition("->")[0].partition(",")[2]
            k = k if given == "bthd" else k.transpose(1, 2)
            scores = torch.einsum(letters, self.seeds, k)
            result = letters.partition("->")[2]
            weights = scores.softmax(result.index("t"))
            return torch.einsum(f"{result},bthd->{result.replace('t', '')}d", weights, v)

    model, x = Pooling(), torch.randn(2, 5, 12)
    [call] = calls_of(model, x)
    k = model.kv(x)[..., :12].view(2, 5, 3, 4).transpose(1, 2)
    seeds = model.seeds if many else model.seeds[:, None]
    torch.testing.assert_close(call.pattern(), (seeds @ k.mT).softmax(-1), atol=1e-6, rtol=0)
    assert not call.is_self_attention


@pytest.mark.parametrize("how", ["view", "a layer for each"])
def test_tokens_that_a_layer_makes_are_tokens(how):
    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.each = nn.Linear(7, 40), nn.ModuleList(nn.Linear(7, 8) for _ in range(5))
            self.attention = Attend()

        def forward(self, x):
            tokens = self.make(x).view(2, 5, 8) if how == "view" else torch.stack([f(x) for f in self.each], 1)
            return self.attention(tokens, tokens)

    [call] = calls_of(Latent(), torch.randn(2, 7))
    assert call.shape == (2, 1, 5, 5)
    assert call.is_self_attention
    assert call.has_positions


def test_windows_that_are_put_together_along_the_batch_are_windows():
    class Put(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = OwnHead()

        def forward(self, x):
            return self.attention(torch.cat(x.chunk(3, 1), 0))

    model, x = Put(), torch.randn(2, 12, 8)
    [call] = calls_of(model, x)
    assert (call.n_samples, call.windows) == (2, 3)
    windows = x.view(6, 4, 8)
    head = model.attention
    scores = head.q(windows) @ head.k(windows).mT / 2
    expected = scores.masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(call.pattern()[:, 0], expected, atol=1e-6, rtol=0)


def test_a_cache_that_is_filled_before_may_be_read_by_several_calls():
    """Rows of several calls with one cache are put together, each at its own position."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            keys, values, out = x.new_zeros(2, 6, 8), x.new_zeros(2, 6, 8), []
            for start, stop in ((0, 3), (3, 4)):
                q, keys[:, start:stop], values[:, start:stop] = self.qkv(x[:, start:stop]).chunk(3, -1)
                mask = torch.arange(6) <= torch.arange(start, stop)[:, None]
                out.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))
            return torch.cat(out, 1)

    model, x = Cached(), torch.randn(2, 4, 8)
    calls = calls_of(model, x)
    q, k, _ = model.qkv(x).chunk(3, -1)
    expected = (q @ k.mT / 8**0.5).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf).softmax(-1)
    rows = torch.cat([call.pattern()[:, 0, :, :4] for call in calls], 1)
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    positions = [p for call in calls for p in call.positions_of(torch.arange(call.shape[2])).tolist()]
    assert positions == [0, 1, 2, 3]
    for call in calls:
        summarize(call)


# Loops


class Head(nn.Module):
    def forward(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v


class OwnHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 4) for _ in range(3))

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)


class LoopOverHeads(nn.Module):
    """Four queries of their own, keys and values in common."""

    num_heads = 4

    def __init__(self):
        super().__init__()
        self.qs, self.k, self.v = nn.ModuleList(nn.Linear(8, 4) for _ in range(4)), nn.Linear(8, 4), nn.Linear(8, 4)
        self.attention = Head()

    def forward(self, x):
        return torch.cat([self.attention(q(x), self.k(x), self.v(x)) for q in self.qs], -1)


def test_heads_in_a_loop_are_one_site():
    model, x = LoopOverHeads(), torch.randn(2, 6, 8)
    [call] = calls_of(model, x)
    assert call.site == "attention"
    expected = torch.stack([(q(x) @ model.k(x).mT).softmax(-1) for q in model.qs], 1)
    torch.testing.assert_close(call.pattern(), expected, atol=1e-6, rtol=0)
    assert call.has_positions


@pytest.mark.parametrize("nested", [False, True])
def test_a_module_list_of_heads_is_one_site(nested):
    heads = nn.ModuleList(nn.Sequential(OwnHead()) if nested else OwnHead() for _ in range(3))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = heads

        def forward(self, x):
            return torch.cat([head(x) for head in self.heads], -1)

    x = torch.randn(2, 6, 8)
    [call] = calls_of(Net(), x)
    assert call.site == ("heads.0" if nested else "heads")
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    own = [head[0] if nested else head for head in heads]
    expected = [(h.q(x) @ h.k(x).mT / 2).masked_fill(hidden, -torch.inf).softmax(-1) for h in own]
    torch.testing.assert_close(call.pattern(), torch.stack(expected, 1), atol=1e-6, rtol=0)


class Cascade(nn.Module):
    """Each head gets its part of the features and what the head before put out."""

    def __init__(self, says=True):
        super().__init__()
        self.qkvs = nn.ModuleList(nn.Linear(4, 12) for _ in range(3))
        if says:
            self.num_heads = 3

    def forward(self, x):
        out, parts = [], x.chunk(3, -1)
        for qkv, part in zip(self.qkvs, parts, strict=True):
            q, k, v = qkv(part if not out else part + out[-1]).chunk(3, -1)
            out.append((q @ k.mT).softmax(-1) @ v)
        return torch.cat(out, -1)


def test_heads_in_turn_are_one_site_where_the_module_says_how_many_there_are():
    x = torch.randn(2, 6, 12)
    assert [(call.site, call.shape[1]) for call in calls_of(Cascade(), x)] == [("Cascade", 3)]
    assert [call.site for call in calls_of(Cascade(says=False), x)] == [f"Cascade[{i}]" for i in range(3)]


class Decoder(nn.Module):
    """A state looks at what is remembered, step after step."""

    def __init__(self, n_heads=1):
        super().__init__()
        self.cell, self.key, self.attention = nn.GRUCell(8, 8), nn.Linear(8, 8), Head()
        self.query = nn.ModuleList(nn.Linear(8, 8) for _ in range(n_heads))

    def forward(self, memory, n_steps):
        h, self.kept = memory.mean(1), []
        for _ in range(n_steps):
            k = self.key(memory)
            found = [self.attention(q(h)[:, None], k, memory)[:, 0] for q in self.query]
            self.kept.append(torch.stack([(q(h)[:, None] @ k.mT).softmax(-1)[:, 0] for q in self.query], 1).detach())
            h = self.cell(torch.stack(found).sum(0), h)
        return h


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("n_steps", [1, 3, 30])
def test_steps_of_a_decoder_are_the_rows_of_one_site(n_heads, n_steps):
    model = Decoder(n_heads)
    [call] = calls_of(model, torch.randn(2, 6, 8), n_steps)
    assert call.shape == (2, n_heads, n_steps, 6)
    assert not call.is_self_attention
    torch.testing.assert_close(call.pattern(), torch.stack(model.kept, 2), atol=1e-6, rtol=0)


def test_steps_that_see_their_own_past_are_at_their_own_positions():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            keys, values, out = [], [], []
            for t in range(x.shape[1]):
                q, k, v = self.qkv(x[:, t : t + 1]).chunk(3, -1)
                keys.append(k)
                values.append(v)
                k, v = torch.cat(keys, 1), torch.cat(values, 1)
                out.append(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
            return torch.cat(out, 1)

    model, x = Past(), torch.randn(2, 5, 8)
    [call] = calls_of(model, x)
    q, k, _ = model.qkv(x).chunk(3, -1)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = (q @ k.mT / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)[:, None]
    torch.testing.assert_close(call.pattern(), expected, atol=1e-6, rtol=0)
    diagonal = expected.diagonal(0, -2, -1)[..., 1:].mean()
    torch.testing.assert_close(summarize(call)["diagonal_mean"], diagonal[None])


def test_layers_that_share_their_weights_are_no_loop():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x)
            return x

    assert [call.site for call in calls_of(Shared(), torch.randn(2, 6, 8))] == [
        f"layer.self_attn[{i}]" for i in range(3)
    ]


def test_two_views_of_a_batch_are_no_heads():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = OwnHead()

        def forward(self, one, other):
            return self.head(one) + self.head(other) + self.head(one)

    calls = calls_of(Twins(), torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    assert [(call.site, call.shape) for call in calls] == [(f"head[{i}]", (2, 1, 6, 6)) for i in range(3)]


# Mixed heads


MIXERS = {
    "linear": lambda: nn.Linear(4, 4),
    "conv2d": lambda: nn.Conv2d(4, 4, 1),
    "einsum": lambda: nn.ParameterList([torch.randn(4, 4)]),
}


def mixed(mixer, x):
    """Mix the heads of (B, H, Q, K)."""
    if mixer is None:
        return x
    if isinstance(mixer, nn.Linear):
        return mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return mixer(x) if isinstance(mixer, nn.Conv2d) else torch.einsum("bhij,hg->bgij", x, mixer[0])


class Talking(nn.Module):
    num_heads = 4

    def __init__(self, before, after):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.before, self.after = before and MIXERS[before](), after and MIXERS[after]()

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = mixed(self.after, mixed(self.before, q @ k.mT / 8**0.5).softmax(-1))
        self.kept = weights.detach()
        return (F.dropout(weights, 0.5, self.training) @ v).transpose(1, 2).reshape(b, t, -1)


@pytest.mark.parametrize("before", [None, *MIXERS])
@pytest.mark.parametrize("after", [None, *MIXERS])
def test_mixed_heads_are_shown_as_the_model_used_them(before, after):
    model = Talking(before, after)
    [call] = calls_of(model, torch.randn(2, 6, 32))
    torch.testing.assert_close(call.pattern(), model.kept, atol=1e-6, rtol=0)
    values = summarize(call)
    torch.testing.assert_close(values["diagonal_mean"], model.kept.diagonal(0, -2, -1).mean((0, 2)))
    assert (values["nonfinite_fraction"] == 0).all()
    assert bool(values["entropy"].isnan().all()) == (after is not None)  # no distribution


def test_nan_in_mixed_weights_is_seen():
    model, x = Talking(None, "conv2d"), torch.randn(2, 6, 32)
    x[1] = math.nan
    [call] = calls_of(model, x)
    assert summarize(call)["nonfinite_fraction"].tolist() == [0.5] * 4


def test_a_site_that_is_seen_and_then_not_is_told():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.both = OwnHead(), OwnHead(), True

        def forward(self, x):
            return self.one(x) + (self.other(x) if self.both else 0)

    model, x = Sometimes(), torch.randn(2, 6, 8)
    recorder = AttentionRecorder(model, every_n_steps=1)
    with recorder.step(0):
        model(x)
    model.both = False
    with pytest.warns(UserWarning, match=r"of other was seen before and not at step 1: .* gap") as caught:
        for step in (1, 2):
            with recorder.step(step):
                model(x)
    assert len(caught) == 1


# No attention over tokens


class Channels(nn.Module):
    """Cross-covariance attention."""

    def __init__(self, fused=False):
        super().__init__()
        self.qkv, self.fused = nn.Linear(32, 96), fused

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 8).permute(2, 0, 3, 4, 1)  # (B, H, D, T)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return out.permute(0, 3, 1, 2).reshape(b, t, c)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_over_channels_has_no_positions(fused):
    [call] = calls_of(Channels(fused), torch.randn(2, 50, 32))
    assert call.shape == (2, 4, 8, 8)
    assert call.over == "channels"
    values = summarize(call)
    for name in ("diagonal_mean", "previous_token", "first_token"):
        assert values[name].isnan().all()
    assert not values["entropy"].isnan().any()
    assert "channels" in call.note


def test_what_is_odd_of_a_site_is_said_once(tmp_path):
    model = Channels()
    recorder = AttentionRecorder(model, every_n_steps=1)
    with pytest.warns(UserWarning, match="queries and keys are channels, so that there are no positions") as caught:
        for step in range(3):
            with recorder.step(step):
                model(torch.randn(2, 50, 32))
    assert len(caught) == 1
    assert "channels" in recorder.snapshots["live"].records[0].note


AFTERWARDS = {
    "residual": lambda x, o, g: x + o,
    "normalised": lambda x, o, g: F.normalize(x + o, dim=-1) * g,
    "gelu": lambda x, o, g: F.gelu(o),
    "layer_norm": lambda x, o, g: F.layer_norm(o, (8,)),
    "linear": lambda x, o, g: F.linear(o, torch.eye(8)),
    "conv1d": lambda x, o, g: F.conv1d(o.mT, torch.randn(8, 8, 1)).mT,
    "pooled": lambda x, o, g: F.avg_pool1d(o.mT, 3, 1, 1).mT,
    "nothing": lambda x, o, g: o,
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_what_comes_out_of_attention_is_no_product_any_more(name):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.g = nn.Linear(8, 24), nn.Parameter(torch.ones(8))

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            gate = AFTERWARDS[name](x, (q @ k.mT).softmax(-1) @ v, self.g).softmax(1)  # of each feature over tokens
            return gate.mT @ v

    assert [call.shape for call in calls_of(Gated(), torch.randn(2, 6, 8))] == [(2, 1, 6, 6)]


class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return q.softmax(-1) @ (k.softmax(1).mT @ v)


class Efficient(LinearAttention):
    """The same, in a module that is not called attention."""


@pytest.mark.parametrize("layer", [LinearAttention, Efficient])
def test_linear_attention_is_not_shown_and_is_told_where_it_is_called_attention(layer, recwarn):
    model = nn.Sequential(Written(LAYOUTS["fused"]), nn.Linear(C, 8), layer())
    assert [call.site for call in calls_of(model, torch.randn(2, T, C))] == ["0"]
    told = [str(w.message) for w in recwarn]
    assert [("a call of 2: its softmax is over features" in message) for message in told] == [True] * (
        layer is LinearAttention
    )


# Scores from a layer


class OutlookAttention(nn.Module):
    """Each position gives the weights of its three neighbours, for two heads."""

    def __init__(self):
        super().__init__()
        self.attn, self.v = nn.Linear(8, 2 * 3), nn.Linear(8, 8)

    def forward(self, x):
        b, t, c = x.shape
        weights = self.attn(x).view(b, t, 2, 1, 3).softmax(-1)  # (B, T, H, 1, 3)
        self.kept = weights[..., 0, :].transpose(1, 2).detach()
        v = F.pad(self.v(x), (0, 0, 1, 1)).unfold(1, 3, 1).view(b, t, 2, 4, 3).mT
        return (weights @ v).reshape(b, t, c)


class SynthesizerAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.v = nn.Linear(8, 6), nn.Linear(8, 8)

    def forward(self, x):
        weights = self.attn(x).softmax(-1)
        self.kept = weights[:, None].detach()
        return weights @ self.v(x)


@pytest.mark.parametrize("layer", [OutlookAttention, SynthesizerAttention])
def test_scores_from_a_layer_are_read_by_the_values_that_they_meet(layer):
    model = layer()
    [call] = calls_of(model, torch.randn(2, 6, 8))
    torch.testing.assert_close(call.pattern(), model.kept, atol=1e-6, rtol=0)
    own = model.kept[..., 1] if layer is OutlookAttention else model.kept.diagonal(0, -2, -1)
    torch.testing.assert_close(summarize(call)["diagonal_mean"], own.mean((0, 2)))


def test_each_softmax_of_a_module_is_judged_by_itself():
    class TwoAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            weights = (q @ k.mT / 2).softmax(-1)
            return (q @ k.mT).softmax(-1) @ v + (weights[..., None] * v[:, None]).sum(2)

    with pytest.warns(UserWarning, match="a call of TwoAttention: its softmax was not seen to be multiplied"):
        assert [call.shape for call in calls_of(TwoAttention(), torch.randn(2, 6, 8))] == [(2, 1, 6, 6)]


# Self- and cross-attention


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, q, k):
        return (self.q(q) @ self.k(k).mT / 8**0.5).softmax(-1) @ self.v(k)


SAME = {
    "itself": lambda m, x: (x, x),
    "a residual": lambda m, x: (x + m.layer(x), x),
    "a slice": lambda m, x: (x[:, 4:], x),
    "a layer more": lambda m, x: (m.layer(x), x),
    "a convolution": lambda m, x: (m.conv(x.mT).mT, x),
    "positions to each": lambda m, x: (x + m.positions, x + m.positions),
    "positions to one": lambda m, x: (x + m.positions, x),
    "norms": lambda m, x: (m.norm(x), F.layer_norm(x, (8,))),
    "normed, sliced, one layer": lambda m, x: (m.layer(m.norm(x)[:, 1:]) + m.positions[1:], m.norm(x)),
    "a token put before": lambda m, x: (lambda u: (u[:, :1], u))(torch.cat([m.token.expand(2, -1, -1), x], 1)),
    "keys put before": lambda m, x: (x, torch.cat([m.token.expand(2, -1, -1), x], 1)),
}
OTHER = {
    "another input": lambda m, x, y: (x, y),
    "another input of the same length": lambda m, x, y: (x, y[:, :6]),
    "both through one layer": lambda m, x, y: (m.layer(x), m.layer(y)),
    "learned queries": lambda m, x, y: (m.positions.expand(2, -1, -1), x),
    "picked by an index from the keys": lambda m, x, y: (x[torch.arange(2)[:, None], y[..., 0].topk(3).indices % 6], y),
    "positions from the keys": lambda m, x, y: (x + y.mean(1, keepdim=True), y),
}


class Net(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.attention, self.given = Attend(), given
        self.inp, self.layer, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.positions, self.token = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, *inputs):
        return self.attention(*self.given(self, *map(self.inp, inputs)))


@pytest.mark.parametrize("name", SAME)
def test_queries_and_keys_of_one_sequence_are_self_attention(name):
    [call] = calls_of(Net(SAME[name]), torch.randn(2, 6, 8))
    assert call.is_self_attention
    assert call.has_positions


@pytest.mark.parametrize("name", OTHER)
def test_queries_and_keys_of_two_sequences_are_cross_attention(name):
    [call] = calls_of(Net(OTHER[name]), torch.randn(2, 6, 8), torch.randn(2, 9, 8))
    assert not call.is_self_attention
    assert summarize(call)["diagonal_mean"].isnan().all()


def halves(z):
    return z[:2], z[2:]


STREAMS = {
    "split of a batch": lambda m, x, y: m.layer(torch.cat([x, y])).split(2),
    "slices of a batch": lambda m, x, y: halves(m.layer(torch.cat([x, y]))),
    "stacked, selected": lambda m, x, y: m.layer(torch.stack([x, y])).unbind(0),
    "every second": lambda m, x, y: (lambda z: (z[::2], z[1::2]))(m.layer(torch.stack([x, y], 1).flatten(0, 1))),
    "along the tokens": lambda m, x, y: m.layer(torch.cat([x, y], 1)).split([6, 6], 1),
    "turned batch": lambda m, x, y: (m.layer(x), m.layer(x.roll(1, 0))),
    "other samples": lambda m, x, y: (m.layer(x), m.layer(x[[1, 0]])),
}


@pytest.mark.parametrize("name", STREAMS)
def test_two_streams_that_share_a_batch_are_cross_attention(name):
    [call] = calls_of(Net(STREAMS[name]), torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    assert call.shape == (2, 1, 6, 6)
    assert not call.is_self_attention
    assert not call.has_positions


@pytest.mark.parametrize("name", ["keys in another order", "every second key"])
def test_keys_that_are_not_one_after_the_other_give_no_positions(name):
    pick = {"keys in another order": lambda x: x[:, [3, 0, 4, 1, 2, 5]], "every second key": lambda x: x[:, ::2]}[name]
    [call] = calls_of(Net(lambda m, x: (x, pick(x))), torch.randn(2, 6, 8))
    assert call.is_self_attention
    assert not call.has_positions


@pytest.mark.parametrize("first", [True, False])
def test_a_decoder_that_is_given_what_its_encoder_read_has_cross_attention(first):
    model = nn.Transformer(8, 2, 1, 1, 8, dropout=0, batch_first=first)
    x = torch.randn(2, 6, 8)
    assert [call.is_self_attention for call in calls_of(model, x, x)] == [True, True, False]


# Gradients


class Sampler(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = OwnHead()

    def forward(self, x):
        return self.attention(x)


@pytest.mark.parametrize("before", [True, False])
def test_a_rollout_without_gradients_does_not_count_beside_the_training_forward(before):
    model, x = Sampler(), torch.randn(2, 6, 8)
    recorder = AttentionRecorder(model, every_n_steps=1, statistics=["first_token"])
    with recorder.step(0):
        model(x)
    expected = recorder.snapshots["live"]
    with recorder.step(1):
        if not before:
            model(x)
        with torch.no_grad():
            for n in range(1, 60):
                model(torch.randn(2, n, 8))
        if before:
            model(x)
    seen = recorder.snapshots["live"]
    assert seen.sites == expected.sites
    assert seen.values[0]["first_token"].tolist() == expected.values[0]["first_token"].tolist()
    assert seen.patterns[0].tolist() == expected.patterns[0].tolist()


def test_what_is_only_run_without_gradients_is_shown():
    model = nn.ModuleDict({"student": Sampler(), "teacher": Sampler()})
    recorder = AttentionRecorder(model, every_n_steps=1)
    with recorder.step(0):
        with torch.no_grad():
            model["teacher"](torch.randn(2, 6, 8))
        model["student"](torch.randn(2, 6, 8))
    assert sorted(recorder.snapshots["live"].sites) == ["student.attention", "teacher.attention"]


# Where nothing is known


def test_a_number_of_heads_that_is_not_the_module_s_is_told():
    class SelfAttention(Written):
        num_heads = 3

    with pytest.warns(UserWarning, match="shows 4 heads in SelfAttention, whose module says that it has 3"):
        calls_of(SelfAttention(LAYOUTS["fused"]), torch.randn(B, T, C))


def test_axes_from_outside_are_those_of_the_documented_shape():
    class Call(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    assert calls_of(Call(), torch.randn(2, 3, 5, 4))[0].shape == (2, 3, 5, 5)
    [call] = calls_of(Call(), torch.randn(2, 7, 3, 5, 4))
    assert call.shape == (14, 3, 5, 5)
    assert "taken to be" in call.assumed


def test_split_is_what_the_layouts_use():
    assert split(torch.zeros(B, T, C)).shape == (B, T, H, D)
