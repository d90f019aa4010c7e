"""A project that knows nothing of attention_monitor but its last lines: images through nn.TransformerEncoder."""

import sys

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attention_monitor import AttentionMonitor


def stripes(n):
    """Grey images of 16 x 16 with horizontal (0) or vertical (1) stripes, and noise."""
    labels = torch.arange(n) % 2
    lines = (torch.arange(16)[None] + torch.randint(4, (n, 1))) % 4 < 2
    images = torch.where(labels[:, None, None] == 0, lines[:, :, None].float(), lines[:, None, :].float())
    return TensorDataset(images + 0.3 * torch.randn(n, 16, 16), labels)


class VisionTransformer(pl.LightningModule):
    def __init__(self, dim=32, heads=4, depth=3):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(dim, 2)

    def forward(self, images):
        x = self.patch(images[:, None]).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.classifier(self.encoder(x)[:, 0])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        accuracy = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


if __name__ == "__main__":
    pl.seed_everything(1)
    data = DataLoader(stripes(640), 16, shuffle=True)
    trainer = pl.Trainer(
        max_steps=40,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        callbacks=[AttentionMonitor(every_n_steps=10)] if "--monitor" in sys.argv else [],
    )
    trainer.fit(VisionTransformer(), data, DataLoader(stripes(64), 64))
