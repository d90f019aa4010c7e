"""GPT-2 in plain torch.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, D = head_dim = n_embd // n_head.
Parameter names follow GPT-2's published checkpoints (``transformer.h.0.attn.c_attn`` ...).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt import InputError


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        vocab_size: number of token ids the model knows.
        block_size: longest sequence, in tokens.
        n_kv_head: heads of keys and values shared among the ``n_head`` query heads; None: ``n_head``.
        qk_norm: RMS-normalise queries and keys per head, with a learned gain.
        activation_checkpointing: recompute each block in the backward pass to save memory.
    """

    vocab_size: int
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_kv_head: int | None = None
    dropout: float = 0.0
    bias: bool = True
    qk_norm: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head gets "
                f"n_embd / n_head dimensions; choose e.g. n_embd={self.n_head * max(1, self.n_embd // self.n_head)}."
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise InputError(
                f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: every "
                f"key/value head must serve the same number of query heads."
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        kv_dim = self.n_kv_head * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * kv_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)  # (B, H or H_kv, T, D)
        z = F.scaled_dot_product_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.n_kv_head != self.n_head,
        )  # (B, H, T, D)
        return F.dropout(self.c_proj(z.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2 was trained with the tanh form
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-LN transformer block: each half reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab_size).

    Raises:
        InputError: on a sequence longer than ``block_size``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied, as in GPT-2
        self.apply(self._init_weights)
        # GPT-2: projections onto the residual stream shrink with the number of additions to it
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise InputError(
                f"got {T} tokens but the model's context is block_size={self.config.block_size}; "
                f"shorten the text or train with a larger block_size."
            )
        return self.lm_head(self.transformer(tokens))

    @classmethod
    def from_huggingface(cls, folder: str | Path, **overrides: object) -> "GPT":
        """Load a local Hugging Face GPT-2 checkpoint folder (``config.json`` and weights).

        Args:
            folder: as written by ``GPT2LMHeadModel.save_pretrained``, safetensors or ``pytorch_model.bin``.
            overrides: fields of ``GPTConfig`` that are not a matter of shape (dropout, activation_checkpointing).

        Raises:
            InputError: when the folder holds no GPT-2 checkpoint.
        """
        folder = Path(folder)
        config = _read_huggingface_config(folder)
        model = cls(GPTConfig(**{**asdict(config), **overrides}))
        state = {}
        for name, value in _read_huggingface_weights(folder).items():
            name = "transformer." + name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")) or "lm_head" in name:
                continue  # the causal mask's buffers, and the tied copy of wte
            # transformers keeps these four as Conv1D, whose weight is (in, out); nn.Linear wants (out, in)
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            state[name] = value.t() if transposed else value
        state["lm_head.weight"] = state["transformer.wte.weight"]
        model.load_state_dict(state)
        return model


def _read_huggingface_config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no config.json; give the folder that save_pretrained() wrote for a GPT-2 model."
        )
    hf = json.loads(path.read_text(encoding="utf-8"))
    if hf.get("model_type") != "gpt2":
        raise InputError(f"{path} describes a model of type {hf.get('model_type')!r}; only 'gpt2' can be loaded.")
    # what changes the computation and this model does not have
    expected = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    for key, value in expected.items():
        if hf.get(key, value) != value and not (key == "n_inner" and hf[key] == 4 * hf["n_embd"]):
            raise InputError(f"{path} has {key}={hf[key]!r}; only {value!r}, as in GPT-2, can be loaded.")
    return GPTConfig(
        vocab_size=hf["vocab_size"],
        block_size=hf["n_positions"],
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
    )


def _read_huggingface_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file  # only needed for this file format

        return load_file(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        weights: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        return weights
    raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin; sharded checkpoints are not read.")
