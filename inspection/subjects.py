"""Models to look into: checkpoints of train.py, folders of Hugging Face models, untrained ones."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from attention_monitor import (
    AttentionMaps,
    BatchProbe,
    Probe,
    RepeatedTokensProbe,
    Snapshot,
    TextProbe,
    attention_maps,
    run_probe,
)
from attention_monitor.probes.base import EncodedProbe
from attention_monitor.probes.tokens import token_ids, token_labels
from gpt import InputError
from gpt.checkpoint import load_checkpoint
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import load_bytes


@dataclass(frozen=True)
class Subject:
    """A model to look into.

    Attributes:
        name: for people.
        model: that is called with token ids.
        tokenizer: its own.
        context: tokens that it can read; None: no limit is known.
        start: of an encoder-decoder, the token that its decoder begins with; None: it is none.
        vocab_size: tokens that it knows; None: that is not known.
        step: of training, where known.
        is_trained: its weights are not random.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    context: int | None
    start: int | None = None
    vocab_size: int | None = None
    step: int | None = None
    is_trained: bool = True

    def read(self, text: str, target: str | None = None, say: Callable[[str], None] = lambda _: None) -> AttentionMaps:
        """What it attends to.

        Args:
            text: that it reads; of one that is longer than its context, the last part.
            target: of an encoder-decoder, what its decoder reads; None: the text too.
            say: told when not all of a text is read.

        Raises:
            InputError: on an empty text, and a target for a model that has no use for it.
            AttentionMonitorError: when the model does not take the text.
        """
        if target is not None and self.start is None:
            raise InputError("A target is for an encoder-decoder, and this model is none; leave --target out.")
        ids = self._ids(text, "text", self.context, say)
        if self.start is None:
            return attention_maps(self.model, TextProbe(ids, self.tokenizer))
        room = None if self.context is None else self.context - 1
        given = (text, "text as target") if target is None else (target, "target")
        of_decoder = [self.start, *self._ids(*given, room, say)]
        maps = attention_maps(self.model, BatchProbe(_for_both(torch.tensor([ids]), torch.tensor([of_decoder]))))
        labels = [token_labels(self.tokenizer, tokens) for tokens in (ids, of_decoder)]
        return replace(maps, tokens=labels[0], target_tokens=labels[1])

    def repeats(self) -> Snapshot | None:
        """What its heads do with repeated random tokens; None where its context is too short for that."""
        n_tokens = 25 if self.context is None else min(25, (self.context - 1) // 4)
        if n_tokens < 2:
            return None
        probe = RepeatedTokensProbe(n_tokens=n_tokens)
        return run_probe(self.model, probe if self.start is None else _ReadByBoth(probe), self.tokenizer)

    def _ids(self, text: str, what: str, room: int | None, say: Callable[[str], None]) -> list[int]:
        if not text:
            raise InputError(f"The {what} is empty; give one to read.")
        ids = token_ids(self.tokenizer, text)
        if room is not None and len(ids) > room:
            say(f"The {what} has {len(ids)} tokens, and there is room for {room}: the last {room} are looked at.")
            if hasattr(self.tokenizer, "truncation_side"):
                self.tokenizer.truncation_side = "left"
                ids = list(self.tokenizer.encode(text, truncation=True, max_length=room))  # with its special tokens
            else:
                ids = ids[-room:]
        if self.vocab_size is not None and max(ids) >= self.vocab_size:
            raise InputError(
                f"The tokenizer makes token {max(ids)} of the {what}, and the model knows {self.vocab_size} tokens: it "
                "is not the tokenizer of this model."
            )
        return ids


@dataclass(frozen=True)
class _ReadByBoth(Probe):
    """A probe of token ids that encoder and decoder read."""

    probe: Probe
    name: str = "repeated"
    every: int = 1

    def encode(self, tokenizer: Any = None) -> EncodedProbe:
        encoded = self.probe.encode(tokenizer)
        batches = [replace(batch, inputs=_for_both(batch.inputs, batch.inputs)) for batch in encoded.batches]
        return replace(encoded, batches=batches)


def _for_both(ids: torch.Tensor, of_decoder: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "decoder_input_ids": of_decoder}


def load_subject(path: str | Path, device: str = "cpu") -> Subject:
    """The model of a checkpoint file of train.py, or of a folder that Hugging Face's ``save_pretrained`` wrote.

    Nothing in them is run: weights are loaded as tensors, and models whose code comes with them are refused.

    Raises:
        InputError: when it cannot be loaded; the message says why.
    """
    subject = _load_folder(Path(path)) if Path(path).is_dir() else _load_file(Path(path))
    return _on(device, subject)


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
    return _on(device, Subject(name, gpt.eval(), tokenizer, gpt.config.block_size, is_trained=False))


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


def _load_file(path: Path) -> Subject:
    found = load_checkpoint(path)
    name = f"{path}, step {found.step}"
    return Subject(name, found.gpt, found.tokenizer, found.gpt.config.block_size, step=found.step)


def _load_folder(folder: Path) -> Subject:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json; give a .ckpt file of train.py, or a folder that save_pretrained() wrote."
        )
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            'A Hugging Face model needs the package transformers: pip install "attention-monitor[transformers]".'
        ) from error
    transformers.logging.set_verbosity_error()  # what it says of unused weights and long texts is not for here
    transformers.logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, found = transformers.AutoModel.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **local
        )
    except Exception as error:  # whatever a folder may bring about
        raise InputError(f"The model in {folder} could not be loaded: {_first_line(error)}") from error
    # what is not there would be made up; a pooler stands behind the last layer, and many models are saved without one
    absent = sorted({str(name) for name in found["missing_keys"]} | {str(key[0]) for key in found["mismatched_keys"]})
    absent = [name for name in absent if "pooler" not in name]
    if absent:
        raise InputError(
            f"The weights in {folder} are not those of its config.json: {len(absent)} are missing or of another shape, "
            f"such as {absent[0]}."
        )
    if model.main_input_name != "input_ids":
        raise InputError(f"The model in {folder} reads {model.main_input_name}, not text ({type(model).__name__}).")
    tokenizer, reason = None, "it has no such files"  # of which transformers would make up an empty one
    if any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken")):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:
            reason = _first_line(error)
    if tokenizer is None:
        raise InputError(
            f"The model in {folder} has no tokenizer that can be loaded ({reason}); save one into its folder with "
            "tokenizer.save_pretrained()."
        )
    config = model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    if getattr(config, "model_type", "") in ("t5", "mt5", "umt5"):
        limits = []  # positions are relative: there is no limit
    limits.append(tokenizer.model_max_length)
    known = [n for n in limits if isinstance(n, int) and 0 < n < 10**9]
    start = None
    if getattr(config, "is_encoder_decoder", False):
        places = (config, getattr(model, "generation_config", None))
        found = [getattr(place, "decoder_start_token_id", None) for place in places]
        start = next((token for token in found if token is not None), getattr(config, "pad_token_id", None) or 0)
    vocab_size = getattr(config, "vocab_size", None)
    name = f"{folder} ({type(model).__name__})"
    return Subject(name, model.eval(), tokenizer, min(known, default=None), start, vocab_size)


def _on(device: str, subject: Subject) -> Subject:
    try:
        return replace(subject, model=subject.model.to(torch.device(device)))
    except (RuntimeError, AssertionError) as error:  # what torch raises where it was built without CUDA
        raise InputError(f"The device {device!r} cannot be used here: {_first_line(error)}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else _first_line(error)
        raise InputError(f"The config {path} cannot be read: {reason}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a config of train.py; see configs/.")
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
