"""Watching Hugging Face's Trainer."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attention_monitor import AttentionMonitorError, AttentionTrainerCallback, NoAttentionError

from ..project import Tokenizer, installed

V, T = 97, 9


@pytest.fixture(autouse=True)
def one_thread():
    """How products are cut up among threads may change with the load of the machine, and their rounding with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        tokens = torch.randint(V, (T,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def train(folder, callback=None, model=None, steps=6, extra=(), **options):
    transformers.set_seed(0)
    if model is None:
        config = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=None, eos_token_id=None))
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[], logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Data(), callbacks=[*([callback] if callback else []), *extra]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "mixed precision": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_watched_and_not_changed(tmp_path, options):
    plain, unwatched = train(tmp_path / "plain", **options)
    callback = AttentionTrainerCallback(every_n_steps=2)
    watched, model = train(tmp_path / "watched", callback, **options)
    assert watched == plain
    assert callback.first.step == 0
    assert callback.latest.step == 5
    assert callback.latest.labels == ["L00", "L01"]
    events = read(tmp_path / "watched" / "runs" / "attention")
    assert [event.step for event in events.Scalars("attention_entropy/mean")] == [0, 2, 4, 5]
    assert "attention_maps/live" in events.Tags()["images"]
    assert installed(model) == installed(unwatched)  # some is accelerate's


def test_under_accumulation_the_first_forward_of_a_step_is_looked_at(tmp_path):
    one, first_of_two = AttentionTrainerCallback(), AttentionTrainerCallback()
    train(tmp_path / "one", one, steps=1)
    train(tmp_path / "two", first_of_two, steps=1, gradient_accumulation_steps=2)
    for a, b in zip(one.first.values, first_of_two.first.values, strict=True):
        np.testing.assert_array_equal(a["entropy"], b["entropy"])


def test_a_probe_with_its_tokenizer_and_a_place_to_log_to(tmp_path):
    from attention_monitor import TextProbe

    callback = AttentionTrainerCallback(
        every_n_steps=3, probe=TextProbe("hello", Tokenizer()), sites="*.h.1.*", statistics=["entropy"],
        log_to=tmp_path / "here",
    )  # fmt: skip
    train(tmp_path / "run", callback, steps=5)
    events = read(tmp_path / "here")
    assert [event.step for event in events.Images("attention_maps/text")] == [0, 3, 4]
    assert set(events.Tags()["scalars"]) == {
        "attention_entropy/mean", *(f"attention_entropy/L01H{head:02d}" for head in range(4)),
    }  # fmt: skip


def test_nothing_is_installed_but_in_the_forward_of_a_sampled_step(tmp_path):
    seen = {"forward": [], "elsewhere": []}

    class Spy(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen["before"] = installed(model)

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen["elsewhere"].append(installed(model))

    class Model(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            seen["forward"].append(torch._C._len_torch_function_stack())
            return super().forward(*args, **kwargs)

    config = transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    callback = AttentionTrainerCallback(every_n_steps=3)
    trainer_callbacks = Spy()
    model = Model(config)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=Data(), callbacks=[trainer_callbacks, callback]).train()
    assert seen["forward"] == [1, 0, 0, 1, 1]
    assert seen["elsewhere"] == [0] * 5
    assert installed(model) == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_middle_of_a_sampled_step_leaves_nothing_installed(tmp_path, error):
    class Fails(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            super().forward(*args, **kwargs)
            raise error

    config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=4, bos_token_id=None, eos_token_id=None)
    model = Fails(config)
    with pytest.raises(error):
        train(tmp_path, AttentionTrainerCallback(), model)
    assert installed(model) == 0


def test_a_copy_made_in_a_sampled_step_is_a_copy(tmp_path):
    copies = []

    class Copies(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            copies.append(copy.deepcopy(model))
            torch.save(model, tmp_path / "model.pt")

    callback = AttentionTrainerCallback(every_n_steps=1)
    _, model = train(tmp_path, callback, steps=1, extra=[Copies()])
    assert callback.first is not None
    tokens = torch.randint(V, (1, T))
    before = model.eval()(tokens).logits
    for other in (copies[0], torch.load(tmp_path / "model.pt", weights_only=False)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert other(tokens).logits.abs().max() == 0
    assert torch.equal(model(tokens).logits, before)


def test_bad_options_are_refused_at_once():
    with pytest.raises(AttentionMonitorError, match="every_n_steps must be at least 1, got 0"):
        AttentionTrainerCallback(every_n_steps=0)


def test_a_model_without_attention_is_refused(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(V, 8)

        def forward(self, input_ids, labels=None):
            return {"loss": self.embedding(input_ids).square().mean()}

    with pytest.raises(NoAttentionError, match="No attention call was seen in Plain"):
        train(tmp_path, AttentionTrainerCallback(), Plain())


def test_without_transformers_it_says_what_to_do():
    code = "import sys; sys.modules['transformers'] = None; from attention_monitor import AttentionTrainerCallback"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "transformers is not installed: pip install transformers; or use AttentionRecorder" in result.stderr
