"""An option is a field of Options, and everywhere an argument with the same default, check and meaning."""

import inspect
from dataclasses import dataclass, fields

import pytest
from torch import nn

from attention_monitor import (
    AttentionMonitor,
    AttentionMonitorError,
    AttentionRecorder,
    AttentionTrainerCallback,
    Options,
    TextProbe,
)
from attention_monitor.monitoring.options import takes, takes_after_one

ENTRY_POINTS = {
    "AttentionMonitor": AttentionMonitor,
    "AttentionTrainerCallback": AttentionTrainerCallback,
    "AttentionRecorder": lambda *args, **options: AttentionRecorder(nn.Linear(2, 2), *args, **options),
}
NAMES = [field.name for field in fields(Options)]


@pytest.mark.parametrize("entry", [AttentionMonitor, AttentionTrainerCallback, AttentionRecorder])
@pytest.mark.parametrize("field", fields(Options), ids=lambda field: field.name)
def test_every_entry_point_shows_every_option_with_its_default_and_its_meaning(entry, field):
    assert inspect.signature(entry).parameters[field.name].default == field.default
    assert f"{field.name}: " in inspect.getdoc(entry.__init__)


@pytest.mark.parametrize("make", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_n_steps": True}, "every_n_steps must be at least 1, got True"),
        ({"max_sequences": 2.5}, "max_sequences must be at least 1, got 2.5"),
        ({"max_tokens": -1}, "max_tokens must be at least 1, got -1"),
        ({"statistics": ["nothing"]}, "Unknown statistic 'nothing'"),
        ({"statistics": None}, "statistics must be a list of names"),
        ({"sites": []}, "sites must be patterns"),
        ({"sites": [""]}, "sites must be patterns"),
        ({"sites": 3}, "sites must be patterns for module paths.*got 3"),
        ({"probe": 3}, "A probe must be a text or a Probe"),
        ({"probe": TextProbe([1], name="live")}, "not 'live'"),
        ({"probe": [TextProbe([1]), TextProbe([2])]}, "Each probe needs a name of its own"),
        ({"probe": TextProbe([1], every=0)}, "every= of the probe 'text' must be 1 or more"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_every_entry_point(make, options, message):
    with pytest.raises(AttentionMonitorError, match=message):
        make(**options)


@pytest.mark.parametrize("make", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_a_misspelt_option_is_named_with_those_there_are(make):
    with pytest.raises(TypeError, match=r"Attention\w+: .*'every_n_step'; its arguments are .*every_n_steps, probe"):
        make(every_n_step=5)
    with pytest.raises(TypeError, match=r"Attention\w+: too many positional arguments"):
        make(*range(20))


@pytest.mark.parametrize("make", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_options_may_be_given_by_position_too(make):
    assert make(7, None, ["entropy"], 2, 64, "decoder.*")._options.max_tokens == 64


def test_a_single_text_pattern_or_name_may_stand_without_a_list():
    options = Options(probe="hello", statistics="entropy", sites="a.*")
    assert [probe.text for probe in options.probes] == ["hello"]
    assert [statistic.name for statistic in options.resolved_statistics] == ["entropy"]
    assert options.site_patterns == ["a.*"]


def test_a_new_option_is_one_field():
    @dataclass(frozen=True)
    class More(Options):
        colour: str = "blue"

    class Callback:
        @takes(More)
        def __init__(self, options):
            self.options = options

    class Recorder:
        @takes_after_one(More)
        def __init__(self, model, options):
            self.model, self.options = model, options

    assert Callback(colour="red").options.colour == "red"
    assert Recorder("model", 5, colour="red").options == More(5, colour="red")
    assert Recorder(model="model").model == "model"
    assert list(inspect.signature(Callback).parameters) == [*NAMES, "colour"]


@pytest.mark.parametrize("make", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_the_interval_may_be_changed_later_and_is_checked_then_too(make):
    watcher = make(10)
    watcher.every_n_steps = 3
    assert watcher.every_n_steps == 3
    assert [step for step in range(8) if watcher._options.is_due(step)] == [0, 3, 6]
    with pytest.raises(AttentionMonitorError, match="every_n_steps must be at least 1, got 0"):
        watcher.every_n_steps = 0
