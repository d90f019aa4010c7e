"""A project that knows nothing of attention_monitor but its last lines: nn.Transformer reverses sequences.

With ``lightning`` instead of ``pytorch_lightning``, its own training loop, and padded batches of variable length.
"""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from attention_monitor import AttentionMonitor

PAD, BEGIN, VOCAB = 0, 1, 20


def batches(n, size=8):
    for _ in range(n):
        lengths = torch.randint(4, 12, (size,)).tolist()
        sources = [torch.randint(2, VOCAB, (length,)) for length in lengths]
        targets = [torch.cat([torch.tensor([BEGIN]), source.flip(0)]) for source in sources]
        yield pad_sequence(sources, batch_first=True), pad_sequence(targets, batch_first=True)


class Reverser(L.LightningModule):
    def __init__(self, dim=32):
        super().__init__()
        self.automatic_optimization = False
        self.tokens, self.positions = nn.Embedding(VOCAB, dim), nn.Embedding(16, dim)
        self.transformer = nn.Transformer(dim, 4, 2, 2, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(dim, VOCAB)

    def embed(self, x):
        return self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))

    def forward(self, source, target):
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device).isneginf()
        z = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=later,
            src_key_padding_mask=source == PAD,
            memory_key_padding_mask=source == PAD,
            tgt_key_padding_mask=target == PAD,
            tgt_is_causal=True,
        )
        return self.head(z)

    def training_step(self, batch, batch_idx):
        source, target = batch
        logits = self(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
        optimizer = self.optimizers()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        optimizer.zero_grad()
        self.log("loss", loss)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


if __name__ == "__main__":
    L.seed_everything(1)
    data = list(batches(60))
    trainer = L.Trainer(
        max_steps=40,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        logger=L.pytorch.loggers.TensorBoardLogger("."),
        callbacks=[AttentionMonitor(every_n_steps=10)] if "--monitor" in sys.argv else [],
    )
    trainer.fit(Reverser(), torch.utils.data.DataLoader(data, batch_size=None))
