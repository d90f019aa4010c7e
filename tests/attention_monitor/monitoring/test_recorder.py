"""Watching a training loop of one's own."""

import copy
import gc
import resource
import warnings

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

from attention_monitor import (
    AttentionCall,
    AttentionMonitor,
    AttentionMonitorError,
    AttentionRecorder,
    AttentionWarning,
    NoAttentionError,
)
from attention_monitor.statistics import maps

from ..project import VOCAB, Block, Project, T, installed, make_trainer


def train(model, recorder=None, steps=10, watch_backward=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, hooks = [], []
    batches = iter(model.train_dataloader())
    torch.manual_seed(3)
    for step in range(steps):
        batch = next(batches)
        if recorder is None:
            loss = model(batch).square().mean()
            loss.backward()
        else:
            with recorder.step(step):
                hooks.append(installed(model))
                loss = model(batch).square().mean()
                if watch_backward:
                    loss.backward()
            assert installed(model) == 0
            if not watch_backward:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, hooks


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize("watch_backward", [True, False])
def test_a_loop_is_watched_every_n_steps_and_not_changed(tmp_path, watch_backward):
    plain, _ = train(Project())
    model = Project()
    with AttentionRecorder(
        model, every_n_steps=4, probe="hello", log_to=tmp_path, tokenizer=model.tokenizer
    ) as recorder:
        losses, hooks = train(model, recorder, watch_backward=watch_backward)
    assert losses == plain
    assert [bool(n) for n in hooks] == [step in (0, 4, 8) for step in range(10)]
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("attention_entropy/mean")] == [0, 4, 8]
    assert [event.step for event in events.Images("attention_maps/text")] == [0, 4, 8, 10]  # once more at the end
    assert recorder.snapshots["live"].step == 8


def test_it_records_what_the_callback_records(tmp_path):
    class Remembering(Project):
        def training_step(self, batch, batch_idx):
            self.before = copy.deepcopy(self.state_dict()), batch, torch.get_rng_state()
            return super().training_step(batch, batch_idx)

    monitor, model = AttentionMonitor(), Remembering()
    make_trainer(tmp_path, [monitor], max_steps=1).fit(model)
    weights, batch, random_state = model.before
    model = Project()
    model.load_state_dict(weights)
    recorder = AttentionRecorder(model)
    with recorder.step(0):
        torch.set_rng_state(random_state)
        model(batch)
    recorded = recorder.snapshots["live"]
    assert recorded.sites == monitor.first.sites
    for one, other in zip(monitor.first.values, recorded.values, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_forward_that_fails_leaves_nothing_installed(tmp_path):
    model = Project()
    recorder = AttentionRecorder(model, every_n_steps=2, log_to=tmp_path)
    with pytest.raises(ValueError, match="at most 20"), recorder.step(0):
        model(torch.zeros(1, 30, dtype=torch.long))
    assert installed(model) == 0
    with recorder.step(2):
        model(torch.zeros(1, 5, dtype=torch.long))
    recorder.close()
    assert [event.step for event in read(tmp_path).Scalars("attention_entropy/mean")] == [2]


def test_checkpointing_with_the_backward_pass_in_the_context_counts_once():
    class Checkpointed(Project):
        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    model = Checkpointed()
    recorder = AttentionRecorder(model)
    train(model, recorder, steps=1, watch_backward=True)
    assert recorder.snapshots["live"].labels == ["L00", "L01"]


@pytest.mark.parametrize("make", [str, lambda path: path, SummaryWriter, lambda path: TensorBoardLogger(path, "", "")])
def test_where_to_log_to(tmp_path, make):
    recorder = AttentionRecorder(model := Project(), log_to=make(tmp_path))
    train(model, recorder, steps=1)
    recorder.close()
    assert "attention_heads/entropy" in read(tmp_path).Tags()["images"]


def test_several_places_to_log_to(tmp_path):
    csv = CSVLogger(tmp_path / "csv", "", "")
    recorder = AttentionRecorder(model := Project(), log_to=[tmp_path / "tensorboard", csv])
    train(model, recorder, steps=1)
    recorder.close()
    csv.save()
    assert "attention_entropy/mean" in (tmp_path / "csv" / "metrics.csv").read_text()
    assert "attention_entropy/mean" in read(tmp_path / "tensorboard").Tags()["scalars"]


def test_without_a_place_nothing_is_written_and_findings_still_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Project()
    with torch.no_grad():
        model.blocks[0].qkv.weight[0] = torch.nan
    with pytest.warns(AttentionWarning, match="non-finite attention at step 0 in L00H00"):
        train(model, AttentionRecorder(model), steps=1)
    assert list(tmp_path.iterdir()) == []


class Overflows(Block):
    """What follows attention in the block, such as a feed-forward, overflows."""

    def forward(self, x):
        return super().forward(x) * torch.inf


@pytest.mark.parametrize("begins_in", ["values", "output", "feed-forward"])
def test_infinity_is_not_said_to_have_begun_in_the_layer_that_shows_it(begins_in):
    model = Project()
    with torch.no_grad():
        if begins_in == "values":
            model.blocks[0].qkv.bias[16:] = torch.inf
        elif begins_in == "output":
            model.blocks[0].out.bias[:] = torch.inf
        else:
            model.blocks[0] = Overflows()
    with pytest.warns(AttentionWarning, match="non-finite attention at step 0 in L01H00") as warned:
        train(model, AttentionRecorder(model), steps=1)
    [message] = [str(warning.message) for warning in warned if "non-finite" in str(warning.message)]
    assert "L00" not in message
    assert "need not have begun in the lowest layer named" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"sites": 3}, "sites must be patterns .* got 3"),
        ({"sites": ""}, "sites must be patterns .* got ''"),
        ({"statistics": 3}, "statistics must be a list of names, got 3"),
        ({"every_n_steps": True}, "every_n_steps must be at least 1, got True"),
        ({"log_to": ""}, "Nothing can be logged to ''"),
        ({"tokenizer": 3, "probe": "hello"}, "3 has no encode and decode"),
        ({"sites": []}, r"sites must be patterns for module paths, such as \['decoder.\*'\], got \[\]"),
        ({"sites": [3]}, r"sites must be patterns .* got \[3\]"),
        ({"log_to": 3}, "Nothing can be logged to 3: give a folder, a SummaryWriter"),
        ({"probe": "hello"}, "no tokenizer was found"),
        ({"statistics": ["foo"]}, "Unknown statistic 'foo'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(AttentionMonitorError, match=message):
        AttentionRecorder(Project(), **options)


def test_misuse_gets_one_clear_sentence():
    with pytest.raises(AttentionMonitorError, match=r"watches a torch\.nn\.Module, got <function"):
        AttentionRecorder(lambda x: x)
    recorder = AttentionRecorder(model := Project())
    with (
        pytest.raises(AttentionMonitorError, match="number of optimizer steps done so far, got '3'"),
        recorder.step("3"),
    ):
        pass
    recorder.close()
    with pytest.raises(AttentionMonitorError, match="has been closed; make another one"), recorder.step(0):
        pass
    recorder.close()
    assert installed(model) == 0


def test_of_several_batches_in_a_step_the_first_is_looked_at(tmp_path):
    recorder = AttentionRecorder(model := Project(), every_n_steps=2, log_to=tmp_path)
    for step in (0, 0, 0, 1, 1, 1, 2, 2, 2):
        with recorder.step(step):
            model(torch.randint(VOCAB, (2, T)))
    recorder.close()
    assert [event.step for event in read(tmp_path).Scalars("attention_entropy/mean")] == [0, 2]


def test_a_probe_that_does_not_fit_is_an_error_at_the_first_step():
    model = Project()
    recorder = AttentionRecorder(model, probe="x" * 21, tokenizer=model.tokenizer)
    with pytest.raises(AttentionMonitorError, match="at most 20 tokens"):
        train(model, recorder, steps=1)
    assert installed(model) == 0


def test_sites_are_chosen_by_patterns():
    recorder = AttentionRecorder(model := Project(), sites="blocks.1")
    train(model, recorder, steps=1)
    assert recorder.snapshots["live"].sites == ["blocks.1"]
    with pytest.raises(NoAttentionError, match=r"sites=\['nothing'\] matches none of those seen, blocks.0, blocks.1"):
        train(model, AttentionRecorder(model, sites="nothing"), steps=1)


def test_what_is_not_understood_is_said_once_for_each_site():
    class OddAttention(nn.Linear):
        def forward(self, x):
            return ((x @ x.mT).softmax(-1)[..., None] * x[:, None]).sum(-2)

    class Odd(Project):
        def __init__(self):
            super().__init__()
            self.odd = nn.ModuleList([OddAttention(1, 1), OddAttention(1, 1)])

        def forward(self, tokens):
            x = self.embedding(tokens)
            return super().forward(tokens) + self.head(self.odd[1](self.odd[0](x)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model := Odd(), AttentionRecorder(model, every_n_steps=2))
    told = [str(w.message) for w in caught if "attention_monitor" in str(w.message)]
    assert [message.split(":")[0] for message in told] == [
        "attention_monitor could not look at a call of odd.0",
        "attention_monitor could not look at a call of odd.1",
    ]


class Translator(nn.Module):
    """An encoder and a decoder of the same length."""

    def __init__(self, n_encoder=2, n_decoder=3):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.transformer = nn.Transformer(8, 2, n_encoder, n_decoder, 16, batch_first=True)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.transformer(x, x.flip(1))

    train_dataloader = Project.train_dataloader


def test_encoder_decoder_and_cross_attention_are_stacks_of_their_own(tmp_path):
    with AttentionRecorder(model := Translator(), log_to=tmp_path) as recorder:
        train(model, recorder, steps=1)
    snapshot = recorder.snapshots["live"]
    encoder = [f"transformer.encoder.layers.{i}.self_attn" for i in range(2)]
    decoder = [f"transformer.decoder.layers.{i}.self_attn" for i in range(3)]
    cross = [f"transformer.decoder.layers.{i}.multihead_attn" for i in range(3)]
    assert snapshot.sites == snapshot.labels == encoder + decoder + cross
    stacks = [path.replace("0", "*") for path in (encoder[0], decoder[0], cross[0])]
    assert snapshot.stacks == [stacks[0]] * 2 + [stacks[1]] * 3 + [stacks[2]] * 3
    tags = read(tmp_path).Tags()["scalars"]
    for stack in stacks:
        assert f"attention_entropy/mean/{stack}" in tags
        assert (f"attention_diagonal_mean/mean/{stack}" in tags) == (stack != stacks[2])
    assert f"attention_entropy/{cross[0]}/H01" in tags
    assert f"attention_diagonal_mean/{cross[0]}/H01" not in tags
    assert f"attention_diagonal_mean/{decoder[0]}/H01" in tags
    means = [snapshot.mean("entropy", stack) for stack in stacks]
    assert snapshot.mean("entropy") == pytest.approx((2 * means[0] + 3 * means[1] + 3 * means[2]) / 8)


@pytest.mark.parametrize("make", [Project, lambda: Translator(1, 1)], ids=["decoder", "encoder and decoder"])
def test_memory_does_not_grow_over_1000_sampled_steps(make):
    model = make()
    recorder = AttentionRecorder(model, every_n_steps=1)
    tokens, counts, peaks = torch.randint(VOCAB, (2, T)), [], []
    for step in range(1401):
        with recorder.step(step):
            model(tokens).sum()
        if step in (400, 1400):  # what the allocator keeps has settled by then, also without a recorder
            gc.collect()
            counts.append(len(gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # in KB on Linux
    assert counts[1] - counts[0] < 100
    assert peaks[1] - peaks[0] < 5_000


@pytest.mark.parametrize(("Q", "K"), [(97, 97), (250, 130), (96, 200), (300, 20)])
def test_a_long_map_is_pooled_alike_whole_and_in_bands(Q, K, monkeypatch):
    call = AttentionCall("attn", torch.randn(1, 2, Q, 4), torch.randn(1, 2, K, 4))
    whole = maps.pooled_pattern(call)
    monkeypatch.setattr(maps, "BLOCK_ELEMENTS", 0)
    torch.testing.assert_close(maps.pooled_pattern(call), whole)  # products of other sizes round otherwise
    assert whole.shape == (1, 2, min(Q, 96), min(K, 96))
    assert whole[0, 0, 0, 0] == call.pattern()[0, 0, : -(-Q // min(Q, 96)), : -(-K // min(K, 96))].max()
