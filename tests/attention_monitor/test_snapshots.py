import math

import numpy as np
import pytest

from attention_monitor.snapshots import HeadScore
from attention_monitor.traits import COLLAPSED

from .made import made_snapshot


def two_stacks():
    values = [{"entropy": [1.0, 2.0]}, {"entropy": [4.0]}, {"entropy": [math.nan, 8.0]}]
    return made_snapshot(3, "live", values, stack=["a.*", "a.*", "b.*"], is_cross=[False, False, True])


def test_a_mean_is_over_heads_that_have_a_value_of_all_or_of_one_stack():
    seen = two_stacks()
    assert seen.mean("entropy") == pytest.approx(15 / 4)
    assert seen.mean("entropy", "a.*") == pytest.approx(7 / 3)
    assert seen.mean("entropy", "b.*") == 8
    assert math.isnan(seen.mean("entropy", "c.*"))


def test_heads_are_gone_through_with_their_records():
    heads = [(record.label, head, value) for record, head, value in two_stacks().heads("entropy")]
    assert heads[:3] == [("L00", 0, 1.0), ("L00", 1, 2.0), ("L01", 0, 4.0)]
    assert len(heads) == 5


def test_heads_with_a_trait():
    seen = made_snapshot(0, "live", [{"collapse_fraction": [0.2, 0.6]}, {"collapse_fraction": [0.5, math.nan]}])
    assert [(record.label, head) for record, head in seen.where(COLLAPSED)] == [("L00", 1)]


def test_records_can_be_read_side_by_side():
    seen = two_stacks()
    assert seen.labels == seen.sites == ["L00", "L01", "L02"]
    assert seen.stacks == ["a.*", "a.*", "b.*"]
    assert seen.is_cross == [False, False, True]
    assert seen.values[1]["entropy"].tolist() == [4.0]
    assert seen.patterns == []
    assert seen.scores == []
    assert seen.layers == {}
    assert seen.rollout == {}


def test_what_belongs_to_layers_is_read_by_name():
    seen = made_snapshot(
        0,
        "layers",
        [{}, {}],
        columns=[HeadScore("a_b", threshold=0.5)],
        layer_values=[{"spread": 0.5}, {"spread": 0.25}],
        rollouts=[None, np.eye(2)],
        patterns=[np.ones((1, 2, 2)), None],
    )
    assert seen.layers == {"spread": [0.5, 0.25]}
    assert list(seen.rollout) == ["L01"]
    assert len(seen.patterns) == 1
    assert [score.role for score in seen.scores] == ["a-b"]
