"""Models to look into: checkpoints of train.py, folders of Hugging Face models, untrained ones."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from gpt import InputError
from gpt.checkpoint import load_checkpoint
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import load_bytes

from .errors import first_line
from .folders import load_folder
from .subject import Subject, on_device


def load_subject(path: str | Path, device: str = "cpu") -> Subject:
    """The model of a checkpoint file of train.py, or of a folder that Hugging Face's ``save_pretrained`` wrote.

    Nothing in them is run: weights are loaded as tensors, and models whose code comes with them are refused.

    Raises:
        InputError: when it cannot be loaded; the message says why.
    """
    path = Path(path)
    if path.is_dir():
        return load_folder(path, device)
    if path.is_file() and path.suffix != ".ckpt" and (path.parent / "config.json").is_file():
        raise InputError(f"{path} is a file of a Hugging Face model; give its folder, {path.parent}.")
    return _load_file(path, device)


def untrained_subject(config: str | Path | None, device: str = "cpu", **shape: int | None) -> Subject:
    """A GPT with random weights.

    Args:
        config: YAML of train.py; None: 4 layers of 4 heads, 128 wide.
        shape: n_layer, n_head, n_embd; None: as in the config.

    Raises:
        InputError: when there is no such config, or no model of that shape.
    """
    found = {} if config is None else _read_config(Path(config))
    names = {field.name for field in fields(GPTConfig)}
    options = {k: v for k, v in (found.get("model") or {}).items() if k in names}
    tokenizer = load_bytes()  # a BPE is trained on a text, which there is not
    options |= {"vocab_size": tokenizer.n_vocab} | {k: v for k, v in shape.items() if v is not None}
    torch.manual_seed(0)
    try:
        gpt = GPT(GPTConfig(**options))
    except TypeError as error:
        raise InputError(f"{config} does not describe a model of train.py: {error}.") from error
    name = f"untrained GPT{f' of {config}' if config else ''}"
    return Subject(name, on_device(gpt.eval(), device), tokenizer, gpt.config.block_size, is_trained=False)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The .ckpt files of a folder.

    Raises:
        InputError: when there are fewer than two.
    """
    found = sorted(Path(folder).glob("*.ckpt"))
    if len(found) < 2:
        what = f"has {len(found)} .ckpt files" if Path(folder).is_dir() else "is no folder"
        raise InputError(
            f"{folder} {what}; an animation takes a folder with two or more, such as checkpoints/ of a run."
        )
    return found


def _load_file(path: Path, device: str) -> Subject:
    found = load_checkpoint(path)
    name, gpt = f"{path}, step {found.step}", on_device(found.gpt, device)
    return Subject(name, gpt, found.tokenizer, found.gpt.config.block_size, step=found.step)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise InputError(f"The config {path} cannot be read: {reason}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a config of train.py; see configs/.")
    return found
