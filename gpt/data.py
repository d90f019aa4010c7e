"""Text file(s) -> tokens in a memory-mapped file -> windows of ``block_size`` tokens."""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import requests
import tiktoken
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from gpt import InputError, stories
from gpt.tokenizer import TOKENIZERS, load_bpe, load_bytes, load_gpt2, replacing, saved_tokenizer

CHUNK_BYTES = 1 << 20
N_STORIES, STORIES_SEED = 20_000, 0


class TextDataModule(pl.LightningDataModule):
    """Windows of tokens from text files, or from the embedded stories when no file is given.

    Args:
        path: a text file (UTF-8), or several; null: ``url`` if there is one, otherwise the embedded stories.
        url: where to download the text once, into ``cache_dir``, when there is no ``path``.
        sha256: checksum that a downloaded text must have.
        tokenizer: ``bpe`` (trained on the text), ``gpt2`` or ``bytes``.
        vocab_size: number of tokens of the trained BPE; the other tokenizers have their own.
        block_size: tokens in a window.
        batch_size: windows in a batch.
        val_fraction: share of the tokens, at the end of the text, kept for validation.
        seed: of the random windows.
        cache_dir: where tokens, trained tokenizers and downloads are kept.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        url: str | None = None,
        sha256: str | None = None,
        tokenizer: str = "bpe",
        vocab_size: int = 1024,
        block_size: int = 128,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
        cache_dir: str = "runs/cache",
    ) -> None:
        super().__init__()
        if tokenizer not in TOKENIZERS:
            raise InputError(f"tokenizer={tokenizer!r} is not known; choose one of {', '.join(TOKENIZERS)}.")
        if not 0 < val_fraction < 1:
            raise InputError(f"val_fraction must lie between 0 and 1, got {val_fraction}.")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        self.paths = [Path(p) for p in ([path] if isinstance(path, str) else path or [])]
        self.url, self.sha256 = url, sha256
        self.tokenizer_name, self.bpe_vocab_size = tokenizer, vocab_size
        self.block_size, self.batch_size = block_size, batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.cache_dir = Path(cache_dir)
        for p in self.paths:
            _check_readable(p)

    @property
    def uses_stories(self) -> bool:
        return not self.paths and self.url is None

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the text, unless that has been done before."""
        if self.uses_stories:
            text = "".join(story.text for story in stories.write_stories(N_STORIES, STORIES_SEED))
            with replacing(self._corpus_paths()[0]) as file:
                file.write(text.encode())
        elif not self.paths and not self._corpus_paths()[0].is_file():
            self._download(self._corpus_paths()[0])
        encoding = self._load_tokenizer()
        token_file = self._cache_file(f"{encoding.name}{encoding.n_vocab}.tokens")
        if not token_file.is_file():
            _encode_file(self._chunks(f"encoding with {encoding.name}"), encoding, token_file)

    def setup(self, stage: str) -> None:
        self.tokenizer = self._load_tokenizer()
        token_file = self._cache_file(f"{self.tokenizer.name}{self.vocab_size}.tokens")
        tokens = np.memmap(token_file, dtype=_token_dtype(self.vocab_size), mode="r")
        n_train = int(len(tokens) * (1 - self.val_fraction))
        self.train_tokens, self.val_tokens = tokens[:n_train], tokens[n_train:]
        for part, kept in (("training", self.train_tokens), ("validation", self.val_tokens)):
            if len(kept) <= self.block_size:
                raise InputError(
                    f"The corpus is too short: of its {len(tokens)} tokens {len(kept)} are for {part}, but one window "
                    f"takes block_size + 1 = {self.block_size + 1}; give more text or a smaller --model.block_size."
                )

    def state_dict(self) -> dict[str, Any]:
        """In each checkpoint, so that it can be given texts to read wherever it is."""
        return {"tokenizer": saved_tokenizer(self.tokenizer)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer in use; known after ``setup``."""
        return self.tokenizer.n_vocab

    def train_dataloader(self) -> "ResumableLoader":
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        per_step = self.batch_size * world_size
        n_windows = max(1, len(self.train_tokens) // (self.block_size * per_step)) * per_step
        n_starts = len(self.train_tokens) - self.block_size
        windows = RandomWindows(n_starts, n_windows, self.seed, rank, world_size)
        dataset = WindowDataset(self.train_tokens, self.block_size)
        return ResumableLoader(dataset, batch_size=self.batch_size, sampler=windows, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        starts = range(0, len(self.val_tokens) - self.block_size, self.block_size)
        return DataLoader(WindowDataset(self.val_tokens, self.block_size), self.batch_size, sampler=starts)

    def _corpus_paths(self) -> list[Path]:
        if self.paths:
            return self.paths
        return [self.cache_dir / ("stories.txt" if self.url is None else os.path.basename(self.url))]

    def _chunks(self, progress: str | None = None) -> Iterator[str]:
        """The corpus in pieces of text; with ``progress``, under a progress bar of that name if it is long."""
        paths = self._corpus_paths()
        total = sum(path.stat().st_size for path in paths)
        with tqdm(total=total, desc=progress, unit="B", unit_scale=True, delay=1, disable=progress is None) as bar:
            for path in paths:
                for chunk in read_text(path):
                    yield chunk
                    bar.update(len(chunk.encode()))

    def _cache_file(self, suffix: str) -> Path:
        """Named after the corpus' content, so that a changed text is never taken for the old one."""
        return self.cache_dir / f"{self._corpus_paths()[0].stem}-{self._digest[:16]}-{suffix}"

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks("reading"):
            digest.update(chunk.encode())
        return digest.hexdigest()

    def _load_tokenizer(self) -> tiktoken.Encoding:
        if self.tokenizer_name == "gpt2":
            return load_gpt2()
        if self.tokenizer_name == "bytes":
            return load_bytes()
        return load_bpe(self._chunks(), self.bpe_vocab_size, self._cache_file(f"bpe{self.bpe_vocab_size}.tiktoken"))

    def _download(self, target: Path) -> None:
        assert self.url is not None
        try:
            response = requests.get(self.url, timeout=60)
            response.raise_for_status()
        except requests.RequestException as error:
            raise InputError(
                f"Could not download {self.url} ({type(error).__name__}); give a file with --data.path."
            ) from error
        found = hashlib.sha256(response.content).hexdigest()
        if self.sha256 is not None and found != self.sha256:
            raise InputError(
                f"What {self.url} served has sha256 {found}, not {self.sha256}; give a file with --data.path."
            )
        with replacing(target) as file:
            file.write(response.content)


class WindowDataset(Dataset[tuple[Tensor, Tensor]]):
    """Index: where a window starts. Item: its tokens (T,) and the same shifted by one (T,), int64."""

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(self.tokens[start : start + self.block_size + 1].astype(np.int64))
        return window[:-1], window[1:]


class RandomWindows(DistributedSampler[int]):
    """Where the windows of one epoch start, drawn anew for each epoch; depends on ``seed`` and epoch alone.

    Each process gets its share of ``n_windows``. Lightning keeps a DistributedSampler and calls its ``set_epoch``.
    """

    def __init__(self, n_starts: int, n_windows: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(n_starts), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.n_starts, self.n_windows = n_starts, n_windows
        self.skip = 0  # windows that the interrupted epoch had already served

    def resume(self, epoch: int, served: int) -> None:
        """Leave out what was served of ``epoch``, should that be the one that is gone on with."""
        self.set_epoch(epoch)
        self.skip = served

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.skip = 0
        super().set_epoch(epoch)

    def __len__(self) -> int:
        return self.n_windows // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        starts = torch.randint(self.n_starts, (len(self), self.num_replicas), generator=generator)
        skip, self.skip = self.skip, 0
        yield from starts[skip:, self.rank].tolist()


class ResumableLoader(DataLoader):
    """A loader whose position in the epoch is saved in Lightning's checkpoints."""

    batches_served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches_served = getattr(self.sampler, "skip", 0) // (self.batch_size or 1)
        for batch in super().__iter__():
            self.batches_served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches_served": self.batches_served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert isinstance(self.sampler, RandomWindows)
        self.sampler.resume(state["epoch"], state["batches_served"] * (self.batch_size or 1))


def read_text(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about a megabyte that end at line ends where they can.

    Raises:
        InputError: when it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, rest = 0, ""
    with path.open("rb") as file:
        while True:
            raw = file.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                rest += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position "
                    f"{position - pending + error.start}; convert it, e.g. with iconv -t UTF-8."
                ) from error
            position += len(raw)
            cut = rest.rfind("\n") + 1 if raw else len(rest)
            if len(rest) > 2 * CHUNK_BYTES:  # a text without line breaks
                cut = cut or len(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
            if not raw:
                return


def _check_readable(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"The text file {path} {what}; give the path of a UTF-8 text file with --data.path.")
    if path.stat().st_size == 0:
        raise InputError(f"The text file {path} is empty; give a file with text in it with --data.path.")


def _token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _encode_file(chunks: Iterable[str], encoding: tiktoken.Encoding, target: Path) -> None:
    with replacing(target) as file:
        for chunk in chunks:
            file.write(np.array(encoding.encode_ordinary(chunk), dtype=_token_dtype(encoding.n_vocab)).tobytes())
