"""How far statistics of a part of the batch are from those of all of it: ``python -m benchmarks.sampling``.

Trains a config for a while, then takes the default statistics of every head from whole batches and from their first
sequences, or from some rows of each sequence, as ``max_sequences`` and ``max_tokens`` do. What is reported is the
absolute difference: the median and the 95th percentile over heads and batches.
"""

import argparse
import tempfile

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attention_monitor import AttentionMonitor
from attention_monitor.monitoring.measuring import Measurement
from attention_monitor.statistics.catalogue import DEFAULT_STATISTICS, resolve_statistics
from benchmarks import machine
from train import make_cli

BOUNDED = [name for name in DEFAULT_STATISTICS if name not in ("entropy", "max_score", "nonfinite_fraction")]  # 0..1


@torch.no_grad()
def take(
    model: torch.nn.Module, tokens: Tensor, max_sequences: int | None = None, max_tokens: int | None = None
) -> Tensor:
    """Take statistics of a batch, (statistics, layers, H)."""
    statistics = resolve_statistics(BOUNDED)
    with Measurement(model, statistics, max_sequences=max_sequences, max_tokens=max_tokens) as measurement:
        model(tokens)
    values = [site.totals.values() for site in measurement.sites.values()]
    return torch.stack([torch.stack([layer[name] for layer in values]) for name in BOUNDED])


def main(args: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--steps", type=int, default=300, help="of training before")
    parser.add_argument("--batches", type=int, default=10)
    options, overrides = parser.parse_known_args(args)
    with tempfile.TemporaryDirectory() as folder:
        cli = make_cli(
            ["--config", options.config, "--trainer.logger.init_args.save_dir", folder]
            + [f"--trainer.max_steps={options.steps}", "--trainer.limit_val_batches=0"]
            + ["--trainer.enable_progress_bar=false", *overrides]
        )
        callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
        cli.trainer.callbacks = [c for c in callbacks if not isinstance(c, AttentionMonitor)]  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, cli.datamodule)
    model, loader = cli.model.eval(), iter(cli.datamodule.train_dataloader())
    batches = [next(loader)[0] for _ in range(options.batches)]
    B, T = batches[0].shape
    extents: dict[str, dict[str, int]] = {
        f"{n} sequence{'s' * (n > 1)}": {"max_sequences": n} for n in (1, 2, 4, 8) if n <= B
    }
    extents[f"1 sequence, {T // 2} of its {T} rows"] = {"max_sequences": 1, "max_tokens": T // 2}
    found: dict[str, dict[str, float]] = {}
    for name, extent in extents.items():
        differences = [(take(model, batch, **extent) - take(model, batch)).abs() for batch in batches]
        difference = torch.stack(differences).transpose(0, 1).flatten(1)  # (statistics, batches x heads)
        rows = dict(zip(BOUNDED, difference.tolist(), strict=True))
        found[name] = {
            f"{stat} {q}": float(torch.tensor(values).nanquantile(q))
            for stat, values in rows.items()
            for q in (0.5, 0.95)
        }
    console = Console(width=140)
    table = Table(title=f"Difference to the whole batch of {B} x {T}, after {options.steps} steps: median, 95%")
    for column in ("looked at", *BOUNDED):
        table.add_column(column)
    for name, values in found.items():
        table.add_row(name, *(f"{values[f'{stat} 0.5']:.3f} {values[f'{stat} 0.95']:.3f}" for stat in BOUNDED))
    console.print(machine.describe())
    console.print(table)
    return found


if __name__ == "__main__":
    main()
