import math
import re
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from attention_monitor import (
    STATISTICS,
    AttentionMonitor,
    AttentionMonitorError,
    AttentionWarning,
    BatchProbe,
    NoAttentionError,
    RelationProbe,
    RepeatedTokensProbe,
    TextProbe,
    statistic,
)
from attention_monitor.statistics.catalogue import DEFAULT_STATISTICS
from attention_monitor.statistics.totals import HeadTotals

from ..project import VOCAB, Project, T, Tokenizer, installed, make_trainer


def fit(tmp_path, monitor=None, project=None, ckpt_path=None, **options):
    project = project or Project()
    callbacks = [*([monitor] if monitor else []), *options.pop("callbacks", ())]
    trainer = make_trainer(tmp_path, callbacks, **options)
    trainer.fit(project, ckpt_path=ckpt_path)
    return project


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def steps(folder, tag="attention_entropy/mean"):
    return [event.step for event in read(folder).Scalars(tag)]


def test_scalars_matrices_and_maps_of_every_head_are_written(tmp_path):
    fit(tmp_path, AttentionMonitor(every_n_steps=5, probe="hello"))
    tags = read(tmp_path).Tags()
    heads = ["L00H00", "L00H01", "L01H00", "L01H01", "mean"]
    expected = {f"attention_{name}/{head}" for name in DEFAULT_STATISTICS for head in heads}
    assert {tag for tag in tags["scalars"] if tag.startswith("attention")} == expected
    assert set(tags["images"]) == {"attention_maps/text"} | {f"attention_heads/{name}" for name in DEFAULT_STATISTICS}


def test_only_the_statistics_asked_for_are_written(tmp_path):
    fit(tmp_path, AttentionMonitor(every_n_steps=5, statistics=["max_weight"]))
    tags = read(tmp_path).Tags()
    assert {tag.split("/")[0] for tag in tags["scalars"] if "attention" in tag} == {"attention_max_weight"}


def test_without_a_probe_the_map_is_of_the_batch(tmp_path):
    fit(tmp_path, AttentionMonitor(every_n_steps=5))
    assert "attention_maps/live" in read(tmp_path).Tags()["images"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 4, 8, 9]),
        ({"max_steps": 9}, [0, 4, 8]),
        ({"max_steps": -1, "max_epochs": 1, "limit_train_batches": 6}, [0, 4, 5]),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}, [0, 4, 5]),
        ({"accumulate_grad_batches": 3}, [0, 4, 8, 9]),
        ({"max_steps": 4, "limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}, [0, 3]),
    ],
)
def test_step_0_every_nth_and_the_last_step_are_sampled(tmp_path, options, expected):
    fit(tmp_path, AttentionMonitor(every_n_steps=4, probe="hello"), **options)
    assert steps(tmp_path) == expected
    assert [image.step for image in read(tmp_path).Images("attention_maps/text")] == expected


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_x_axis_is_the_one_of_self_log(tmp_path, accumulate):
    """The loss of the very forward that was sampled is logged under the same step."""
    fit(tmp_path, AttentionMonitor(every_n_steps=1), accumulate_grad_batches=accumulate, max_steps=6)
    assert sorted(set(steps(tmp_path, "loss"))) == steps(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_values_are_those_of_the_training_forward(tmp_path):
    """An untrained step 0, taken again by hand with the same dropout."""
    from attention_monitor import capture, summarize

    batches = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches.append((batch, torch.get_rng_state()))

    fit(tmp_path, AttentionMonitor(every_n_steps=100, max_sequences=1), max_steps=1, callbacks=[Spy()])
    (batch, rng), project = batches[0], Project()
    torch.set_rng_state(rng)
    with capture(project) as calls:
        project.train()(batch)
    for layer, call in enumerate(calls):
        for name, values in summarize(call.first_sequences(1)).items():
            for head, value in enumerate(values.tolist()):
                [event] = read(tmp_path).Scalars(f"attention_{name}/L{layer:02d}H{head:02d}")
                assert event.value == pytest.approx(value)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}])
def test_losses_are_bit_identical_with_and_without_the_monitor(tmp_path, options):
    plain = fit(tmp_path / "plain", **options)
    watched = fit(tmp_path / "watched", AttentionMonitor(every_n_steps=2, probe="hello"), **options)
    assert len(plain.losses) >= 10
    assert plain.losses == watched.losses
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_installed_between_sampled_steps(tmp_path):
    seen = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(installed(module))

    class Model(Project):
        def forward(self, tokens):
            if self.training:
                seen.append(installed(self))
            return super().forward(tokens)

    project = fit(tmp_path, AttentionMonitor(every_n_steps=5), Model(), callbacks=[Spy()])
    in_forward, in_backward = seen[::2], seen[1::2]
    assert [bool(n) for n in in_forward] == [step in (0, 5, 9) for step in range(10)]
    assert not any(in_backward)
    assert installed(project) == 0


def test_a_failing_training_step_leaves_nothing_installed_and_everything_written(tmp_path):
    project = Project(fail_at=6)
    with pytest.raises(ZeroDivisionError, match="the user's own error"):
        fit(tmp_path, AttentionMonitor(every_n_steps=3, probe="hello"), project)
    assert installed(project) == 0
    assert steps(tmp_path) == [0, 3]
    assert not [t for t in threading.enumerate() if t.name.startswith("attention-monitor")]


def test_a_nan_is_told_with_layer_head_and_step(tmp_path):
    with pytest.warns(AttentionWarning, match=r"non-finite attention at step 4 in L01H00 \(100% of rows\)") as warned:
        fit(tmp_path, AttentionMonitor(every_n_steps=2, statistics=["entropy"]), Project(nan_at=4))
    assert len([w for w in warned if "L01H00 (" in str(w.message)]) == 1


def test_a_collapsed_head_is_told_with_layer_head_and_step(tmp_path):
    project = Project()
    with torch.no_grad():
        project.blocks[0].qkv.weight.mul_(100)
    with pytest.warns(AttentionWarning, match=r"collapsed attention at step 0 in L00H0\d \(\d+% of rows, max score"):
        fit(tmp_path, AttentionMonitor(every_n_steps=100), project, max_steps=1)


def test_resuming_continues_schedule_values_and_probe(tmp_path):
    def run(folder, **options):
        saver = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        monitor = AttentionMonitor(every_n_steps=4, probe="hello")
        # without dropout, whose random state is not Lightning's to save
        project = Project()
        project.eval()
        project.train = lambda mode=True: project
        fit(folder, monitor, project, callbacks=[saver], enable_checkpointing=True, **options)

    run(tmp_path / "whole", max_steps=12, limit_train_batches=5)
    run(tmp_path / "resumed", max_steps=12, limit_train_batches=5, ckpt_path=str(tmp_path / "whole" / "step=5.ckpt"))
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "resumed")
    assert steps(tmp_path / "whole") == [0, 4, 8, 11]
    for tag in whole.Tags()["scalars"]:
        if tag.startswith("attention"):
            expected = [(e.step, e.value) for e in whole.Scalars(tag)][2:]
            assert [(e.step, e.value) for e in resumed.Scalars(tag)] == expected
    images = [[(i.step, i.encoded_image_string) for i in run.Images("attention_maps/text")] for run in (whole, resumed)]
    assert images[1] == images[0][2:]


def test_resuming_in_the_middle_of_accumulation_does_not_sample_twice(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 9:  # two batches into step 4 of two
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    options = {"accumulate_grad_batches": 2, "max_steps": 7}
    fit(tmp_path / "a", AttentionMonitor(every_n_steps=4), callbacks=[Save()], **options)
    fit(tmp_path / "b", AttentionMonitor(every_n_steps=4), ckpt_path=str(tmp_path / "middle.ckpt"), **options)
    assert steps(tmp_path / "a") == [0, 4, 6]
    assert steps(tmp_path / "b") == [6]


def test_resuming_from_a_checkpoint_of_a_run_without_monitor(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="{step}")
    fit(tmp_path / "a", callbacks=[saver], enable_checkpointing=True, max_steps=6)
    fit(tmp_path / "b", AttentionMonitor(every_n_steps=4), ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert steps(tmp_path / "b") == [8, 9]


def test_a_run_that_is_stopped_early_draws_its_probe_once_more(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 5

    fit(tmp_path, AttentionMonitor(every_n_steps=4, probe="hello"), callbacks=[Stop()], max_steps=-1, max_epochs=2)
    assert [image.step for image in read(tmp_path).Images("attention_maps/text")] == [0, 4, 6]


def test_fitting_twice_goes_on_with_the_same_steps(tmp_path):
    monitor, project = AttentionMonitor(every_n_steps=4), Project()
    trainer = make_trainer(tmp_path, [monitor], max_steps=6)
    trainer.fit(project)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(project)
    assert steps(tmp_path) == [0, 4, 5, 8, 11]


def test_a_probe_that_fails_in_the_middle_of_training_is_told_and_does_not_stop_it(tmp_path):
    class Model(Project):
        def forward(self, tokens):
            if not self.training and self.global_step == 4:
                raise MemoryError("no room")
            return super().forward(tokens)

    with pytest.warns(UserWarning, match=r"at step 4: The probe 'text' .* MemoryError: no room"):
        project = fit(tmp_path, AttentionMonitor(every_n_steps=2, probe="hello"), Model())
    assert len(project.losses) == 10
    assert steps(tmp_path) == [0, 2, 4, 6, 8, 9]
    assert [image.step for image in read(tmp_path).Images("attention_maps/text")] == [0, 2, 6, 8, 9]


def test_an_epoch_that_the_module_skips_leaves_nothing_installed(tmp_path):
    seen = []

    class Skip(Project):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 2 else None

        def on_train_epoch_end(self):
            seen.append(installed(self))

    options = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4}
    fit(tmp_path, AttentionMonitor(every_n_steps=1), Skip(), **options)
    assert seen == [0, 0]


def test_a_model_whose_calls_cannot_be_read_trains_on_with_a_warning(tmp_path, monkeypatch):
    from attention_monitor.statistics import totals as statistics

    def fail(*args):
        raise RuntimeError("not understood")

    monkeypatch.setattr(statistics.HeadTotals, "add", fail)
    with pytest.warns(UserWarning, match=r"could not look at a call of blocks\.0: RuntimeError: not understood"):
        project = fit(tmp_path, AttentionMonitor(every_n_steps=2))
    assert len(project.losses) == 10


class Manual(Project):
    """Optimizers of one's own; ``turn``: batch number -> numbers of those that make a step."""

    automatic_optimization = False

    def __init__(self, n_optimizers=1, turn=None):
        super().__init__()
        self.n_optimizers, self.turn = n_optimizers, turn or (lambda batch_idx: range(n_optimizers))

    def training_step(self, batch, batch_idx):
        optimizers = [self.optimizers()] if self.n_optimizers == 1 else self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for i in self.turn(batch_idx):
            optimizers[i].step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.001) for _ in range(self.n_optimizers)]


def test_two_optimizers_count_as_one_step(tmp_path):
    fit(tmp_path, AttentionMonitor(every_n_steps=3), Manual(2), max_steps=-1, max_epochs=1, limit_train_batches=8)
    assert steps(tmp_path) == [0, 3, 6, 7]
    assert steps(tmp_path, "loss") == list(range(8))


class Stream(torch.utils.data.IterableDataset):
    """Seven batches, which it does not say."""

    def __iter__(self):
        return iter(torch.zeros(14, T).long())


class Streamed(Project):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(Stream(), batch_size=2)


def schedule():
    return pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})


MODULES = {
    "automatic": Project,
    "1 optimizer": Manual,
    "2 optimizers": lambda: Manual(2),
    "3 optimizers": lambda: Manual(3),
    "the second one in every third batch": lambda: Manual(2, lambda batch_idx: range(2 if batch_idx % 3 == 2 else 1)),
    "in turn": lambda: Manual(2, lambda batch_idx: [batch_idx % 2]),
    "accumulating by hand": lambda: Manual(1, lambda batch_idx: range(batch_idx % 4 == 3)),
    "both in every fourth batch": lambda: Manual(2, lambda batch_idx: range(2 if batch_idx % 4 == 3 else 0)),
}
ENDS = {
    "max_steps": {"max_steps": 10},
    "max_steps, by none but one": {"max_steps": 13},
    "max_epochs": {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 7},
    "max_epochs first": {"max_steps": 100, "max_epochs": 2, "limit_train_batches": 7},
    "max_steps first": {"max_steps": 11, "max_epochs": 5, "limit_train_batches": 7},
}


def rarely():
    return AttentionMonitor(every_n_steps=1000, statistics=["entropy"])


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_last_batch_is_looked_at_however_many_optimizers_make_steps(tmp_path, module, end):
    fit(tmp_path, rarely(), module(), **end)
    assert steps(tmp_path) == [0, steps(tmp_path, "loss")[-1]]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Project, {"max_steps": 4, "accumulate_grad_batches": 3}),
        (Project, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 7, "accumulate_grad_batches": 3}),
        (Project, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 6, "accumulate_grad_batches": 3}),
        (Project, {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 0.2}),
        (Project, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 7, "callbacks": [schedule()]}),
        (Project, {"max_steps": 9, "max_epochs": 5, "limit_train_batches": 7, "callbacks": [schedule()]}),
        (Project, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1}),
        (Streamed, {"max_steps": -1, "max_epochs": 2}),
        (Streamed, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5}),
    ],
)
def test_the_last_step_is_looked_at_however_it_is_bounded(tmp_path, module, options):
    fit(tmp_path, rarely(), module(), **options)
    assert steps(tmp_path) == [0, steps(tmp_path, "loss")[-1]]


@pytest.mark.parametrize("until", ["max_steps", "max_epochs"])
@pytest.mark.parametrize("n_optimizers", [1, 2, 3])
@pytest.mark.parametrize("saved_after", [4, 5, "epoch", 8])  # of 9 batches, in epochs of 5
def test_a_run_that_is_resumed_knows_its_last_batch(tmp_path, until, n_optimizers, saved_after):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == saved_after * n_optimizers:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

        def on_train_epoch_end(self, trainer, module):
            if saved_after == "epoch" and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    limit = {"max_steps": 9 * n_optimizers} if until == "max_steps" else {"max_steps": -1, "max_epochs": 2}
    options = {**limit, "limit_train_batches": 5}
    fit(tmp_path / "a", None, Manual(n_optimizers), callbacks=[Save()], **options)
    fit(tmp_path / "b", rarely(), Manual(n_optimizers), ckpt_path=str(tmp_path / "middle.ckpt"), **options)
    assert steps(tmp_path / "b") == steps(tmp_path / "b", "loss")[-1:]


def test_a_batch_that_might_have_been_the_last_leaves_nothing_and_the_probe_is_run_at_the_end(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 9  # max_steps would be reached by the twelfth batch

    module = MODULES["accumulating by hand"]()
    fit(tmp_path, AttentionMonitor(every_n_steps=1000, probe="hello"), module, callbacks=[Stop()], max_steps=3)
    assert steps(tmp_path) == [0]
    assert [image.step for image in read(tmp_path).Images("attention_maps/text")] == [0, 10]
    assert installed(module) == 0


def test_mean_entropy_is_on_the_progress_bar(tmp_path):
    trainer = make_trainer(tmp_path, [monitor := AttentionMonitor(every_n_steps=4)])
    trainer.fit(Project())
    assert trainer.progress_bar_metrics["head_entropy"] == pytest.approx(monitor.latest.mean("normalized_entropy"))
    assert monitor.first.step == 0
    assert monitor.latest.step == 9


def test_a_tokenizer_is_taken_from_the_datamodule_first(tmp_path):
    class Data(pl.LightningDataModule):
        tokenizer = Tokenizer()

        def train_dataloader(self):
            return Project().train_dataloader()

    class Bare(Project):
        tokenizer = None

    trainer = make_trainer(tmp_path, [AttentionMonitor(probe="hello")], max_steps=1)
    trainer.fit(Bare(), datamodule=Data())
    assert "attention_maps/text" in read(tmp_path).Tags()["images"]


def test_a_probe_of_ones_own_with_name_and_tokenizer(tmp_path):
    probe = TextProbe("hello", tokenizer=Tokenizer(), name="greeting")
    fit(tmp_path, AttentionMonitor(probe=probe), max_steps=1)
    assert "attention_maps/greeting" in read(tmp_path).Tags()["images"]


def test_without_a_logger_there_is_a_warning_and_findings_still_come(tmp_path):
    project = Project(nan_at=0)
    with pytest.warns(UserWarning, match="no logger") as warned:
        fit(tmp_path, AttentionMonitor(), project, logger=False, max_steps=1)
    assert any("non-finite" in str(w.message) for w in warned)


def test_other_loggers_get_the_scalars(tmp_path):
    fit(tmp_path, AttentionMonitor(every_n_steps=4), logger=pl.loggers.CSVLogger(str(tmp_path), name="", version=""))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column, step = header.split(",").index("attention_entropy/L01H01"), header.split(",").index("step")
    assert [int(row.split(",")[step]) for row in rows if row.split(",")[column]] == [0, 4, 8, 9]


def test_fast_dev_run_works(tmp_path):
    fit(tmp_path, AttentionMonitor(probe="hello"), fast_dev_run=True)


def test_validate_and_test_are_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, [AttentionMonitor()], limit_val_batches=2)
    trainer.validate(Project(), verbose=False)
    assert not list(tmp_path.glob("*tfevents*")) or "attention_entropy/mean" not in read(tmp_path).Tags()["scalars"]


def test_a_drawing_error_is_told_and_does_not_stop_training(tmp_path, monkeypatch):
    from attention_monitor.plots import repainted

    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(repainted.HeadMatrix, "draw", fail)
    with pytest.warns(UserWarning, match="could not write: RuntimeError: no font"):
        project = fit(tmp_path, AttentionMonitor(every_n_steps=2))
    assert len(project.losses) == 10
    assert steps(tmp_path) == [0, 2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_n_steps": -3}, "every_n_steps must be at least 1, got -3"),
        ({"every_n_steps": 2.5}, "every_n_steps must be at least 1, got 2.5; give a whole number"),
        ({"probe": 123}, "probe must be a text or a Probe such as TextProbe, got 123"),
        ({"max_sequences": 0}, "max_sequences must be at least 1, got 0"),
        ({"sites": [1]}, r"sites must be patterns for module paths, such as \['decoder.\*'\], got \[1\]"),
        ({"statistics": ["entropy", "foo"]}, "Unknown statistic 'foo'; known are .*entropy"),
    ],
)
def test_bad_options_are_refused_when_the_monitor_is_made(options, message):
    with pytest.raises(AttentionMonitorError, match=message):
        AttentionMonitor(**options)


def test_a_probe_longer_than_the_context_is_refused_before_training(tmp_path):
    project = Project()
    message = re.escape(
        "The probe 'text' of shape (1, 21) could not be run through Project: ValueError: at most 20 tokens"
    )
    with pytest.raises(AttentionMonitorError, match=message):
        fit(tmp_path, AttentionMonitor(probe="x" * 21), project)
    assert project.losses == []
    assert installed(project) == 0


class NoAttention(pl.LightningModule):
    tokenizer = Tokenizer()

    def __init__(self):
        super().__init__()
        self.attention_pool = nn.Linear(8, 1)

    def forward(self, tokens):
        return self.attention_pool(nn.functional.one_hot(tokens % 8, 8).float())

    def training_step(self, batch, batch_idx):
        return self(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    train_dataloader = Project.train_dataloader


@pytest.mark.parametrize("probe", [None, "hello"])
def test_a_model_without_attention_is_refused(tmp_path, probe):
    model = NoAttention()
    with pytest.raises(NoAttentionError, match="No attention call was seen in NoAttention"):
        fit(tmp_path, AttentionMonitor(probe=probe), model)
    assert installed(model) == 0


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("other_installed", [True, False])
def test_lightning_under_either_name(tmp_path, package, other_installed):
    """In code and under LightningCLI, which takes only subclasses of its own package's Callback."""
    absent = {"pytorch_lightning": ["lightning"], "lightning.pytorch": ["pytorch_lightning", "lightning_fabric"]}
    config = tmp_path / "project.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  max_steps: 2\n  logger: false\n  enable_checkpointing: false\n"
        "  enable_model_summary: false\n  enable_progress_bar: false\n  callbacks:\n"
        "    - class_path: attention_monitor.AttentionMonitor\n      init_args: {every_n_steps: 1, sites: '*.0.*'}\n"
    )
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[] if other_installed else absent[package]}))
from attention_monitor import AttentionMonitor
import torch
from torch import nn
from {package} import LightningModule, Trainer
from {package}.cli import LightningCLI

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 5, 8), batch_size=2)

def check(trainer):
    [monitor] = [callback for callback in trainer.callbacks if isinstance(callback, AttentionMonitor)]
    assert (monitor.latest.step, len(monitor.latest.sites)) == (1, 1), monitor.latest

trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                  callbacks=[AttentionMonitor(every_n_steps=1, sites="*.1.*")])
trainer.fit(Model())
check(trainer)
check(LightningCLI(Model, args=["fit", "--config", {str(config)!r}]).trainer)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


def test_without_lightning_it_says_what_to_do():
    absent = dict.fromkeys(["lightning", "pytorch_lightning"])
    code = f"import sys; sys.modules.update({absent}); from attention_monitor import AttentionMonitor"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "neither pytorch_lightning nor lightning is installed: pip install lightning; or use" in result.stderr


def test_several_forwards_in_one_step_are_taken_together(tmp_path):
    class Twice(Project):
        def training_step(self, batch, batch_idx):
            self(batch[:, :3])
            return super().training_step(batch, batch_idx)

    monitor = AttentionMonitor()
    fit(tmp_path, monitor, Twice(), max_steps=1)
    assert monitor.first.sites == ["blocks.0", "blocks.1"]


def test_manual_optimisation_and_batches_of_variable_length(tmp_path):
    class Manual(Project):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch[:, : 3 + batch_idx % 4], batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    plain = fit(tmp_path / "plain", project=Manual())
    watched = fit(tmp_path / "watched", AttentionMonitor(every_n_steps=3), Manual())
    assert plain.losses == watched.losses
    assert steps(tmp_path / "watched") == [0, 3, 6, 9]


@pytest.mark.parametrize("options", [{"precision": "64-true"}, {"precision": "bf16-true"}, {"precision": "16-mixed"}])
def test_other_precisions(tmp_path, options):
    plain = fit(tmp_path / "plain", **options)
    watched = fit(tmp_path / "watched", AttentionMonitor(every_n_steps=3, probe="hello"), **options)
    assert plain.losses == watched.losses
    assert not math.isnan(read(tmp_path / "watched").Scalars("attention_entropy/mean")[-1].value)


def test_two_monitors_side_by_side(tmp_path):
    one = AttentionMonitor(every_n_steps=3, statistics=["entropy"])
    other = AttentionMonitor(every_n_steps=5, statistics=["max_weight"])
    fit(tmp_path, one, callbacks=[other])
    assert steps(tmp_path) == [0, 3, 6, 9]
    assert steps(tmp_path, "attention_max_weight/mean") == [0, 5, 9]


def test_the_probe_of_one_monitor_is_not_taken_for_training_by_another(tmp_path):
    alone, beside = AttentionMonitor(statistics=["entropy"]), AttentionMonitor(statistics=["entropy"])
    fit(tmp_path / "a", alone, max_steps=1)
    fit(tmp_path / "b", beside, callbacks=[AttentionMonitor(probe="hello hello")], max_steps=1)
    for a, b in zip(alone.latest.values, beside.latest.values, strict=True):
        np.testing.assert_array_equal(a["entropy"], b["entropy"])


def test_a_backward_of_a_part_without_attention_may_come_first(tmp_path):
    class Manual(Project):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.head.weight.square().sum())
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    project = fit(tmp_path, AttentionMonitor(every_n_steps=4), Manual())
    assert steps(tmp_path) == [0, 4, 8, 9]
    assert installed(project) == 0


@pytest.mark.parametrize("skipped", [(0,), (0, 1, 2, 3, 4)])
def test_a_step_that_does_not_run_the_model_is_no_reason_to_stop(tmp_path, skipped):
    class Skips(Project):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    monitor = AttentionMonitor(every_n_steps=2)
    with pytest.warns(UserWarning, match="Parts of the model were not run in this step, so the next") as caught:
        fit(tmp_path, monitor, Skips(), max_steps=6)
    assert len([w for w in caught if "Parts of the model" in str(w.message)]) == 1
    assert monitor.first is not None
    assert steps(tmp_path)[0] == monitor.first.step > 0


def test_attention_in_the_training_step_itself(tmp_path):
    class Inline(Project):
        def training_step(self, batch, batch_idx):
            q = self.embedding(batch)[:, None]
            z = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            self.blocks[0].forward(z[:, 0])
            return self.head(z).square().mean()

    monitor = AttentionMonitor()
    fit(tmp_path, monitor, Inline(), max_steps=1)
    assert monitor.first.sites == ["Inline[0]", "Inline[1]"]


def test_where_the_probe_shows_attention_a_step_without_it_is_no_error(tmp_path):
    class Skips(Project):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    fit(tmp_path, AttentionMonitor(every_n_steps=4, probe="hello"), Skips())
    assert steps(tmp_path)[-1] == 9


def test_memory_does_not_grow_with_sampled_steps(tmp_path):
    import gc

    counts = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step in (20, 60):
                monitor.flush()
                gc.collect()
                counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))

    monitor = AttentionMonitor(every_n_steps=1, probe="hello")
    project = Project()
    project.log = lambda *args, **kwargs: None
    fit(tmp_path, monitor, project, callbacks=[Count()], max_steps=61)
    assert counts[1] <= counts[0] + 5


def test_no_warning_of_its_own_in_a_healthy_run(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, AttentionMonitor(every_n_steps=2, probe="hello"))
    assert not [w for w in caught if "attention" in str(w.message).lower()]


def test_nan_losses_of_the_model_do_not_stop_the_monitor(tmp_path):
    with pytest.warns(AttentionWarning):
        project = fit(tmp_path, AttentionMonitor(every_n_steps=1), Project(nan_at=2))
    assert math.isnan(project.losses[-1])
    assert len(project.losses) == 10


def several():
    return [
        "hello",
        TextProbe("hullo", name="other"),
        RepeatedTokensProbe(VOCAB, n_tokens=4, n_repeats=3, every=2),
        RelationProbe([([1, 2, 3], [(2, 0, "start")])]),
        BatchProbe(torch.zeros(2, 6, dtype=torch.long)),
    ]


def test_several_probes_are_run_each_at_its_own_pace(tmp_path):
    monitor = AttentionMonitor(every_n_steps=3, probe=several(), statistics=["entropy"])
    fit(tmp_path, monitor)
    events = read(tmp_path)
    names = {tag.split("/")[0] for tag in events.Tags()["scalars"]} - {"loss", "epoch"}
    assert names == {
        "attention_entropy",
        "attention_batch_entropy",
        "attention_relation_start",
        *(f"attention_repeated_{score}" for score in ("induction", "duplicate_token", "previous_token")),
    }
    maps = {tag for tag in events.Tags()["images"] if "maps" in tag}
    assert maps == {"attention_maps/text", "attention_maps/other", "attention_maps/batch"}
    assert "attention_heads/repeated_induction" in events.Tags()["images"]
    assert [event.step for event in events.Scalars("attention_batch_entropy/mean")] == [0, 3, 6, 9]
    # of the samples at 0, 3, 6, 9 every other one, and the last step
    assert [event.step for event in events.Scalars("attention_repeated_induction/mean")] == [0, 6, 9]
    assert set(monitor.roles) <= {"L00H00", "L00H01", "L01H00", "L01H01"}


@pytest.mark.parametrize("every_n_steps", [4, 3, 1])
def test_the_last_step_has_every_probe(tmp_path, every_n_steps):
    probe = RepeatedTokensProbe(VOCAB, n_tokens=4, n_repeats=3, every=99)
    fit(tmp_path, AttentionMonitor(every_n_steps=every_n_steps, probe=["hello", probe]))
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("attention_repeated_induction/mean")] == [0, 9]
    assert [event.step for event in events.Images("attention_maps/text")][-1] == 9


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_several_probes_run_in_the_precision_of_training(tmp_path, precision):
    probes = [probe for probe in several() if not isinstance(probe, BatchProbe)]
    monitor = AttentionMonitor(every_n_steps=2, probe=probes)
    assert fit(tmp_path / "a", monitor, precision=precision).losses == fit(tmp_path / "b", precision=precision).losses


def test_several_probes_do_not_change_training(tmp_path):
    losses = []
    for callbacks in ([], [AttentionMonitor(every_n_steps=2, probe=several())]):
        project = Project()
        make_trainer(tmp_path, callbacks).fit(project)
        losses.append(project.losses)
    assert losses[0] == losses[1]


def test_roles_are_written_when_they_change_and_go_on_in_a_resumed_run(tmp_path, monkeypatch):
    class Sharp(Project):
        """Heads of the first layer look at the token itself, so at one offset."""

        def __init__(self):
            super().__init__()
            for half in self.embedding.weight.data.split(4, dim=1):  # what a head sees: of length 1
                half /= half.norm(dim=1, keepdim=True)
            self.blocks[0].qkv.weight.data[:8] = self.blocks[0].qkv.weight.data[8:16] = 9 * torch.eye(8)
            self.blocks[0].qkv.bias.data.zero_()

    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    monkeypatch.setattr("attention_monitor.probes.position.MIN_TOKENS", 1)
    text = "abcdefghij"
    monitor = AttentionMonitor(every_n_steps=4, probe=text)
    options = {"enable_checkpointing": True, "max_steps": 5}
    make_trainer(tmp_path / "a", [monitor, checkpoint], **options).fit(Sharp())
    assert monitor.roles["L00H00"] == monitor.roles["L00H01"] == {"positional": 0}
    written, *_ = read(tmp_path / "a").Tensors("attention_roles/text_summary")
    assert b"| L00H00 | positional | 0 |" in written.tensor_proto.string_val[0]

    resumed = AttentionMonitor(every_n_steps=4, probe=text)
    trainer = make_trainer(tmp_path / "b", [resumed, checkpoint], **options | {"max_steps": 9})
    trainer.fit(Sharp(), ckpt_path=tmp_path / "ckpt/last.ckpt", weights_only=True)
    assert resumed.roles["L00H00"] == {"positional": 0}  # it was not there at step 0
    fit(tmp_path / "c", resumed, max_steps=1)
    assert "L00H00" not in resumed.roles  # another run begins anew
    for other in ({"every_n_steps": 3, "probe": text}, {"probe": [text, "another text"]}):
        monitor = AttentionMonitor(**other)  # its state has another key
        trainer = make_trainer(tmp_path / "d", [monitor], **{"max_steps": 9})
        trainer.fit(Sharp(), ckpt_path=tmp_path / "ckpt/last.ckpt", weights_only=True)
        assert monitor.roles["L00H00"] == {"positional": 0}


def test_texts_are_numbered():
    assert [probe.name for probe in AttentionMonitor(probe=["a", "b", BatchProbe(()), "c"]).probe] == [
        "text", "text_2", "batch", "text_3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (["a", TextProbe("b")], r"Each probe needs a name of its own, got \['text', 'text'\]; give name=."),
        (TextProbe("a", name="a/b"), "letters, digits and underscores, and not 'live', got 'a/b'"),
        (TextProbe("a", name="live"), "not 'live', got 'live'"),
        (TextProbe("a", every=0), "every= of the probe 'text' must be 1 or more, got 0"),
    ],
)
def test_probes_that_cannot_be_told_apart_are_refused(probe, message):
    with pytest.raises(AttentionMonitorError, match=message):
        AttentionMonitor(probe=probe)


@pytest.mark.parametrize(("max_tokens", "sequences", "rows"), [(None, 3, 24), (16, 2, 16), (17, 2, 16), (5, 1, 5)])
def test_max_tokens_bounds_the_rows_that_are_looked_at(tmp_path, monkeypatch, max_tokens, sequences, rows):
    seen = []
    original = HeadTotals.add

    def spy(self, call):
        original(self, call)
        seen.append((call.shape[0], int(self.packed[1].max())))

    monkeypatch.setattr(HeadTotals, "add", spy)
    data = torch.utils.data.DataLoader(torch.zeros(6, T).long(), batch_size=3)
    monkeypatch.setattr(Project, "train_dataloader", lambda self: data)
    monitor = AttentionMonitor(every_n_steps=100, max_tokens=max_tokens, statistics=["nonfinite_fraction"])
    fit(tmp_path, monitor, max_steps=1)
    assert seen[0] == (sequences, rows)


def test_a_statistic_that_draws_numbers_does_not_change_training(tmp_path):
    try:

        @statistic(unit="1", range="0..1")
        def noise(block):
            """Seeds and draws."""
            torch.manual_seed(5)
            return torch.rand_like(block.max_score)

        monitor = AttentionMonitor(every_n_steps=2, statistics=["noise"])
        assert fit(tmp_path / "watched", monitor).losses == fit(tmp_path / "plain").losses
    finally:
        STATISTICS.pop("noise", None)


def test_a_statistic_that_fails_is_named_and_leaves_the_others(tmp_path):
    try:

        @statistic(unit="1", range="0..1")
        def broken(block):
            """Divides by zero."""
            return 1 / 0

        monitor = AttentionMonitor(every_n_steps=5, statistics=["entropy", "broken"])
        with pytest.warns(
            UserWarning, match="the statistic 'broken' failed and is left out: ZeroDivisionError"
        ) as told:
            fit(tmp_path, monitor)
    finally:
        STATISTICS.pop("broken", None)
    assert sum("'broken'" in str(warning.message) for warning in told) == 1
    tags = {tag.split("/")[0] for tag in read(tmp_path).Tags()["scalars"]}
    assert "attention_entropy" in tags
    assert "attention_broken" not in tags


def test_what_would_be_written_under_one_name_is_refused(tmp_path):
    probe = BatchProbe(torch.zeros(2, 6, dtype=torch.long), name="normalized")
    with pytest.raises(AttentionMonitorError, match="written as attention_normalized_entropy; give the probe another"):
        fit(tmp_path, AttentionMonitor(probe=probe))
