import json

import pytest

from attention_monitor import STATISTICS
from attention_monitor.diagnosis.detector import DETECTORS
from attention_monitor.diagnosis.roles import HeadRoles
from attention_monitor.diagnosis.runner import Diagnosis
from attention_monitor.naming import head_name
from attention_monitor.snapshots import HeadScore

from ..made import made_snapshot


def snapshot(step=0, **values):
    """Two layers of three healthy heads, with ``values`` in L01H02."""
    healthy = {"nonfinite_fraction": 0.0, "collapse_fraction": 0.1, "max_score": 5.0}
    layers = [{name: [value] * 3 for name, value in healthy.items()} for _ in range(2)]
    for name, value in values.items():
        layers[1][name][2] = value
    return made_snapshot(step, "live", layers)


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_reads_registered_statistics_and_gives_advice(detector):
    assert set(detector.statistics) <= set(STATISTICS)
    assert detector.kind
    assert detector.advice.endswith(".")
    assert set(detector.statistics) <= set(Diagnosis().statistics)


def test_healthy_heads_give_no_finding():
    assert Diagnosis().update(snapshot()) == []
    assert Diagnosis().update(snapshot(collapse_fraction=0.5)) == []  # more than half, not half
    assert Diagnosis().update(snapshot(collapse_fraction=float("nan"))) == []


def test_trouble_is_told_with_layer_head_step_and_number():
    diagnosis = Diagnosis()
    findings = diagnosis.update(snapshot(step=30, nonfinite_fraction=0.25, collapse_fraction=0.75))
    assert [(f.kind, f.head, f.step) for f in findings] == [
        ("non-finite attention", "L01H02", 30),
        ("collapsed attention", "L01H02", 30),
    ]
    nonfinite, collapsed = diagnosis.explain(findings)
    assert "at step 30 in L01H02 (25% of rows)" in nonfinite
    assert "at step 30 in L01H02 (75% of rows, max score 5)" in collapsed


def test_a_head_is_told_of_when_it_gets_into_trouble_and_then_no_more():
    diagnosis = Diagnosis()
    steps = [0.9, 0.8, 0.2, 0.9]
    assert [len(diagnosis.update(snapshot(step, collapse_fraction=c))) for step, c in enumerate(steps)] == [1, 0, 0, 0]


def test_many_heads_in_trouble_are_counted_rather_than_listed():
    layers = [{"nonfinite_fraction": [1.0] * 12, "collapse_fraction": [0.0] * 12, "max_score": [0.0] * 12}]
    diagnosis = Diagnosis()
    [message] = diagnosis.explain(diagnosis.update(made_snapshot(0, "live", layers)))
    assert "L00H07 (100% of rows) and 4 more." in message


def test_heads_outside_a_plain_stack_are_named_by_their_path():
    assert head_name("L03", 5) == "L03H05"
    assert head_name("encoder.attn", 12) == "encoder.attn/H12"
    assert head_name("Llama", 0) == "Llama/H00"


def scored(step, *values, source="text", threshold=0.5):
    scores = [HeadScore("previous_token", threshold=threshold)]
    return made_snapshot(step, source, [{"previous_token": values}], columns=scores)


def test_a_head_has_a_role_since_the_step_at_which_it_reached_the_threshold():
    roles = HeadRoles()
    assert roles.update(scored(0, 0.1, 0.5))
    assert not roles.update(scored(5, 0.4, 0.9))
    assert roles.since() == {"L00H01": {"previous-token": 0}}
    assert roles.update(scored(10, 0.6, 0.9))
    assert roles.since() == {"L00H00": {"previous-token": 10}, "L00H01": {"previous-token": 0}}


def test_a_head_that_falls_below_the_threshold_loses_its_role_and_may_take_it_on_again():
    roles = HeadRoles()
    roles.update(scored(0, 0.9))
    assert roles.update(scored(5, 0.2))
    assert roles.since() == {}
    roles.update(scored(10, 0.9))
    assert roles.since() == {"L00H00": {"previous-token": 10}}


def test_a_value_that_is_nan_gives_no_role():
    roles = HeadRoles()
    assert not roles.update(scored(0, float("nan")))
    assert roles.since() == {}


def test_of_several_probes_that_show_a_role_the_first_counts():
    roles = HeadRoles()
    roles.update(scored(5, 0.9, source="a"))
    roles.update(scored(2, 0.9, source="b"))
    assert roles.since() == {"L00H00": {"previous-token": 2}}
    roles.update(scored(9, 0.1, source="b"))
    assert roles.since() == {"L00H00": {"previous-token": 5}}


def test_roles_can_be_saved_and_shown():
    roles, other = HeadRoles(), HeadRoles()
    roles.update(scored(5, 0.9))
    other.load(json.loads(json.dumps(roles.state())))
    assert other.since() == roles.since()
    assert other.table().splitlines()[2:] == ["| L00H00 | previous-token | 5 |"]
