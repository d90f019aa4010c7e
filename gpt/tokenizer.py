"""Tokenizers, all of them real ``tiktoken.Encoding`` objects: ``encode_ordinary``, ``decode``, ``n_vocab``."""

import base64
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import requests
import rustbpe
import tiktoken

from gpt import InputError

TOKENIZERS = ("bpe", "gpt2", "bytes")

# a word with the space before it, a number, a run of punctuation, or white space
SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load_gpt2() -> tiktoken.Encoding:
    """GPT-2's own tokenizer. tiktoken downloads its two files once and caches them."""
    try:
        return tiktoken.get_encoding("gpt2")
    except requests.RequestException as error:
        raise InputError(
            "The tokenizer 'gpt2' needs the files vocab.bpe and encoder.json, which tiktoken downloads once and could "
            "not reach: connect to the internet, or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken cached them, "
            "or use --data.tokenizer bpe, which is trained on your text and needs no download."
        ) from error


def load_bytes() -> tiktoken.Encoding:
    """One token per UTF-8 byte."""
    return tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )


def load_bpe(texts: Iterable[str], vocab_size: int, cache_file: Path) -> tiktoken.Encoding:
    """A byte-pair encoding trained on ``texts``, or read from ``cache_file`` if that exists.

    Args:
        texts: the corpus, in pieces; not touched when the cache is there.
        vocab_size: largest number of tokens, at least 256; a corpus of few words yields fewer.
        cache_file: in tiktoken's format, a line ``base64(token) rank`` for each token.
    """
    if vocab_size < 256:
        raise InputError(f"vocab_size={vocab_size} is too small for a BPE: it needs the 256 bytes; give 256 or more.")
    if not cache_file.is_file():
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERN)
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in trainer.get_mergeable_ranks()]
        with replacing(cache_file) as file:
            file.writelines(lines)
    # not tiktoken.load.load_tiktoken_bpe: that keeps a second copy in the system's temporary folder, keyed by path
    # alone, and would go on serving it after this file has changed
    return parse_bpe(cache_file.read_text())


def parse_bpe(lines: str) -> tiktoken.Encoding:
    """The byte-pair encoding that a file in tiktoken's format describes."""
    entries = [line.split() for line in lines.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in entries}
    if not {bytes([i]) for i in range(256)} <= set(ranks) or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError("A byte-pair encoding has the 256 bytes and ranks from 0 on, and this one does not.")
    return tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def saved_tokenizer(encoding: tiktoken.Encoding) -> dict[str, str]:
    """What ``restored_tokenizer`` needs, as strings, so that a checkpoint can be used without its corpus."""
    if encoding.name != "bpe":
        return {"name": encoding.name}
    tokens = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab))
    return {
        "name": "bpe",
        "ranks": "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)),
    }


def restored_tokenizer(saved: dict[str, str]) -> tiktoken.Encoding:
    """The tokenizer that ``saved_tokenizer`` described."""
    if saved["name"] == "bpe":
        return parse_bpe(saved["ranks"])
    return load_gpt2() if saved["name"] == "gpt2" else load_bytes()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that it is there whole or not at all, also when two runs write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
