"""What following where tensors and their axes come from costs a forward: ``python -m benchmarks.following``.

The same training forward, in turns plain and inside a Capture that is handed every attention call and does nothing with
it: what is left is the function mode, the origins of tensors, and what their axes are made of. No statistics.
"""

import argparse
import statistics
import time

import torch

from attention_monitor.capturing.capture_mode import Capture
from benchmarks import machine
from gpt.model import GPT, GPTConfig


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure, print and return what is printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args(argv)
    config = GPTConfig(
        vocab_size=256, block_size=options.tokens, n_layer=options.layers, n_head=options.width // 64 or 1,
        n_embd=options.width,
    )  # fmt: skip
    model, tokens = GPT(config), torch.randint(256, (options.sequences, options.tokens))
    model(tokens)
    plain, followed = [], []
    for _ in range(options.pairs):
        plain.append(_seconds(model, tokens))
        with Capture(model, lambda call: None):
            followed.append(_seconds(model, tokens))
    extra = [after - before for before, after in zip(plain, followed, strict=True)]
    result = {
        "forward_ms": 1e3 * statistics.median(plain),
        "extra_ms": 1e3 * statistics.median(extra),
        "ratio": statistics.median(after / before for before, after in zip(plain, followed, strict=True)),
    }
    print(machine.describe())
    print(f"GPT, {options.layers} layers of {options.width}, {options.sequences} x {options.tokens} tokens, training")
    print(f"forward, median of {options.pairs}: {result['forward_ms']:.1f} ms")
    print(f"following it costs {result['extra_ms']:.1f} ms more; ratio {result['ratio']:.3f}")
    return result


def _seconds(model: GPT, tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    model(tokens)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
