"""Tokens of a text: their ids, labels and places, by whatever tokenizer there is."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import AttentionMonitorError, is_whole


def token_spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a text: token ids, and the span of characters of each, which is empty for special tokens."""
    if getattr(tokenizer, "is_fast", False):  # of transformers
        encoded = tokenizer(text, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    ids = token_ids(tokenizer, text)
    ends = [0, *(len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids)))]
    if tokenizer.decode(ids) != text:
        raise AttentionMonitorError(
            f"The tokenizer makes {tokenizer.decode(ids)!r} of {text!r}, so words cannot be found in its tokens; give "
            "token ids and positions."
        )
    return ids, list(pairwise(ends))


def checked_tokenizer(tokenizer: Any, what: str, instead: str) -> Any:
    """Return the tokenizer, if it is one.

    Args:
        tokenizer: what was given as one.
        what: what the probe has or is, for the error.
        instead: what to write instead, for the error.

    Raises:
        AttentionMonitorError: when it cannot encode and decode.
    """
    if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "decode"):
        found = "no tokenizer was found" if tokenizer is None else f"{tokenizer!r} has no encode and decode"
        raise AttentionMonitorError(
            f"The probe {what} but {found} to encode it: use {instead}; or give the datamodule or the module a "
            "`tokenizer`, AttentionRecorder `tokenizer=`, Trainer `processing_class=`."
        )
    return tokenizer


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one; of several that share a character, such as an emoji, the first has it, others ⋯."""
    labels: list[str] = []
    while len(labels) < len(ids):
        start = len(labels)
        for stop in range(start + 1, min(start + 8, len(ids)) + 1):
            label = tokenizer.decode(list(ids[start:stop]))
            if not isinstance(label, str):
                raise AttentionMonitorError(
                    f"The tokenizer's decode gives {label!r} for a token; it has to give a text."
                )
            if "\ufffd" not in label:
                labels += [label, *["⋯"] * (stop - start - 1)]
                break
        else:  # no character
            labels.append(tokenizer.decode([ids[start]]))
    return labels


def token_ids(tokenizer: Any, text: str | Sequence[int]) -> list[int]:
    """Return the token ids of a text, or those that were given in its place.

    Raises:
        AttentionMonitorError: when there are none, or the tokenizer does not give any.
    """
    encoded: Any = text
    if isinstance(text, str):
        # tiktoken's plain `encode` refuses texts that contain special tokens
        encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
        try:
            encoded = encode(text)
        except Exception as error:
            raise AttentionMonitorError(
                f"The tokenizer could not encode the probe {text!r}: {type(error).__name__}: {error}"
            ) from error
        encoded = getattr(encoded, "ids", encoded)  # `tokenizers` wraps them
    ids = encoded.tolist() if isinstance(encoded, Tensor | np.ndarray) else encoded
    if not isinstance(ids, list | tuple) or not all(is_whole(i, 0) for i in ids):
        raise AttentionMonitorError(
            f"A probe is a text that the tokenizer makes a list of token ids of, or that list; got {ids!r}."
        )
    if not ids:
        raise AttentionMonitorError(f"The probe {text!r} has no tokens; give a text to look at.")
    return list(ids)


def vocab_size_of(tokenizer: Any) -> int | None:
    """Ask a tokenizer of tiktoken, transformers or tokenizers how many tokens it has; None where it does not say."""
    for name in ("n_vocab", "vocab_size", "get_vocab_size"):
        size = getattr(tokenizer, name, None)
        size = size() if callable(size) else size
        if isinstance(size, int):
            return size
    return None
