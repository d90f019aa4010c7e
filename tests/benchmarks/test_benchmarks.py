"""That the benchmarks run; what they measure is for a quiet machine."""

import json
from pathlib import Path

import pytest

from benchmarks import analyze, following, machine, overhead, sampling, statistics, throughput
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


def test_statistics_prints_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    megabytes = {"output_attentions": 50, "capture": 10, "plain": 8, "sdpa": 1, "statistics": 2}
    monkeypatch.setattr(statistics, "_peak_of_a_process", lambda kind, T: megabytes[kind])
    path = tmp_path / "found.json"
    options = ["--lengths", "16", "32", "--long=16", "--model-length=16", "--rounds=1", f"--output={path}"]
    result = statistics.main(options)
    assert [row["T"] for row in result["call"]] == [16, 32]
    assert all(row["ratio"] > 0 for row in result["call"])
    assert result["model"]["times_less_memory"] == 21
    assert result["model"]["largest_difference"] < 1e-5  # both ways find the same
    assert json.loads(path.read_text()) == result
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is taken from Linux's /proc")
def test_the_memory_of_a_call_is_taken_in_a_process_of_its_own():
    assert 0 <= statistics._peak_of_a_process("statistics", 256) < 64


def test_sampling_compares_with_the_whole_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "N_STORIES", 300)
    small = ["--model.n_layer=1", "--model.n_embd=16", "--data.batch_size=4", f"--data.cache_dir={tmp_path}"]
    config = str(ROOT / "configs/tiny.yaml")
    found = sampling.main(["--config", config, "--steps=1", "--batches=2", *small])
    assert list(found) == ["1 sequence", "2 sequences", "4 sequences", "1 sequence, 64 of its 128 rows"]
    assert set(found["4 sequences"].values()) == {0.0}  # that is the whole batch
    assert found["1 sequence"]["max_weight 0.95"] > 0
    assert "4 x 128" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["torch", "Python", "threads"])
def test_the_machine_is_described(word):
    assert word in machine.describe()


def test_analyze(capsys):
    found = analyze.main(["--layers", "1", "--heads", "2", "--width", "8", "--rounds", "1"])
    assert 0 < found["start"] < found["all"]
    assert "1 layers of 2 heads, 60 tokens, all pictures" in capsys.readouterr().out


def test_following_prints_what_it_costs(capsys):
    result = following.main(["--layers=1", "--width=64", "--tokens=8", "--sequences=1", "--pairs=3"])
    assert result["forward_ms"] > 0
    assert "following it costs" in capsys.readouterr().out
