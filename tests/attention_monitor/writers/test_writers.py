import re
import threading
from typing import ClassVar

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from attention_monitor import AttentionMonitorError
from attention_monitor.snapshots import HeadScore
from attention_monitor.writers.sinks import SINKS, LoggerSink, Sink, TensorBoardSink, sinks_for
from attention_monitor.writers.tags import custom_scalars_layout, scalar_values
from attention_monitor.writers.writer import Writer

from ..made import column, made_snapshot

STATISTICS = ("entropy", "diagonal_mean")


def snapshot(step=0, labels=("L00", "L01"), **options):
    values = [{"entropy": [1.0 + step, 2.0 + step], "diagonal_mean": [0.5, float("nan")]} for _ in labels]
    return made_snapshot(step, "live", values, labels, **options)


def probe(step=0):
    return made_snapshot(step, "text", [{}], tokens=["a", "b", "c"], patterns=[np.eye(3)[None]])


class ListSink:
    """Keeps the whole list of what it is given."""

    in_background = takes_images = True

    def __init__(self):
        self.calls = []

    def scalars(self, values, step):
        self.calls.append(("scalars", step, values))

    def image(self, tag, pixels, step):
        self.calls.append(("image", step, tag))

    def text(self, tag, markdown, step):
        self.calls.append(("text", step, tag, markdown))

    def layout(self, layout):
        self.calls.append(("layout", layout))

    def flush(self):
        self.calls.append(("flush",))


def test_tags_name_statistic_layer_and_head_and_nan_is_left_out():
    assert scalar_values(snapshot()) == {
        "attention_entropy/L00H00": 1.0,
        "attention_entropy/L00H01": 2.0,
        "attention_entropy/L01H00": 1.0,
        "attention_entropy/L01H01": 2.0,
        "attention_entropy/mean": 1.5,
        "attention_diagonal_mean/L00H00": 0.5,
        "attention_diagonal_mean/L01H00": 0.5,
        "attention_diagonal_mean/mean": 0.5,
    }
    assert "attention_entropy/enc.attn/H01" in scalar_values(snapshot(labels=["enc.attn"]))


def test_the_whole_list_of_what_is_written():
    sink = ListSink()
    writer = Writer([sink])
    writer.write(probe(0))
    writer.write(snapshot(0))
    writer.write(snapshot(5))
    writer.close()
    layout = {
        name: {label: [f"^attention_{name}/{label}H00$", f"^attention_{name}/{label}H01$"] for label in ("L00", "L01")}
        for name in STATISTICS
    }
    assert sink.calls == [
        ("image", 0, "attention_maps/text"),
        ("flush",),
        ("scalars", 0, scalar_values(snapshot(0))),
        ("layout", layout),
        ("image", 0, "attention_heads/entropy"),
        ("image", 0, "attention_heads/diagonal_mean"),
        ("flush",),
        ("scalars", 5, scalar_values(snapshot(5))),
        ("image", 5, "attention_heads/entropy"),
        ("image", 5, "attention_heads/diagonal_mean"),
        ("flush",),
    ]


def test_tensorboard_can_read_it_back(tmp_path):
    experiment = SummaryWriter(str(tmp_path))
    writer = Writer([TensorBoardSink(experiment)])
    for step in (0, 7):
        writer.write(probe(step))
        writer.write(snapshot(step))
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()  # before the experiment is closed: it is on disk already
    assert [(e.step, e.value) for e in events.Scalars("attention_entropy/L01H01")] == [(0, 2.0), (7, 9.0)]
    assert set(events.Tags()["images"]) == {
        "attention_maps/text",
        "attention_heads/entropy",
        "attention_heads/diagonal_mean",
    }
    image = events.Images("attention_maps/text")[1]
    assert image.step == 7
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    experiment.close()


def test_drawing_does_not_happen_on_the_callers_thread():
    class Sink(ListSink):
        def image(self, tag, pixels, step):
            self.calls.append(threading.current_thread().name)

    sink = Sink()
    writer = Writer([sink])
    writer.write(probe())
    writer.close()
    assert sink.calls[0].startswith("attention-monitor")
    assert not [t for t in threading.enumerate() if t.name.startswith("attention-monitor")]


def test_a_caller_that_is_too_far_ahead_waits_and_nothing_is_dropped():
    gate = threading.Event()

    class Slow(ListSink):
        def scalars(self, values, step):
            gate.wait(10)
            super().scalars(values, step)

    sink = Slow()
    writer = Writer([sink])
    for step in range(4):
        writer.write(snapshot(step))
    ahead = threading.Thread(target=lambda: writer.write(snapshot(4)))
    ahead.start()
    ahead.join(0.2)
    assert ahead.is_alive()
    gate.set()
    ahead.join(10)
    writer.close()
    assert [call[1] for call in sink.calls if call[0] == "scalars"] == [0, 1, 2, 3, 4]


def test_a_failure_is_told_once_and_the_rest_is_written():
    class Broken(ListSink):
        def image(self, tag, pixels, step):
            raise OSError("disk full")

    sink = Broken()
    writer = Writer([sink])
    with pytest.warns(UserWarning, match="AttentionMonitor could not write: OSError: disk full") as warned:
        for step in range(8):
            writer.write(snapshot(step))
        writer.close()
    assert len(warned) == 1
    assert [call[1] for call in sink.calls if call[0] == "scalars"] == list(range(8))


def test_one_failing_sink_does_not_keep_the_others_from_writing():
    class Broken(ListSink):
        def scalars(self, values, step):
            raise OSError("no connection")

    good = ListSink()
    writer = Writer([Broken(), good])
    with pytest.warns(UserWarning, match="no connection"):
        writer.write(snapshot())
        writer.close()
    assert ("image", 0, "attention_heads/entropy") in good.calls


class Logger:
    """A Lightning logger that is not TensorBoard's."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append((threading.current_thread().name, step, metrics))


def test_other_loggers_get_scalars_on_the_training_thread():
    logger = Logger()
    assert isinstance(sinks_for(logger)[0], LoggerSink)
    writer = Writer(sinks_for(logger))
    writer.write(snapshot(3))
    writer.close()
    assert logger.calls == [(threading.current_thread().name, 3, scalar_values(snapshot(3)))]


def test_a_failing_picture_does_not_keep_scalars_from_being_written():
    sink = ListSink()
    writer = Writer([sink])
    broken = snapshot(0, patterns=[np.ones((2, 2))] * 2)  # not (H, Q, K)
    with pytest.warns(UserWarning, match="could not write"):
        writer.write(broken)
        writer.close()
    assert ("scalars", 0, scalar_values(broken)) in sink.calls


def test_other_loggers_get_pictures_where_they_take_them():
    class PictureLogger(Logger):
        def log_image(self, key, images, step):
            self.calls.append((key, step, [type(image) for image in images]))

    logger = PictureLogger()
    writer = Writer(sinks_for(logger))
    writer.write(probe(3))
    writer.close()
    assert logger.calls == [("attention_maps/text", 3, [np.ndarray])]


def test_the_layout_groups_the_heads_of_a_layer():
    [pattern] = custom_scalars_layout(snapshot(labels=["a.b[0]"]))["entropy"]["a.b[0]"][:1]
    assert re.search(pattern, "attention_entropy/a.b[0]/H00")
    layout = custom_scalars_layout(snapshot(labels=["enc"], columns=["entropy"]))
    assert layout == {"entropy": {"enc": ["^attention_entropy/enc/H00$", "^attention_entropy/enc/H01$"]}}


def test_a_picture_is_laid_out_anew_when_the_model_changes_shape():
    sink = ListSink()
    writer = Writer([sink])
    writer.write(snapshot(0))
    writer.write(snapshot(1, labels=["L00", "L01", "L02"]))
    writer.close()
    assert ("image", 1, "attention_heads/entropy") in sink.calls


def test_cross_attention_has_no_row_in_the_matrix_of_a_statistic_that_makes_no_sense_for_it(tmp_path, monkeypatch):
    from attention_monitor.plots import repainted

    drawn = []

    class Spy(repainted.HeadMatrix):
        def __init__(self, n_heads, labels, title, value_range):
            drawn.append((title, labels))
            super().__init__(n_heads, labels, title, value_range)

    monkeypatch.setattr(repainted, "HeadMatrix", Spy)
    nan = [float("nan")] * 2
    values = [{"entropy": [1, 1], "diagonal_mean": [1, 1]}, {"entropy": nan, "diagonal_mean": nan}]
    writer = Writer(sinks_for(SummaryWriter(tmp_path)))
    writer.write(made_snapshot(0, "live", values, ["a", "b"], is_cross=[False, True]))
    writer.write(made_snapshot(1, "live", values[1:], ["b"], is_cross=[True]))
    writer.close()
    assert drawn == [("entropy", ["a", "b"]), ("diagonal_mean", ["a"]), ("entropy", ["b"])]


def test_what_a_layer_probe_finds_is_written_for_each_layer_with_its_rollout():
    found = made_snapshot(
        3,
        "layers",
        [{"head_distance": [0.1, 0.2]}] * 2,
        columns=[HeadScore("head_distance")],
        layer_values=[{"token_spread": 0.9}, {"token_spread": float("nan")}],
        rollouts=[np.eye(3)] * 2,
    )
    sink = ListSink()
    writer = Writer([sink])
    writer.write(found)
    writer.close()
    [(_, step, values)] = [call for call in sink.calls if call[0] == "scalars"]
    assert step == 3
    assert values["attention_layers_token_spread/L00"] == 0.9
    assert "attention_layers_token_spread/L01" not in values  # NaN
    assert values["attention_layers_head_distance/L01H01"] == pytest.approx(0.2)
    images = [call[2] for call in sink.calls if call[0] == "image"]
    assert images == ["attention_rollout/layers", "attention_heads/layers_head_distance"]


def test_the_layout_has_what_every_source_shows():
    sink = ListSink()
    writer = Writer([sink])
    writer.write(snapshot(columns=["entropy", column("diagonal_mean", is_written=False)]))
    scores = [HeadScore("sharp", threshold=0.5), HeadScore("hidden", threshold=0.5, is_written=False)]
    writer.write(made_snapshot(0, "mine", [{"sharp": [1.0], "hidden": [1.0]}], columns=scores))
    writer.write_text("attention_roles", "| a |", 0)
    writer.close()
    layouts = [call[1] for call in sink.calls if call[0] == "layout"]
    assert [list(layout) for layout in layouts] == [["entropy"], ["entropy", "mine_sharp"]]
    assert layouts[1]["mine_sharp"] == {"L00": ["^attention_mine_sharp/L00H00$"]}
    assert sink.calls[-1] == ("text", 0, "attention_roles", "| a |")


def test_a_logger_of_another_kind_is_one_class():
    class Diary:
        pages: ClassVar = []

    class DiarySink(Sink):
        @classmethod
        def for_logger(cls, logger):
            return cls() if isinstance(logger, Diary) else None

        def scalars(self, values, step):
            Diary.pages.append((step, values))

    writer = Writer(sinks_for([Diary(), None]))
    writer.write(snapshot(3))
    writer.write_text("attention_roles", "| a |", 3)
    writer.close()
    assert Diary.pages == [(3, scalar_values(snapshot(3)))]
    SINKS.remove(DiarySink)


def test_maps_that_only_some_sites_have_are_drawn_with_their_own_labels(monkeypatch):
    from attention_monitor.plots import repainted

    drawn = []

    class Spy(repainted.Mosaic):
        def __init__(self, shapes, labels, *options):
            drawn.append(labels)
            super().__init__(shapes, labels, *options)

    monkeypatch.setattr(repainted, "Mosaic", Spy)
    sink = ListSink()
    writer = Writer([sink])
    writer.write(made_snapshot(0, "live", [{}, {}], columns=[], patterns=[None, np.eye(3)[None]]))
    writer.close()
    assert drawn == [["L01"]]


def test_a_sink_that_is_not_for_threads_is_called_on_that_of_training_alone():
    threads = {}

    class Careful(ListSink):
        in_background = False

        def __getattribute__(self, name):
            if name in ("scalars", "image", "text", "layout", "flush"):
                return lambda *args: threads.setdefault(name, set()).add(threading.current_thread())
            return super().__getattribute__(name)

    writer = Writer([Careful()])
    writer.write(snapshot(0))
    writer.write(probe(0))
    writer.write_text("attention_roles", "| a |", 0)
    writer.close()
    assert threads == {name: {threading.current_thread()} for name in ("scalars", "image", "text", "layout", "flush")}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (classmethod(lambda cls, logger: 1 / 0), "Odd.for_logger failed for .*ZeroDivisionError"),
        (classmethod(lambda cls, logger: True), "Odd.for_logger returns a Sink or None, got True"),
        (lambda self, logger: None, "Odd.for_logger failed for .*it is a class method"),
    ],
)
def test_a_faulty_sink_is_named(made, message):
    kind = type("Odd", (Sink,), {"for_logger": made})
    try:
        with pytest.raises(AttentionMonitorError, match=message):
            sinks_for(Logger())
    finally:
        SINKS.remove(kind)


def test_what_nothing_can_be_logged_to_is_told_of_sinks():
    with pytest.raises(AttentionMonitorError, match=r"Nothing can be logged to 3: .* there is attention_monitor\.Sink"):
        sinks_for(3)
