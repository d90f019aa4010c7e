"""The field benchmark on a package that is made here, and one model of each package that is installed."""

import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention_monitor import AttentionCall
from benchmarks.field.companions import make_importable
from benchmarks.field.compare import compare
from benchmarks.field.expectation import FieldModel, Kind
from benchmarks.field.models import all_models
from benchmarks.field.rows import row_of, summary, table
from benchmarks.field.training import make
from benchmarks.field.truth import TruthError, true_sites

B, H, T = 3, 2, 5


class FakeAttention(nn.Module):
    """Attention (B, T, C) in several spellings."""

    num_heads = H

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.way = nn.Linear(8, 24), way

    def forward(self, x):
        q, k, v = self.qkv(x).view(B, T, 3, H, 4).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if self.way == "fused":
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "loop":
            z = torch.stack([(q[:, h] @ k[:, h].mT).softmax(-1) @ v[:, h] for h in range(H)], dim=1)
        elif self.way == "merged":
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            z = ((q @ k.mT).softmax(-1) @ v).view(B, H, T, 4)
        else:
            z = (q @ k.mT).softmax(-1) @ v
        return z.transpose(1, 2).flatten(2)


class FakeClassAttention(FakeAttention):
    """The first token looks at all."""

    def forward(self, x):
        q, k, v = self.qkv(x).view(B, T, 3, H, 4).permute(2, 0, 3, 1, 4)
        return ((q[:, :, :1] @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class FakeModel(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.attention, self.out = FakeAttention(way), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x)).softmax(-1)  # a classifier's softmax is none of attention's


def inputs():
    return (torch.randn(B, T, 8),)


def said(way: str = "plain", axes: str = "b h q k", sites: int = 1, **kind) -> FieldModel:
    known = Kind("FakeAttention", axes, **kind)
    return FieldModel("fake_package", f"FakeModel {way}", partial(FakeModel, way), inputs, [known], sites)


@pytest.fixture
def fake_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "fake_package", ModuleType("fake_package"))


@pytest.mark.parametrize("model", [said(), said("fused"), said("merged", "(b h) q k")], ids=lambda model: model.name)
def test_a_model_that_is_understood_is_right(fake_package, model):
    row = row_of(model)
    assert (row.verdict, row.training) == ("right", "identical")
    assert row.outcome.heads == [H]
    assert row.outcome.error < 1e-6
    assert (row.outcome.kinds_right, row.outcome.kinds_known) == (1, 1)


def test_the_truth_of_all_spellings_is_the_same():
    ways = [said(), said("merged", "(b h) q k"), said("loop", "b q k", loop="h")]
    patterns = [true_sites(*make(model), model)[0][0].pattern for model in ways]
    torch.testing.assert_close(patterns[1], patterns[0])
    torch.testing.assert_close(patterns[2], patterns[0])
    assert patterns[0].dtype == torch.float64
    assert patterns[0].shape == (B, H, T, T)


def test_the_truth_is_what_the_formula_says():
    model, (x,) = make(said("fused"))
    with torch.no_grad():
        q, k, _ = model.attention.qkv(x).double().view(B, T, 3, H, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 2).masked_fill(torch.ones(T, T).triu(1) == 1, -torch.inf)
    [site], others = true_sites(model, (x,), said("fused"))
    torch.testing.assert_close(site.pattern, scores.softmax(-1), atol=1e-6, rtol=0)
    assert (site.path, site.heads) == ("attention", H)
    assert others == [" (FakeModel)"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (said(sites=2), "2 sites are said, 1 found"),
        (said(heads=4), "4 heads are said, 2 found"),
        (said(axes="b h k q"), "the softmax is over 'q'"),
        (said(axes="(b h) q k"), "said of a softmax of 4 axes"),
    ],
)
def test_what_is_said_of_a_model_has_to_fit_it(wrong, message):
    with pytest.raises(TruthError, match=message):
        true_sites(*make(wrong), wrong)


def test_it_has_to_be_said_where_queries_are():
    known = Kind("FakeClassAttention")
    model = FieldModel("fake_package", "class token", lambda: FakeClassAttention(""), inputs, [known], 1)
    with pytest.raises(TruthError, match="where its 1 queries are among 5 keys"):
        true_sites(*make(model), model)
    model = replace(model, kinds=[replace(known, offset=0)])
    [site], _ = true_sites(*make(model), model)
    call = AttentionCall("FakeClassAttention", None, None, model_scores=site.pattern.log(), self_attention=True)
    outcome = compare([site], [call], [])  # taken to be the last position, as nothing else is known
    assert (site.path, outcome.notes) == ("", ["FakeClassAttention: query 0 at 4 instead of 0"])


def judged(change, *sentences: str, **kind) -> tuple[str, list[str]]:
    """What is said of calls that are not what they should be."""
    model = said(**kind)
    sites, _ = true_sites(*make(model), model)
    scores = sites[0].pattern.log()
    calls = change([AttentionCall("attention", None, None, model_scores=scores, self_attention=True)])
    outcome = compare(sites, calls, sentences)
    return outcome.verdict, outcome.notes


def test_calls_are_compared_with_the_truth():
    def with_scores(change):
        return lambda calls: [replace(call, model_scores=change(call.model_scores)) for call in calls]

    assert judged(lambda calls: calls) == ("right", [])
    assert judged(with_scores(lambda scores: scores.flip(0))) == ("right", [])  # sequences in another order
    assert judged(with_scores(lambda scores: scores.flip(1)))[0] == "wrong"  # heads in another order
    assert judged(with_scores(lambda scores: scores.flip(2)))[0] == "wrong"
    verdict, notes = judged(with_scores(lambda scores: scores.transpose(0, 1)))
    assert (verdict, notes) == ("wrong", [f"attention: {(H, B, T, T)} instead of {(B, H, T, T)}"])
    assert judged(lambda calls: calls, is_self=False) == ("wrong", ["attention: called self"])
    assert judged(lambda calls: calls, shows="channels") == ("wrong", ["attention: channels have positions"])
    assert judged(lambda calls: calls * 2) == ("wrong", ["attention: 2 calls for 1"])
    assert judged(lambda calls: [replace(calls[0], site="out"), *calls])[0] == "wrong"


def test_what_is_left_out_is_said_or_not():
    refusal = "attention_monitor could not look at a call of attention: it is new"
    assert judged(lambda calls: [], refusal)[0] == "refused with a sentence"
    assert judged(lambda calls: [], refusal.replace("attention:", "attention_2:"))[0] == "left out in silence"
    assert judged(lambda calls: []) == ("left out in silence", ["attention: left out in silence"])


def test_a_model_that_fails_or_is_not_installed_is_a_row(fake_package):
    def fail():
        raise OSError("no such weights")

    failing = row_of(FieldModel("fake_package", "failing", fail, inputs, [], 0))
    assert failing.verdict == "error"
    assert "no such weights" in failing.remark
    absent = row_of(FieldModel("no_such_package", "absent", fail, inputs, [], 0))
    assert absent.verdict == "not installed"
    written = table([failing, absent, row_of(said(), with_training=False)])
    assert "| fake_package | FakeModel plain | 1 | 1 | 2 | 2 |" in written
    assert "no such weights" in written
    assert "3 models: 1 right, 1 not installed, 1 error" in summary([failing, absent, row_of(said())])


def test_models_have_names_of_their_own():
    names = [(model.package, model.name) for model in all_models()]
    assert len(set(names)) == len(names)
    assert len([package for package, _ in names if package == "timm"]) >= 40


@pytest.mark.parametrize("package", dict.fromkeys(model.package for model in all_models()))
def test_the_first_model_of_each_package_that_is_installed_runs(package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; benchmarks/field-requirements.txt has it")
    make_importable()
    row = row_of(next(model for model in all_models() if model.package == package), with_training=False)
    assert row.verdict != "error", row.remark
