"""Training speed of gpt/ against transformers' GPT2LMHeadModel: ``python -m benchmarks.throughput``.

The same shape, the same batches, the same optimizer, scaled_dot_product_attention in both; steps in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from gpt.model import GPT, GPTConfig


def make_ours(shape: dict[str, int]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = GPT(GPTConfig(**shape))  # type: ignore[arg-type]
    return model, model


def make_theirs(shape: dict[str, int]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions" if name == "block_size" else name: size for name, size in shape.items()}
    rates: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**shape, **rates, **settings)  # type: ignore[arg-type]
    model = GPT2LMHeadModel(config)
    model.config.use_cache = False  # not needed to train
    return model, lambda tokens: model(tokens).logits


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="of each model, after 5 to warm up")
    options = parser.parse_args(args)
    shape = {name: getattr(options, name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}

    torch.manual_seed(0)
    contenders = {}
    for name, make in (("gpt", make_ours), ("transformers", make_theirs)):
        model, forward = make(shape)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        contenders[name] = (model, forward, optimizer)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, (model, _, _) in contenders.items()}
    assert len(set(sizes.values())) == 1, f"not the same shape: {sizes}"

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(options.steps + 5):
        tokens = torch.randint(options.vocab_size, (options.batch_size, options.block_size + 1))  # (B, T + 1)
        order = list(contenders) if step % 2 == 0 else list(contenders)[::-1]
        for name in order:
            _, forward, optimizer = contenders[name]
            start = time.perf_counter()
            loss = F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 5:
                seconds[name].append(time.perf_counter() - start)

    n_tokens = options.batch_size * options.block_size
    speed = {name: n_tokens / statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(t / o for o, t in zip(seconds["gpt"], seconds["transformers"], strict=True))
    print(f"{sizes['gpt']:,} parameters, {shape}, batch {options.batch_size}, {options.steps} steps of each")
    print(machine.describe())
    for name, tokens_per_second in speed.items():
        print(f"{name:13} {tokens_per_second:,.0f} tokens per second")
    print(f"gpt / transformers, median over pairs of steps: {ratio:.2f}x   goal >= 1.0x")
    return {"gpt": speed["gpt"], "transformers": speed["transformers"], "ratio": ratio}


if __name__ == "__main__":
    main()
