import json

import pytest

from attention_monitor import STATISTICS, AttentionMonitorError, Detector
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


def healthy_detector(**changed):
    """A class statement, with some of its attributes changed or left out."""
    attributes = {
        "kind": "k",
        "severity": "warning",
        "statistics": ("max_score",),
        "advice": "Do something.",
        "look": lambda self, snapshot: iter(()),
    }
    attributes = {name: value for name, value in (attributes | changed).items() if value is not None}
    return type("Mine", (Detector,), attributes | {"__module__": "mine"})


@pytest.fixture
def registry():
    before = list(DETECTORS)
    yield DETECTORS
    DETECTORS[:] = before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": None}, "Mine needs kind, a text"),
        ({"advice": None}, "Mine needs advice, a text"),
        ({"advice": 3}, "Mine needs advice, a text"),
        ({"severity": None}, "Mine needs severity, 'error' or 'warning'"),
        ({"severity": "fatal"}, "Mine needs severity"),
        ({"statistics": None}, "Mine needs statistics, the names"),
        ({"statistics": "max_score"}, r"such as \('max_score',\); got 'max_score'"),
        ({"kind": "collapsed attention"}, "a detector of 'collapsed attention' already, Collapsed"),
    ],
)
def test_a_detector_that_lacks_something_is_refused_when_it_is_defined(registry, changed, message):
    with pytest.raises(AttentionMonitorError, match=message):
        healthy_detector(**changed)
    assert "Mine" not in [cls.__name__ for cls in registry]


def test_a_base_for_detectors_is_none_and_one_that_is_defined_anew_takes_its_place(registry):
    n = len(registry)
    type("Base", (Detector,), {})
    healthy_detector()
    second = healthy_detector()
    assert len(registry) == n + 1
    assert registry[-1] is second


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda self, snapshot: 1 / 0, "the detector of k failed at step 3: ZeroDivisionError"),
        (lambda self, snapshot: [None], r"failed at step 3: TypeError: look\(\) has to yield findings, got None"),
        (lambda self, snapshot: None, "failed at step 3: TypeError"),
    ],
)
def test_a_detector_that_fails_is_told_once_and_the_others_go_on(registry, look, message):
    healthy_detector(look=look)
    diagnosis = Diagnosis()
    with pytest.warns(UserWarning, match=message) as said:
        found = diagnosis.update(snapshot(3, nonfinite_fraction=1.0))
        diagnosis.update(snapshot(4))
    assert [finding.head for finding in found] == ["L01H02"]
    assert len(said) == 1


@pytest.mark.parametrize("cls", DETECTORS, ids=lambda cls: cls.__name__)
def test_every_detector_can_look_at_what_it_names(cls):
    columns = {name: [0.5] for name in cls.statistics}
    assert isinstance(list(cls().look(made_snapshot(0, "live", [columns]))), list)
