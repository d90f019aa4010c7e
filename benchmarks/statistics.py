"""What statistics cost beside attention itself: ``python -m benchmarks.statistics``.

1. The default statistics of a causal call against fused attention (scaled_dot_product_attention, forward) of the same
   queries, keys and values.
2. The most memory that a call takes beyond what was there before, at a long context.
3. Where there is a GPU: all quantities of rows by the Triton kernel against flash attention, forward, in bfloat16.
4. Looking at a whole model, GPT-2 small of transformers: entropy, diagonal and collapse by capture, against the usual
   way: eager attention, ``output_attentions=True``, and the same three numbers computed from what it returns.

Times are taken in turns in one process: medians, and their ratios. Memory is taken in a process for each, as the peak
of what the operating system gave it (Linux).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_monitor import AttentionCall, summarize
from benchmarks import machine

HEADS, HEAD_DIM = 12, 64  # of GPT-2 small
THREE = ["entropy", "diagonal_mean", "collapse_fraction"]


def qkv(T: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys, values (1, H, T, D), laid out as a model makes them."""
    generator = torch.Generator().manual_seed(T)
    made = (torch.randn(1, T, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def take(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return summarize(AttentionCall("attention", q, k, is_causal=True, scale=HEAD_DIM**-0.5, value=v))


def gpt2(T: int, attention: str) -> tuple[nn.Module, Tensor]:
    """GPT-2 small without its output layer, and token ids (1, T)."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 1024, "n_positions": T, "attn_implementation": attention}
    return GPT2Model(GPT2Config(**options)).eval(), torch.randint(1024, (1, T))


def plain(model: nn.Module, tokens: Tensor) -> None:
    model(tokens)


def captured(model: nn.Module, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Take statistics as the monitor does: each call is summarized and forgotten."""
    from attention_monitor.monitoring.measuring import Measurement
    from attention_monitor.statistics.catalogue import resolve_statistics

    with Measurement(model, resolve_statistics(THREE)) as measurement:
        model(tokens)
    return [site.totals.values() for site in measurement.sites.values()]


def output_attentions(model: nn.Module, tokens: Tensor) -> list[dict[str, Tensor]]:
    """The usual way."""
    values = []
    for pattern in model(tokens, output_attentions=True).attentions:  # (B, H, T, T)
        entropy = torch.special.entr(pattern).sum(-1)
        collapsed = (pattern.amax(-1) > 0.95).float()
        diagonal = pattern.diagonal(dim1=-2, dim2=-1)
        # without row 0, which can only be 1 at one place
        rows = {"entropy": entropy, "diagonal_mean": diagonal, "collapse_fraction": collapsed}
        values.append({name: row[:, :, 1:].mean((0, 2)) for name, row in rows.items()})
    return values


WAYS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Any]]] = {
    "plain": ("sdpa", plain),
    "capture": ("sdpa", captured),
    "output_attentions": ("eager", output_attentions),
}


def times(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns; the first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _peak(kind: str, T: int, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if kind in WAYS:
        attention, way = WAYS[kind]
        model, tokens = gpt2(T, attention)

        def work(n: int) -> None:
            way(model, tokens[:, :n])
    else:
        tensors, function = qkv(T), {"sdpa": attend, "statistics": take}[kind]

        def work(n: int) -> None:
            function(*(x[:, :, :n] for x in tensors))

    work(16)  # what is loaded and set up once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _megabytes("VmRSS")
    work(T)
    answer.send(_megabytes("VmHWM") - before)


def _megabytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(kind: str, T: int) -> float:
    """Megabytes that a process of its own takes beyond what it had, median of three processes."""
    # what is freed goes back at once: otherwise the C library's habits decide, by 100 MB this way or that
    os.environ.update(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    return statistics.median(_peak_of_a_process(kind, T) for _ in range(3))


def _peak_of_a_process(kind: str, T: int) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(kind, T, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        process.join()


@torch.no_grad()
def measure(lengths: list[int], long: int, model_length: int, rounds: int) -> dict[str, Any]:
    """All figures, by name."""
    result: dict[str, Any] = {"machine": machine.describe(), "rounds": rounds, "heads": HEADS, "head_dim": HEAD_DIM}
    result["call"] = []
    for T in lengths:
        tensors = qkv(T)
        taken = times({"sdpa": partial(attend, *tensors), "ours": partial(take, *tensors)}, rounds)
        row = {"T": T, "sdpa_ms": 1000 * taken["sdpa"], "statistics_ms": 1000 * taken["ours"]}
        result["call"].append(row | {"ratio": taken["ours"] / taken["sdpa"]})
    result["gpu"] = measure_gpu([2048, 4096, 8192, 16384]) if torch.cuda.is_available() else []
    first, last = result["call"][0], result["call"][-1]
    result["growth"] = {
        "sdpa": last["sdpa_ms"] / first["sdpa_ms"],
        "statistics": last["statistics_ms"] / first["statistics_ms"],
    }
    result["memory"] = {"T": long, "sdpa_mb": peak("sdpa", long), "statistics_mb": peak("statistics", long)}

    models = {attention: gpt2(model_length, attention) for attention in ("sdpa", "eager")}
    taken = times({name: partial(way, *models[kind]) for name, (kind, way) in WAYS.items()}, max(1, rounds // 3))
    found, usual = captured(*models["sdpa"]), output_attentions(*models["eager"])
    difference = max(float((a[n] - b[n]).abs().max()) for a, b in zip(found, usual, strict=True) for n in THREE)
    models.clear()
    memory = {name: peak(name, model_length) for name in WAYS}
    extra = {name: 1000 * (taken[name] - taken["plain"]) for name in ("capture", "output_attentions")}
    more = {name: memory[name] - memory["plain"] for name in extra}
    result["model"] = {
        "T": model_length,
        "plain_ms": 1000 * taken["plain"],
        "extra_ms": extra,
        "times_less_time": extra["output_attentions"] / extra["capture"],
        "plain_mb": memory["plain"],
        "extra_mb": more,
        "times_less_memory": more["output_attentions"] / max(1.0, more["capture"]),
        "largest_difference": difference,
    }
    return result


def measure_gpu(lengths: list[int]) -> list[dict[str, float]]:
    """The kernel against flash attention, bfloat16, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.testing import do_bench

    from attention_monitor.statistics import kernel

    rows = []
    for T in lengths:
        q, k, v = qkv(T, "cuda", torch.bfloat16)
        call = AttentionCall("attention", q, k, is_causal=True, scale=HEAD_DIM**-0.5)
        row = torch.arange(T, device="cuda")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = do_bench(partial(attend, q, k, v), return_mode="median")
        ours = do_bench(partial(kernel.rows_of, call, row), return_mode="median")
        rows.append({"T": T, "sdpa_ms": flash, "statistics_ms": ours, "ratio": ours / flash})
    return rows


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"{result['machine']}; {result['heads']} heads x {result['head_dim']}, float32, causal, one sequence", ""]
    lines += [
        "| T | fused attention, forward | default statistics | ratio (goal 2.0, stretch 1.5) |",
        "|---|---|---|---|",
    ]
    for row in result["call"]:
        lines.append(f"| {row['T']} | {row['sdpa_ms']:.1f} ms | {row['statistics_ms']:.1f} ms | {row['ratio']:.2f} |")
    if result["gpu"]:
        lines += [
            "",
            "| T, bfloat16 on the GPU | flash attention, forward | kernel | ratio (goal 1.0) |",
            "|---|---|---|---|",
        ]
        for row in result["gpu"]:
            lines.append(
                f"| {row['T']} | {row['sdpa_ms']:.2f} ms | {row['statistics_ms']:.2f} ms | {row['ratio']:.2f} |"
            )
    growth, memory, model = result["growth"], result["memory"], result["model"]
    lines += [
        "",
        f"From the shortest to the longest: fused attention x {growth['sdpa']:.1f}, statistics x "
        f"{growth['statistics']:.1f} (goal: no steeper).",
        f"Peak extra memory at T = {memory['T']}: {memory['statistics_mb']:.0f} MB (goal 64; fused attention itself "
        f"{memory['sdpa_mb']:.0f} MB).",
        "",
        f"GPT-2 small at T = {model['T']}, plain forward {model['plain_ms']:.0f} ms; entropy, diagonal, collapse:",
        "",
        "| | capture | output_attentions | times less | goal |",
        "|---|---|---|---|---|",
        f"| time over the plain forward | {model['extra_ms']['capture']:.0f} ms | "
        f"{model['extra_ms']['output_attentions']:.0f} ms | {model['times_less_time']:.1f} | 3 |",
        f"| memory over the plain forward | {model['extra_mb']['capture']:.0f} MB | "
        f"{model['extra_mb']['output_attentions']:.0f} MB | {model['times_less_memory']:.0f} | 20 |",
        "",
        f"Largest difference between the two: {model['largest_difference']:.1e}.",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--long", type=int, default=8192, help="context at which memory is taken")
    parser.add_argument("--model-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to, and a .md beside it")
    options = parser.parse_args(args)
    result = measure(options.lengths, options.long, options.model_length, options.rounds)
    print(table(result))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(table(result) + "\n")
    return result


if __name__ == "__main__":
    main()
