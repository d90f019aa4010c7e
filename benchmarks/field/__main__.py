"""Runs the models and writes the table: ``python -m benchmarks.field [--only timm] [-o table.md]``."""

import argparse
import logging
import os
import sys
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path

import torch

from .. import machine
from .models import all_models
from .rows import Row, row_of, summary, table
from .torchvision_operators import make_importable


def main(args: list[str] | None = None) -> list[Row]:
    """Run the models that are asked for and return their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="packages, models or packages.models; * stands for any"
    )
    parser.add_argument("--no-training", action="store_true", help="leave the runs out that compare losses")
    parser.add_argument("-o", "--output", type=Path, help="file for the table")
    options = parser.parse_args(args)

    torch.set_num_threads(1)  # sums are taken in one order, so that losses can be compared to the bit
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_importable()
    warnings.filterwarnings("ignore")  # of the packages; what capture says is looked at where it is said
    logging.disable()
    models = [
        model
        for model in all_models()
        if any(
            fnmatch(f"{model.package}.{model.name}", f"{only}*") or fnmatch(model.name, only) for only in options.only
        )
    ]
    if not models:
        parser.error(f"no model matches --only {' '.join(options.only)}")
    rows = []
    for model in models:
        start = time.perf_counter()
        rows.append(row_of(model, with_training=not options.no_training))
        seconds = time.perf_counter() - start
        print(f"{model.package} {model.name}: {rows[-1].verdict} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    written = f"{machine.describe()}\n\n{table(rows)}"
    if options.output:
        options.output.write_text(written)
        print(summary(rows))
    else:
        print(written)
    return rows


if __name__ == "__main__":
    main()
