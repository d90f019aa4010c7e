"""Induction heads form in a phase change, given two layers: ``python -m experiments.induction``.

Olsson et al. 2022, "In-context learning and induction heads". A model of attention alone reads blocks of random tokens
that repeat: what comes next can only be known by finding the earlier occurrence of a token and what followed it.
That takes two layers, one in which tokens learn what stands before them, and one that looks for that. With two, loss on
repeats falls from chance within a few hundred steps, just when the induction score of heads in the second layer rises;
with one, neither happens. The length of the block is drawn for each sequence: with a fixed length a model gets away
with always looking the same distance back.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from attention_monitor import AttentionRecorder, RepeatedTokensProbe, Snapshot
from attention_monitor.naming import head_name
from benchmarks import machine

VOCAB, BOS, T = 64, 64, 101
WIDTH, HEADS = 64, 4
BATCH, LEARNING_RATE, WEIGHT_DECAY = 32, 3e-3, 0.01
PROBE = RepeatedTokensProbe(VOCAB, bos=BOS)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(z.transpose(1, 2).flatten(2))


class AttentionOnly(nn.Module):
    """Layers of attention, nothing else: no MLPs."""

    def __init__(self, n_layer: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB + 1, WIDTH), nn.Embedding(T, WIDTH)
        self.layers = nn.Sequential(*(Attention() for _ in range(n_layer)))
        self.norm, self.unembed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, VOCAB)
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.unembed(self.norm(self.layers(x)))


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), and which positions (B, T - 1) have a next token that can be known."""
    position = torch.arange(T - 1)
    length = torch.randint(10, 41, (BATCH, 1), generator=generator)
    blocks = torch.randint(VOCAB, (BATCH, 40), generator=generator)
    tokens = torch.cat([torch.full((BATCH, 1), BOS), blocks.gather(1, position % length)], dim=1)
    # position 1 + length is the first of the second block: from there on, the next token has been seen after this one
    return tokens, position > length


@dataclass
class Run:
    """What was seen of a model: at each sampled step the loss on repeats, in nats, and the score of each head."""

    n_layer: int
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    scores: dict[str, list[list[list[float]]]] = field(default_factory=dict)  # name -> step -> layer -> head
    roles: dict[str, dict[str, int]] = field(default_factory=dict)  # head -> role -> step

    def keep(self, step: int, loss: float, snapshot: Snapshot) -> None:
        self.steps.append(step)
        self.loss.append(loss)
        for score in snapshot.scores:
            values = [values[score.name].tolist() for values in snapshot.values]
            self.scores.setdefault(score.name, []).append(values)

    def best(self, name: str, at: int = -1) -> tuple[float, str]:
        """The largest score of a head at a sample, and the head."""
        return max(
            (value, head_name(layer, head))
            for layer, heads in enumerate(self.scores[name][at])
            for head, value in enumerate(heads)
        )


def train(n_layer: int, n_steps: int, every: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model, run = AttentionOnly(n_layer), Run(n_layer)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    with AttentionRecorder(model, every, PROBE) as recorder:
        for step in track(range(n_steps), f"{n_layer} layer{'s' * (n_layer > 1)}"):
            tokens, known = draw(generator)
            with recorder.step(step):
                losses = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            if step % every == 0:
                run.keep(step, losses[known].mean().item(), recorder.snapshots[PROBE.name])
                run.roles = recorder.roles
    return run


def figure(runs: list[Run]) -> Figure:
    """Loss on repeats above, induction score of every head below; a column for each model."""
    picture = Figure(figsize=(5 * len(runs), 6), layout="constrained")
    axes = picture.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for column, run in enumerate(runs):
        top, bottom = axes[:, column]
        top.set_title(f"{run.n_layer} layer{'s' * (run.n_layer > 1)} of attention")
        top.plot(run.steps, run.loss, color="black")
        top.axhline(torch.tensor(VOCAB).log().item(), color="grey", linestyle=":", label="chance, ln 64")
        for layer in range(run.n_layer):
            for head in range(HEADS):
                scores = [sample[layer][head] for sample in run.scores["induction"]]
                label = f"layer {layer}" if head == 0 else None
                bottom.plot(run.steps, scores, color=f"C{layer}", alpha=0.8, label=label)
        bottom.set(ylim=(0, 1), xlabel="step")
        bottom.legend(loc="upper left")
    axes[0, 0].set(ylabel="loss on repeats (nats)", ylim=(0, None))
    axes[0, 0].legend(loc="lower left")
    axes[1, 0].set_ylabel("induction score of each head")
    return picture


def main(args: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=10, help="steps from one sample to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/induction"), help="folder for figure and numbers")
    options = parser.parse_args(args)

    start = time.perf_counter()
    runs = [train(n_layer, options.steps, options.every, options.seed) for n_layer in (2, 1)]
    seconds = time.perf_counter() - start
    for run in runs:
        first, last = run.best("induction", 0), run.best("induction")
        since = {f"{head} at step {taken['induction']}" for head, taken in run.roles.items() if "induction" in taken}
        print(
            f"{run.n_layer} layer(s): loss on repeats {run.loss[0]:.2f} -> {run.loss[-1]:.2f} nats; best induction "
            f"score {first[0]:.2f} -> {last[0]:.2f} ({last[1]}); best previous-token score "
            f"{run.best('previous_token')[0]:.2f} ({run.best('previous_token')[1]}); induction heads: "
            f"{', '.join(sorted(since)) or 'none'}"
        )
    print(f"{seconds:.0f} s on {machine.describe()}")
    options.output.mkdir(parents=True, exist_ok=True)
    figure(runs).savefig(options.output / "induction.png", dpi=100)
    numbers = {
        "machine": machine.describe(),
        "seconds": seconds,
        "options": {"steps": options.steps, "seed": options.seed},
    }
    (options.output / "induction.json").write_text(json.dumps(numbers | {"runs": [asdict(run) for run in runs]}))
    print(f"See {options.output / 'induction.png'}")
    return runs


if __name__ == "__main__":
    main()
