"""That the benchmarks run; what they measure is for a quiet machine."""

from pathlib import Path

import pytest

from benchmarks import machine, overhead, throughput
from gpt import data

ROOT = Path(__file__).parents[2]


def test_overhead_prints_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "N_STORIES", 300)
    small = ["--model.n_layer=1", "--model.n_embd=16", "--data.batch_size=2", f"--data.cache_dir={tmp_path}"]
    config = str(ROOT / "configs/tiny.yaml")
    result = overhead.main(["--config", config, "--pairs=3", *small])
    printed = capsys.readouterr().out
    assert all(value > 0 for name, value in result.items() if name in ("step_ms", "unsampled_ratio", "run_ratio"))
    assert "cost of a sampled step" in printed
    assert "a sample every   50 steps" in printed


def test_overhead_shows_the_monitor_every_other_block_and_samples_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "N_STORIES", 300)
    shown = []
    original = overhead.AttentionMonitor.on_train_batch_start

    def spy(self, trainer, *args):
        original(self, trainer, *args)
        shown.append((trainer.global_step, self._sampling))

    monkeypatch.setattr(overhead.AttentionMonitor, "on_train_batch_start", spy)
    small = ["--model.n_layer=1", "--model.n_embd=16", "--data.batch_size=2", f"--data.cache_dir={tmp_path}"]
    overhead.main(["--config", str(ROOT / "configs/tiny.yaml"), "--pairs=3", *small])
    blocks = [*range(10, 20), *range(30, 40), *range(50, 60)]
    assert [step for step, _ in shown] == blocks  # and not the step that ends the run
    assert [step for step, sampled in shown if sampled] == [10, 30, 50]


def test_throughput_prints_its_ratio(capsys):
    result = throughput.main(["--n_layer=1", "--n_embd=16", "--batch_size=2", "--block_size=8", "--steps=4"])
    assert result["ratio"] > 0
    assert f"{result['ratio']:.2f}x" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["torch", "Python", "threads"])
def test_the_machine_is_described(word):
    assert word in machine.describe()
