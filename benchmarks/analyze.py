"""How long analyze.py takes: ``python -m benchmarks.analyze``.

1. Until it has started: it is given a checkpoint that does not exist, which is the first thing that it looks at.
2. All of it, for an untrained model of 12 layers of 12 heads, 768 wide, that reads 60 tokens: every picture is drawn.

Medians of whole processes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine

SCRIPT = Path(__file__).parents[1] / "analyze.py"
TEXT = "The cat sat on the mat. It was fluffy. The dog barked at it."  # of 60 bytes, which are tokens


def seconds(*options: str, code: int = 0) -> float:
    """Of a process that ends with that exit code."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, str(SCRIPT), *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return time.perf_counter() - start


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(args)
    shape = ["--n-layer", options.layers, "--n-head", options.heads, "--n-embd", options.width]
    found: dict[str, list[float]] = {"start": [], "all": []}
    for _ in range(options.rounds):
        found["start"].append(seconds("--checkpoint", "nothing.ckpt", "--text", TEXT, code=1))
        found["all"].append(seconds(*map(str, shape), "--text", TEXT))
    result = {name: statistics.median(times) for name, times in found.items()}
    print(machine.describe())
    print(f"started after {result['start']:.1f} s (goal: under 5)")
    print(
        f"{options.layers} layers of {options.heads} heads, {len(TEXT)} tokens, all pictures: {result['all']:.1f} s "
        "(goal: under 60)"
    )
    return result


if __name__ == "__main__":
    main()
