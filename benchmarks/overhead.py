"""What the monitor costs a training run: ``python -m benchmarks.overhead``.

One training run, in which the monitor is switched on and off in turns for BLOCK steps; each block with it begins with a
sampled step and ends when everything is drawn and written. The time of a step runs from the end of the step before to
its own end, so what happens between steps counts too. What a whole run costs follows from what a block costs more than
the block before it, since between two samples no more happens than in a block. (Timing runs of every_n_steps steps
against each other instead gave ratios from 0.92 to 1.13 on a shared machine: it drifts more in that time.)
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import pytorch_lightning as pl

from attention_monitor import AttentionMonitor
from benchmarks import machine
from train import make_cli

BLOCK = 10


class Switch(pl.Callback):
    """Passes a training run's hooks on to the monitor in every other block."""

    def __init__(self, monitor: AttentionMonitor) -> None:
        self.monitor = monitor
        self.seconds: list[list[float]] = []  # of each step, for each block: off, on, off, on ...
        self._last = 0.0

    @property
    def on(self) -> bool:
        return len(self.seconds) % 2 == 0

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.monitor.setup(*args, **kwargs)

    def on_fit_start(self, *args: Any) -> None:
        self.monitor.on_fit_start(*args)

    def on_train_start(self, *args: Any) -> None:
        self.monitor.on_train_start(*args)
        self._last = time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.seconds or len(self.seconds[-1]) == BLOCK:
            self.seconds.append([])
        if self.on:
            self.monitor.on_train_batch_start(*args)

    def on_before_backward(self, *args: Any) -> None:
        if self.on:
            self.monitor.on_before_backward(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        block = self.seconds[-1]
        if self.on:
            self.monitor.on_train_batch_end(*args)
            if len(block) == BLOCK - 1:
                self.monitor.flush()
        now = time.perf_counter()
        block.append(now - self._last)
        self._last = now

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.monitor.teardown(*args, **kwargs)


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--pairs", type=int, default=40, help="blocks without the monitor, and with it")
    options, overrides = parser.parse_known_args(args)
    if options.pairs < 3:
        parser.error(f"--pairs must be at least 3, got {options.pairs}")

    with tempfile.TemporaryDirectory() as folder:
        cli = make_cli(
            ["--config", options.config, "--trainer.logger.init_args.save_dir", folder]
            # one step more than is looked at: the last one is always sampled
            + [f"--trainer.max_steps={2 * BLOCK * options.pairs + 1}"]
            + ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", *overrides]
        )
        [monitor] = [callback for callback in cli.trainer.callbacks if isinstance(callback, AttentionMonitor)]  # type: ignore[attr-defined]
        every, monitor.every_n_steps = monitor.every_n_steps, BLOCK
        switch = Switch(monitor)
        cli.trainer.callbacks = [switch]  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, cli.datamodule)

    # without the first step of all, which every program is slow at
    pairs = list(zip(switch.seconds[:-1:2], switch.seconds[1::2], strict=True))
    step = statistics.median([s for plain, _ in pairs for s in plain][1:])
    unsampled = [statistics.median(on[1:]) / statistics.median(off[1:]) for off, on in pairs]
    sampled = [(on[0] - statistics.median(off[1:])) / statistics.median(off[1:]) for off, on in pairs]
    extra = [(sum(on) - sum(off)) / statistics.median(off[1:]) for off, on in pairs[1:]]  # in steps
    result = {
        "step_ms": 1000 * step,
        "unsampled_ratio": statistics.median(unsampled),
        "sampled_cost_in_steps": statistics.median(sampled),
        "extra_in_steps": statistics.median(extra),
        "run_ratio": 1 + statistics.median(extra) / every,
    }
    print(f"{options.config}, {len(pairs)} pairs of blocks of {BLOCK} steps")
    print(machine.describe())
    print(f"median step without the monitor         {result['step_ms']:.1f} ms")
    print(f"unsampled step, monitored / not         {result['unsampled_ratio']:.3f}   goal 1.00")
    print(f"cost of a sampled step, in steps        {result['sampled_cost_in_steps']:.2f}    goal <= 0.3")
    low, _, high = statistics.quantiles(extra, n=4)
    print(
        f"  with its drawing and writing          {result['extra_in_steps']:.2f}    (quartiles {low:.2f} .. {high:.2f})"
    )
    print(f"whole run, a sample every {every:4} steps   {result['run_ratio']:.3f}   goal <= 1.02")
    return result


if __name__ == "__main__":
    main()
