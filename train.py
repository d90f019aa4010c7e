"""Train a small GPT and watch its heads: ``python train.py --config configs/tiny.yaml``."""

import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from attention_monitor import (
    AttentionMonitor,
    AttentionMonitorError,
    RelationProbe,
    capture,
    ranking,
    run_probe,
    summarize,
)
from attention_monitor.analysis import rank_heads
from attention_monitor.naming import head_name
from gpt import InputError
from gpt.data import TextDataModule
from gpt.module import GPTModule
from gpt.stories import annotated_stories

HELD_OUT_STORIES = 200


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint of a run to go on with.")
        parser.link_arguments("model.block_size", "data.block_size")


def make_cli(args: Sequence[str] | None = None) -> CLI:
    """Model, data and trainer as the command line (``args``, or else the process's own) says."""
    # windows are read from memory-mapped tokens: worker processes would only cost
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # torch's, about Lightning
    try:
        return CLI(
            GPTModule,
            TextDataModule,
            run=False,
            seed_everything_default=1337,
            save_config_kwargs={"overwrite": True},
            args=None if args is None else list(args),
        )
    except ValueError as error:  # jsonargparse buries what a callback says of its options
        if isinstance(error.__cause__, AttentionMonitorError):
            raise error.__cause__ from None
        raise


def main(args: Sequence[str] | None = None) -> CLI:
    """Train as the command line says, then say what the heads have become."""
    cli = make_cli(args)
    ckpt_path = cli.config["ckpt_path"]
    if ckpt_path is not None and not zipfile.is_zipfile(ckpt_path):
        what = "is not a checkpoint" if Path(ckpt_path).exists() else "does not exist"
        raise InputError(f"{ckpt_path} {what}; give the path of a .ckpt file from an earlier run to --ckpt_path.")
    if watches_relations(cli):
        relations = RelationProbe(annotated_stories(40), max_tokens=cli.model.hparams["block_size"], every=4)
        for monitor in monitors(cli):
            monitor.probe.append(relations)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path, weights_only=True)
    if cli.trainer.is_global_zero and not cli.trainer.interrupted:
        report(cli, Console())
    return cli


def watches_relations(cli: CLI) -> bool:
    """It reads the stories, and enough of one that words refer to others."""
    return cli.datamodule.uses_stories and cli.model.hparams["block_size"] >= 32


def monitors(cli: CLI) -> list[AttentionMonitor]:
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, AttentionMonitor)]


def report(cli: CLI, console: Console) -> None:
    """Print validation loss, what the heads have become, and how to look at them."""
    if cli.model.validated_step != cli.trainer.global_step and cli.trainer.limit_val_batches:
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    validation_loss = cli.trainer.callback_metrics.get("val/loss")
    if validation_loss is not None:
        console.print(f"\nValidation loss: {validation_loss:.4f} nats per token")
    for monitor in monitors(cli):
        if monitor.first and monitor.latest and "normalized_entropy" in monitor.statistics:
            before, after = (s.mean("normalized_entropy") for s in (monitor.first, monitor.latest))
            steps = f"step {monitor.first.step} to {monitor.latest.step}"
            console.print(f"Mean normalized entropy of all heads: {before:.3f} -> {after:.3f} ({steps})")
        if monitor.roles:
            console.print(role_table(monitor.roles))
    if watches_relations(cli):
        console.print(relation_table(cli.model, cli.datamodule))
    console.print(head_table(cli.model, cli.datamodule))
    if cli.trainer.loggers and cli.trainer.log_dir is not None:
        # TensorBoard keeps ten pictures of a kind unless told otherwise
        command = f"tensorboard --logdir {cli.trainer.log_dir} --samples_per_plugin images=100"
        console.print(f"See the heads:  {command}", soft_wrap=True)


def role_table(roles: dict[str, dict[str, int]]) -> Table:
    """Which heads do what, and the step at which that was first seen."""
    table = Table(title="Roles of heads", title_justify="left")
    for column in ("head", "roles, with the step at which each was first seen"):
        table.add_column(column)
    for head, taken in roles.items():
        table.add_row(head, ", ".join(f"{role} ({step})" for role, step in taken.items()))
    return table


def relation_table(model: GPTModule, data: TextDataModule) -> Table:
    """The best head for each relation of the embedded stories, on stories that were not trained on."""
    table = Table(title=f"Relations, on {HELD_OUT_STORIES} stories not trained on", title_justify="left")
    for column in ("relation", "pairs", "best head", "accuracy", "best fixed offset"):
        table.add_column(column, justify="left" if column in ("relation", "best head") else "right")
    probe = RelationProbe(annotated_stories(HELD_OUT_STORIES), max_tokens=model.hparams["block_size"])
    snapshot = run_probe(model, probe, data.tokenizer)
    for score in snapshot.scores:
        layer, head, accuracy = ranking(snapshot, score.name)[0]
        offset = f"{score.baseline:.2f} ({score.offset})"
        table.add_row(score.name, str(score.n), head_name(layer, head), f"{accuracy:.2f}", offset)
    return table


def head_table(model: GPTModule, data: TextDataModule) -> Table:
    """The heads that look most at the previous and at the first token, on the first validation windows."""
    tokens, _ = next(iter(data.val_dataloader()))  # (B, T)
    values = [summarize(call, ["previous_token", "first_token"]) for call in run(model, tokens[:4])]
    table = Table(title="Heads by position, mean weight on validation text", title_justify="left")
    for column in ("looks at", "best head", "weight"):
        table.add_column(column, justify="right" if column == "weight" else "left")
    for name, what in (("previous_token", "previous token"), ("first_token", "first token (sink)")):
        layer, head, weight = rank_heads([value[name] for value in values])[0]
        table.add_row(what, head_name(layer, head), f"{weight:.2f}")
    return table


def run(model: GPTModule, tokens: torch.Tensor) -> list:
    """The model's attention calls on tokens (B, T)."""
    model.eval()
    with torch.no_grad(), capture(model) as calls:
        model(tokens.to(model.device))
    return calls


if __name__ == "__main__":
    try:
        main()
    except (InputError, AttentionMonitorError, PermissionError) as error:
        sys.exit(f"train.py: error: {error}")
