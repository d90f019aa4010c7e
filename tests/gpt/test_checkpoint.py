"""Checkpoints are read without Lightning, and nothing in them is run."""

import os
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch

from gpt import InputError
from gpt.checkpoint import load_checkpoint
from gpt.data import TextDataModule
from gpt.module import GPTModule


@pytest.fixture
def trained(tmp_path):
    """A trained module, its data, and its checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and it was fluffy. " * 50)
    data = TextDataModule(str(text), block_size=8, batch_size=2, vocab_size=270, cache_dir=str(tmp_path / "cache"))
    module = GPTModule(block_size=8, n_layer=1, n_head=2, n_embd=8, qk_norm=True)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True, every_n_train_steps=3)
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    return module, data, tmp_path


@pytest.mark.parametrize("name", ["whole.ckpt", "weights.ckpt"])
def test_a_checkpoint_gives_the_model_and_the_tokenizer_it_was_trained_with(trained, name):
    module, data, folder = trained
    for file in (folder / "cache").iterdir():
        file.unlink()  # it needs nothing else
    found = load_checkpoint(folder / name)
    tokens = torch.randint(data.vocab_size, (2, 8))
    assert torch.equal(found.gpt(tokens), module.eval().gpt(tokens))
    assert found.step == 3
    text = "the cat was on it. ß 🙂"
    assert found.tokenizer.encode_ordinary(text) == data.tokenizer.encode_ordinary(text)
    assert found.tokenizer.n_vocab == data.vocab_size


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, protocol, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Evil()}, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(
        InputError, match=r"was not loaded: it is damaged, or holds more than|is not a checkpoint: it is not in the zip"
    ):
        load_checkpoint(path)
    assert not ran


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not in the zip format"),
        (b"hello", "is not in the zip format"),
        (torch.zeros(3), "holds a Tensor, not a checkpoint"),
        (
            {"state_dict": {}},
            r"is not a checkpoint that train.py wrote with its tokenizer \(KeyError: 'hyper_parameters'",
        ),
        ({"hyper_parameters": {}, "TextDataModule": {"tokenizer": {"name": "bytes"}}, "state_dict": {}}, "KeyError"),
        ({"hyper_parameters": 3, "TextDataModule": {"tokenizer": {}}, "state_dict": {}}, "TypeError"),
    ],
)
def test_foreign_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "foreign.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=message) as told:
        load_checkpoint(path)
    assert "\n" not in str(told.value)


def test_a_file_cut_short_is_refused(trained):
    *_, folder = trained
    whole = (folder / "whole.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a checkpoint"):
        load_checkpoint(folder / "cut.ckpt")


def test_weights_of_another_shape_are_refused(trained):
    *_, folder = trained
    state = torch.load(folder / "weights.ckpt", weights_only=True)
    state["hyper_parameters"]["n_embd"] = 16
    torch.save(state, folder / "other.ckpt")
    with pytest.raises(InputError, match=r"is not a checkpoint that train.py wrote.*RuntimeError"):
        load_checkpoint(folder / "other.ckpt")


@pytest.mark.parametrize(
    "damage",
    [
        {"global_step": "abc"},
        {"TextDataModule": {"tokenizer": {"name": "bpe", "ranks": "not a file of ranks"}}},
        {"TextDataModule": {"tokenizer": {"name": "bpe", "ranks": "YQ== 0\n"}}},
        {"TextDataModule": None},
    ],
)
def test_damage_is_one_sentence(trained, damage):
    *_, folder = trained
    state = torch.load(folder / "weights.ckpt", weights_only=True)
    torch.save(state | damage, folder / "damaged.ckpt")
    with pytest.raises(InputError) as told:
        load_checkpoint(folder / "damaged.ckpt")
    assert "\n" not in str(told.value)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing.ckpt does not exist"):
        load_checkpoint(tmp_path / "nothing.ckpt")


def test_reading_loads_no_lightning(trained):
    *_, folder = trained
    code = f"import sys; from gpt.checkpoint import load_checkpoint; load_checkpoint({str(folder / 'whole.ckpt')!r})"
    code += "; print([name for name in sys.modules if 'lightning' in name])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
