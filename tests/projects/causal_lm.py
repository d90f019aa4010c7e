"""A project that knows nothing of attention_monitor but its last lines: a Hugging Face language model, fine-tuned."""

import sys

import pytorch_lightning as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from attention_monitor import AttentionMonitor, TextProbe

RHYME = "one for sorrow, two for joy, three for a girl, four for a boy, five for silver, six for gold. "
TOKENS = sorted(set(RHYME))


class Characters:
    def encode(self, text):
        return [TOKENS.index(character) for character in text]

    def decode(self, ids):
        return "".join(TOKENS[i] for i in ids)


class FineTuning(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.lm = LlamaForCausalLM(config)
        self.lm.gradient_checkpointing_enable()

    def forward(self, input_ids):
        return self.lm(input_ids=input_ids).logits

    def training_step(self, batch, batch_idx):
        loss = self.lm(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        schedule = get_linear_schedule_with_warmup(optimizer, 5, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        ids = torch.tensor(Characters().encode(RHYME * 20))
        windows = ids.unfold(0, 48, 7)
        mask = torch.ones(48, dtype=torch.long)

        def collate(rows):
            rows = torch.stack(rows)
            return {"input_ids": rows, "labels": rows, "attention_mask": mask.expand(len(rows), -1)}

        return torch.utils.data.DataLoader(windows, 8, shuffle=True, collate_fn=collate)


if __name__ == "__main__":
    pl.seed_everything(1)
    monitor = AttentionMonitor(every_n_steps=10, probe=TextProbe("two for joy", Characters()))
    trainer = pl.Trainer(
        max_steps=40,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[monitor] if "--monitor" in sys.argv else [],
    )
    trainer.fit(FineTuning())
