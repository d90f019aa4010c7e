"""The LightningModule around the GPT: loss, optimizer, schedule, and what is logged."""

import math
import time
from dataclasses import asdict, fields
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from gpt import InputError
from gpt.model import GPT, GPTConfig


class GPTModule(pl.LightningModule):
    """Trains a GPT to predict the next token.

    Logs ``train/loss`` and ``val/loss`` (nats per token), ``lr`` and ``tokens_per_second``.

    Args:
        vocab_size: number of token ids the model knows; null: the tokenizer's.
        block_size: longest sequence, in tokens.
        n_layer: number of transformer blocks.
        n_head: attention heads in each.
        n_embd: width of the residual stream.
        n_kv_head: heads of keys and values shared among the query heads; null: as many as query heads.
        dropout: probability of zeroing, in attention and on the residual stream.
        bias: biases in linear layers and LayerNorms.
        qk_norm: RMS-normalise queries and keys.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        init_from: folder of a local Hugging Face GPT-2 checkpoint to start from.
        learning_rate: the peak, after warm-up.
        min_learning_rate: where the cosine ends, at the last step of training.
        warmup_steps: optimizer steps over which the learning rate rises linearly.
        weight_decay: of matrices; biases, gains and other vectors are not decayed.
        beta1: AdamW's.
        beta2: AdamW's.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int = 128,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        n_kv_head: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        activation_checkpointing: bool = False,
        init_from: str | None = None,
        learning_rate: float = 1e-3,
        min_learning_rate: float = 1e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._config(vocab_size or 1)  # complain about impossible shapes before the data is read
        self.validated_step = 0  # global step at the end of the newest validation
        self._tokens_since = 0
        self._clock: float | None = None

    def _config(self, vocab_size: int) -> GPTConfig:
        names = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
        return GPTConfig(vocab_size=vocab_size, **{name: self.hparams[name] for name in names})

    def configure_model(self) -> None:
        """Build the network: only now is the tokenizer known."""
        if hasattr(self, "gpt"):
            return
        datamodule = getattr(self._trainer, "datamodule", None)
        data_vocab = getattr(datamodule, "vocab_size", None)
        vocab_size = self.hparams["vocab_size"] or data_vocab
        if vocab_size is None:
            raise InputError("vocab_size is not given and there is no datamodule with a tokenizer to take it from.")
        if data_vocab is not None and data_vocab > vocab_size:
            raise InputError(
                f"The tokenizer has {data_vocab} tokens but the model knows only vocab_size={vocab_size}; "
                f"leave out --model.vocab_size to take the tokenizer's, or give {data_vocab} or more."
            )
        self.hparams["vocab_size"] = vocab_size  # a checkpoint has to know it
        config = self._config(vocab_size)
        self.gpt = GPT(config) if self.hparams["init_from"] is None else self._load_huggingface(config)

    def _load_huggingface(self, config: GPTConfig) -> GPT:
        folder = self.hparams["init_from"]
        gpt = GPT.from_huggingface(
            folder, dropout=config.dropout, activation_checkpointing=config.activation_checkpointing
        )
        _check_same_shape(f"The checkpoint folder {folder}", asdict(gpt.config), asdict(config))
        return gpt

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if hasattr(self, "gpt"):
            _check_same_shape("The checkpoint", checkpoint.get("hyper_parameters", {}), asdict(self.gpt.config))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocab_size)
        return self.gpt(tokens)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch  # (B, T) each
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss)
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), prog_bar=True)

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._tokens_since += batch[0].numel() * self.trainer.world_size
        every = self.trainer.log_every_n_steps * self.trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        if (batch_idx + 1) % every == 0:
            now = time.perf_counter()
            if self._clock is not None:
                self.log("tokens_per_second", self._tokens_since / (now - self._clock))
            self._tokens_since, self._clock = 0, now

    def on_validation_end(self) -> None:
        self.validated_step = self.trainer.global_step

    def on_validation_start(self) -> None:
        self._clock = None  # the time it takes is not training time

    def configure_optimizers(self) -> OptimizerLRScheduler:
        hp = self.hparams
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": hp["weight_decay"]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=hp["learning_rate"], betas=(hp["beta1"], hp["beta2"]))
        total, floor = self.trainer.estimated_stepping_batches, hp["min_learning_rate"] / hp["learning_rate"]

        def factor(step: int) -> float:
            """Linear warm-up to 1, then half a cosine down to ``floor`` at the last step."""
            if step < hp["warmup_steps"]:
                return (step + 1) / (hp["warmup_steps"] + 1)
            progress = min(1.0, (step - hp["warmup_steps"]) / max(1, total - hp["warmup_steps"]))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _check_same_shape(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Both as in GPTConfig; fields that do not change a weight's shape may differ."""
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "bias", "qk_norm")
    differing = [name for name in names if name in found and found[name] != wanted[name]]
    if differing:
        has = ", ".join(f"{name}={found[name]}" for name in differing)
        wants = ", ".join(f"{name}={wanted[name]}" for name in differing)
        options = " ".join(f"--model.{name} {found[name]}" for name in differing)
        raise InputError(f"{what} has {has} but the model is configured with {wants}; train with {options}.")
