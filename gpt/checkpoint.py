"""Checkpoints that train.py wrote -> the model, ready to read, without Lightning."""

import pickle
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tiktoken
import torch

from gpt import InputError
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import restored_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint has.

    Attributes:
        gpt: in evaluation mode, on the CPU.
        tokenizer: that it was trained with.
        step: optimizer steps done before it was written.
    """

    gpt: GPT
    tokenizer: tiktoken.Encoding
    step: int


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint. Nothing in it is run: of a pickle only tensors and plain values are accepted.

    Raises:
        InputError: when it is not there, is not one of train.py's, or holds anything else.
    """
    state = _read(Path(path))
    try:
        hparams, saved = state["hyper_parameters"], state["TextDataModule"]["tokenizer"]
        weights = {n.removeprefix("gpt."): w for n, w in state["state_dict"].items() if n.startswith("gpt.")}
        names = [field.name for field in fields(GPTConfig)]
        gpt = GPT(GPTConfig(**{name: hparams[name] for name in names}))
        gpt.load_state_dict(weights)
        return Checkpoint(gpt.eval(), restored_tokenizer(saved), int(state["global_step"]))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not a checkpoint that train.py wrote with its tokenizer ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a .ckpt file from its checkpoints/ folder."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise InputError(f"The checkpoint {path} {what}.")
    try:
        if not zipfile.is_zipfile(path):  # what torch wrote before 1.6, or anything
            raise InputError(f"{path} is not a checkpoint: it is not in the zip format that torch.save writes.")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(  # not with what torch says, which goes on to tell how to run the code
            f"{path} was not loaded: it is damaged, or holds more than tensors and plain values, and reading that "
            "could run code."
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not a checkpoint of train.py.")
    return found
