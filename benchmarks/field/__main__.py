"""Runs the models and writes the table: ``python -m benchmarks.field [--only timm] [-o table.md]``."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

from .. import machine
from .companions import make_importable
from .expectation import FieldModel
from .models import all_models
from .rows import Row, row_of, summary, table


def main(args: list[str] | None = None) -> list[Row]:
    """Run the models that are asked for and return their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="packages, models or packages.models; * stands for any"
    )
    parser.add_argument("--no-training", action="store_true", help="leave the runs out that compare losses")
    parser.add_argument("-o", "--output", type=Path, help="file for the table")
    options = parser.parse_args(args)

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
    with _alone():
        make_importable()
        for model in models:
            start = time.perf_counter()
            rows.append(row_of(model, with_training=not options.no_training))
            seconds = time.perf_counter() - start
            print(f"{model.package} {model.name}: {rows[-1].verdict} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    written = f"{machine.describe()}\n\n{_versions(models)}\n\n{table(rows)}"
    if options.output:
        options.output.write_text(written)
        print(summary(rows))
    else:
        print(written)
    return rows


@contextmanager
def _alone() -> Iterator[None]:
    """Take sums in one order, so that losses can be compared to the bit, and let no package speak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what capture says is looked at where it is said
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)


def _versions(models: Sequence[FieldModel]) -> str:
    """Name the packages with their versions; those that are not installed without."""
    distributions = packages_distributions()
    names = dict.fromkeys(model.package for model in models)
    known = {name: f"{name} {version(distributions[name][0])}" for name in names if name in distributions}
    return ", ".join(known.get(name, name) for name in names)


if __name__ == "__main__":
    main()
