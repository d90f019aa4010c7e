"""The whole program, on models small enough to train in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel

import train
from attention_monitor import AttentionMonitor, AttentionMonitorError
from gpt import InputError, data

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _few_stories(monkeypatch):
    monkeypatch.setattr(data, "N_STORIES", 300)
    monkeypatch.setattr(train, "HELD_OUT_STORIES", 5)


def arguments(folder, *options, config="tiny", steps=6):
    """tiny.yaml made smaller still, with everything it writes under ``folder``."""
    return [
        "--config",
        str(ROOT / "configs" / f"{config}.yaml"),
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=3",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        f"--data.cache_dir={folder}/cache",
        "--data.batch_size=4",
        "--model.n_embd=16",
        "--model.n_layer=2",
        *options,
    ]


def events(folder, name="tiny"):
    [run] = (Path(folder) / name).glob("version_*")
    return EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()


def losses(folder):
    return [(event.step, event.value) for event in events(folder).Scalars("train/loss")]


def test_a_run_trains_writes_and_reports(tmp_path, capsys):
    train.main(arguments(tmp_path))
    written = events(tmp_path)
    assert [event.step for event in written.Scalars("attention_normalized_entropy/mean")] == [0, 5]
    assert written.Scalars("attention_normalized_entropy/mean")[0].value >= 0.95
    assert {"train/loss", "val/loss", "lr", "tokens_per_second"} <= set(written.Tags()["scalars"])
    assert "attention_maps/text" in written.Tags()["images"]
    printed = capsys.readouterr().out
    assert f"Validation loss: {written.Scalars('val/loss')[-1].value:.4f}" in printed
    assert "Mean normalized entropy of all heads: 1.000 -> " in printed
    for relation in ("agreement", "pronoun", "induction"):
        assert relation in printed
    assert "previous token" in printed
    assert "first token (sink)" in printed
    assert "tensorboard --logdir " in printed


def test_the_validation_loss_at_the_end_is_that_of_the_last_step(tmp_path, capsys):
    cli = train.main(arguments(tmp_path, steps=4))  # validated at step 3
    printed = capsys.readouterr().out
    with torch.no_grad():
        losses = [(len(b[0]), cli.model.eval()._loss(b).item()) for b in cli.datamodule.val_dataloader()]
    expected = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
    assert float(printed.split("Validation loss: ")[1].split()[0]) == pytest.approx(expected, abs=1e-4)


def test_statistics_may_be_chosen(tmp_path, capsys):
    config = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"]["statistics"] = ["max_weight"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    train.main(["--config", str(path), *arguments(tmp_path)[2:]])
    assert "agreement" in capsys.readouterr().out
    assert "attention_max_weight/mean" in events(tmp_path).Tags()["scalars"]


def test_the_config_that_a_run_leaves_behind_can_be_run(tmp_path):
    train.main(arguments(tmp_path / "one", steps=2))
    [config] = (tmp_path / "one").rglob("config.yaml")
    train.main(["--config", str(config), f"--trainer.logger.init_args.save_dir={tmp_path / 'two'}"])
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_text_of_ones_own_is_trained_on_without_relations(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 200, encoding="utf-8")
    train.main(arguments(tmp_path, f"--data.path={text}"))
    printed = capsys.readouterr().out
    assert "Validation loss" in printed
    assert "agreement" not in printed


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.accumulate_grad_batches=4"],
        ["--model.activation_checkpointing=true"],
        ["--model.dropout=0.2", "--model.qk_norm=true", "--model.n_kv_head=2"],
    ],
    ids=lambda options: options[0].removeprefix("--") if options else "float32",
)
def test_losses_are_bit_identical_with_and_without_the_monitor(tmp_path, options):
    train.main(arguments(tmp_path / "watched", *options))
    config = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if "Attention" not in c["class_path"]]
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump(config))
    train.main(["--config", str(bare), *arguments(tmp_path / "bare", *options)[2:]])
    assert len(losses(tmp_path / "bare")) == 6
    assert losses(tmp_path / "watched") == losses(tmp_path / "bare")
    assert "attention_entropy/mean" not in events(tmp_path / "bare").Tags()["scalars"]


@pytest.mark.parametrize("at", [3, 4, 5])
def test_resuming_continues_data_losses_and_monitor_exactly(tmp_path, at):
    init_args = {"every_n_train_steps": at, "save_top_k": -1, "filename": "{step}"}
    saver = json.dumps({"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": init_args})
    options = [
        f"--trainer.callbacks+={saver}",
        "--trainer.limit_train_batches=4",  # so that it resumes within and between epochs
        "--trainer.val_check_interval=1.0",
        "--trainer.check_val_every_n_epoch=1",
    ]
    train.main(arguments(tmp_path / "whole", *options, steps=12))
    [checkpoint] = (tmp_path / "whole").rglob(f"step={at}.ckpt")
    train.main(arguments(tmp_path / "resumed", *options, f"--ckpt_path={checkpoint}", steps=12))
    whole, resumed = events(tmp_path / "whole"), events(tmp_path / "resumed")
    tags = [tag for tag in whole.Tags()["scalars"] if tag.startswith("attention") or tag in ("train/loss", "lr")]
    assert len(tags) > 50
    for tag in tags:
        expected = [(e.step, e.value) for e in whole.Scalars(tag) if e.step >= at]
        assert [(e.step, e.value) for e in resumed.Scalars(tag)] == expected, tag
    maps = [[(i.step, i.encoded_image_string) for i in run.Images("attention_maps/text")] for run in (whole, resumed)]
    assert maps[1] == [(step, image) for step, image in maps[0] if step >= at]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_instantiated_with_a_path_of_ones_own(tmp_path, path):
    (tmp_path / "text.txt").write_text("some text")
    cli = train.make_cli(["--config", str(path), f"--data.path={tmp_path / 'text.txt'}", "--trainer.accelerator=cpu"])
    assert cli.datamodule.paths == [tmp_path / "text.txt"]
    assert cli.datamodule.block_size == cli.model.hparams["block_size"]
    assert any(isinstance(callback, AttentionMonitor) for callback in cli.trainer.callbacks)


def test_gpt2_yaml_is_gpt2_small():
    cli = train.make_cli(["--config", str(ROOT / "configs/gpt2.yaml"), "--trainer.accelerator=cpu"])
    with torch.device("meta"):
        cli.model.configure_model()
    assert sum(p.numel() for p in cli.model.parameters()) == pytest.approx(124e6, rel=0.01)


def test_tiny_yaml_has_about_a_million_parameters(tmp_path):
    cli = train.make_cli(["--config", str(ROOT / "configs/tiny.yaml"), "--model.vocab_size=600"])
    cli.model.configure_model()
    assert 0.8e6 < sum(p.numel() for p in cli.model.parameters()) < 1.2e6


def test_training_starts_from_a_hugging_face_checkpoint(tmp_path):
    config = GPT2Config(vocab_size=256, n_positions=32, n_layer=2, n_head=4, n_embd=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    options = [f"--model.init_from={tmp_path / 'hf'}", "--data.tokenizer=bytes"]
    cli = train.main(arguments(tmp_path, *options, "--model.block_size=32", *short_probe(), steps=1))
    assert cli.model.gpt.config.vocab_size == 256
    with pytest.raises(InputError, match=r"has block_size=32 but .* block_size=16; train with --model\.block_size 32"):
        train.main(arguments(tmp_path, *options, "--model.block_size=16"))


def short_probe():
    return ["--trainer.callbacks=[]"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--data.path=/nowhere.txt"], InputError, r"text file /nowhere\.txt does not exist"),
        (["--data.path=EMPTY"], InputError, "is empty"),
        (["--data.path=LATIN1"], InputError, "is not UTF-8 text: byte 0xe9 at position 3"),
        (["--data.path=SHORT"], InputError, "too short: of its 10 tokens"),
        (["--data.tokenizer=word"], InputError, "tokenizer='word' is not known"),
        (["--model.n_head=3"], InputError, "n_embd=16 is not divisible by n_head=3"),
        (["--model.vocab_size=100"], InputError, r"tokenizer has \d+ tokens but the model knows only vocab_size=100"),
        (["--model.block_size=8"], AttentionMonitorError, r"probe 'text' of shape \(1, \d+\).*block_size=8"),
        (["--ckpt_path=/nowhere.ckpt"], InputError, r"/nowhere\.ckpt does not exist"),
        (["--ckpt_path=EMPTY"], InputError, r"empty\.txt is not a checkpoint"),
        (["--model.init_from=/nowhere"], InputError, r"/nowhere has no config\.json"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, options, error, message):
    files = {"EMPTY": b"", "LATIN1": "café".encode("latin-1"), "SHORT": b"short text"}
    for name, content in files.items():
        (tmp_path / f"{name.lower()}.txt").write_bytes(content)
        options = [option.replace(name, str(tmp_path / f"{name.lower()}.txt")) for option in options]
    with pytest.raises(error, match=message):
        train.main(arguments(tmp_path, "--data.tokenizer=bytes", *options))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_of_another_shape_is_refused_in_one_sentence(tmp_path):
    train.main(arguments(tmp_path, steps=3))
    [checkpoint] = tmp_path.rglob("last.ckpt")
    message = (
        "The checkpoint has n_layer=2, n_embd=16 but the model is configured with n_layer=1, n_embd=32; train with"
    )
    with pytest.raises(InputError, match=message):
        train.main(arguments(tmp_path, f"--ckpt_path={checkpoint}", "--model.n_layer=1", "--model.n_embd=32"))


@pytest.mark.parametrize("options", [["--trainer.callbacks.every_n_steps=0"], ["--trainer.callbacks.statistics=[foo]"]])
def test_bad_monitor_options_are_refused(tmp_path, options):
    option = options[0].replace("--trainer.callbacks.", "").split("=")
    config = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"][option[0]] = yaml.safe_load(option[1])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(AttentionMonitorError, match=r"every_n_steps must be at least 1, got 0|Unknown statistic 'foo'"):
        train.main(["--config", str(path), *arguments(tmp_path)[2:]])


def test_the_command_prints_one_sentence_and_no_traceback(tmp_path):
    environment = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "train.py", *arguments(tmp_path, "--data.path=/nowhere.txt")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "train.py: error: The text file /nowhere.txt does not exist; "
        "give the path of a UTF-8 text file with --data.path."
    )
    assert "Traceback" not in result.stderr


def test_a_misspelt_option_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path, "--model.n_heads=2"))
    assert "n_heads" in capsys.readouterr().err


def test_checkpoints_are_read_without_running_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (print, ("code was run",))

    train.main(arguments(tmp_path, steps=3))
    [checkpoint] = tmp_path.rglob("last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "extra": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights only"):
        train.main(arguments(tmp_path, f"--ckpt_path={tmp_path / 'bad.ckpt'}"))


def test_files_are_written_only_where_the_user_said(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    train.main(arguments(tmp_path / "said", steps=3))
    assert list(elsewhere.iterdir()) == []


def test_a_checkpoint_is_loaded_as_a_module_without_its_data(tmp_path):
    cli = train.main(arguments(tmp_path, steps=3))
    [checkpoint] = tmp_path.rglob("last.ckpt")
    module = type(cli.model).load_from_checkpoint(checkpoint, weights_only=True)
    tokens = torch.randint(100, (1, 10))
    assert isinstance(module, pl.LightningModule)
    torch.testing.assert_close(module.eval()(tokens), cli.model.eval()(tokens))
