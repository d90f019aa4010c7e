"""A Lightning project as somebody else might have it, small enough to train in a blink."""

import math

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module

VOCAB, T = 11, 8


class Tokenizer:
    def encode(self, text):
        return [ord(c) % VOCAB for c in text]

    def decode(self, ids):
        return str(ids[0])


class Block(nn.Module):
    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, n, C = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        return x + self.out(z.transpose(1, 2).reshape(B, n, C))


class Project(pl.LightningModule):
    tokenizer = Tokenizer()

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(1)
        self.options = options
        self.embedding = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, VOCAB)
        self.losses = []

    def forward(self, tokens):
        if tokens.shape[1] > 20:
            raise ValueError("at most 20 tokens")
        x = F.dropout(self.embedding(tokens), 0.1, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        if batch_idx == self.options.get("fail_at"):
            raise ZeroDivisionError("the user's own error")
        if batch_idx == self.options.get("nan_at"):
            with torch.no_grad():
                self.blocks[1].qkv.weight[0, 0] = math.nan
        loss = F.cross_entropy(self(batch).flatten(0, 1), batch.roll(-1, 1).flatten())
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(2)
        return torch.utils.data.DataLoader(torch.randint(VOCAB, (64, T), generator=generator), batch_size=2)

    val_dataloader = train_dataloader


def installed(model):
    """What a monitor may leave behind: hooks in the model or common to all, replaced methods, function modes."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())
    common = len(module._global_forward_hooks) + len(module._global_forward_pre_hooks)
    common += len(module._global_forward_hooks_with_kwargs) + len(module._global_forward_hooks_always_called)
    return hooks + common + torch._C._len_torch_function_stack()


def make_trainer(tmp_path, callbacks=(), **options):
    torch.manual_seed(3)
    defaults = {
        "accelerator": "cpu",
        "max_steps": 10,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    defaults["logger"] = pl.loggers.TensorBoardLogger(str(tmp_path), name="", version="")
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))
