import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiktoken

from gpt import InputError
from gpt.tokenizer import load_bpe, load_bytes, load_gpt2, restored_tokenizer, saved_tokenizer

TEXT = "The cat sat on the mat.\nIt was fluffy; the cats weren't. Über 42 naïve 猫 🐈!\t end\n" * 50


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deeper" / "bpe.tiktoken"


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_any_text_survives_encoding_and_decoding(kind, cache):
    encoding = load_bytes() if kind == "bytes" else load_bpe([TEXT], 400, cache)
    assert isinstance(encoding, tiktoken.Encoding)
    for text in (TEXT, "unseen: \x00 \r\n\n  ÿ 漢字 <|endoftext|>", "", " ", "a" * 10_000):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert all(0 <= i < encoding.n_vocab for i in ids)


def test_bytes_are_bytes():
    assert load_bytes().encode_ordinary("aé\n") == [97, 195, 169, 10]
    assert load_bytes().n_vocab == 256


def test_a_bpe_learns_the_words_of_its_corpus(cache):
    encoding = load_bpe(["the cat sat on the mat\n"] * 100, 1024, cache)
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("the cat sat")] == ["the", " cat", " sat"]
    assert 256 < encoding.n_vocab < 1024  # there was nothing more to merge


def test_vocab_size_is_kept_to(cache):
    assert load_bpe([TEXT], 300, cache).n_vocab == 300


def test_the_trained_bpe_is_read_back_from_a_file_in_tiktokens_format(cache):
    first = load_bpe([TEXT], 400, cache)

    def unread():
        raise AssertionError("the corpus was read although the cache is there")
        yield

    second = load_bpe(unread(), 400, cache)
    assert second._mergeable_ranks == first._mergeable_ranks
    token, rank = cache.read_text().splitlines()[300].split()
    assert first._mergeable_ranks[base64.b64decode(token)] == int(rank)
    assert list(cache.parent.iterdir()) == [cache]  # nothing else was left behind


def test_a_changed_cache_file_is_not_hidden_by_an_older_copy(cache):
    load_bpe([TEXT], 400, cache)
    cache.write_bytes(b"\n".join(cache.read_bytes().splitlines()[:256]) + b"\n")
    assert load_bpe([TEXT], 400, cache).n_vocab == 256
    assert not (Path(tempfile.gettempdir()) / "data-gym-cache" / hashlib.sha1(str(cache).encode()).hexdigest()).exists()


def test_a_vocabulary_smaller_than_the_bytes_is_refused(cache):
    with pytest.raises(InputError, match="vocab_size=255 is too small for a BPE"):
        load_bpe([TEXT], 255, cache)


def test_gpt2_without_its_files_says_what_is_missing_and_what_to_use(monkeypatch, tmp_path):
    import requests

    def offline(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(InputError, match=r"vocab\.bpe and encoder\.json.*TIKTOKEN_CACHE_DIR.*--data\.tokenizer bpe"):
        load_gpt2()


def test_gpt2_is_tiktokens_own_read_from_its_cache(tmp_path):
    """The real loading code, on files of the right form but a smaller vocabulary in a local cache."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    unprintable = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(unprintable))]
    space = chr(256 + unprintable.index(32))
    merges = [(space, "t"), (space + "t", "h"), (space + "th", "e")]
    vocab_bpe = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    tokens = letters + [a + b for a, b in merges]
    encoder_json = json.dumps({token: i for i, token in enumerate(tokens)} | {"<|endoftext|>": 50256})
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name, content in (("vocab.bpe", vocab_bpe), ("encoder.json", encoder_json)):
        (tmp_path / hashlib.sha1((url + name).encode()).hexdigest()).write_text(content, encoding="utf-8")
    code = (
        "import tiktoken, tiktoken.load as load\n"
        "load.check_hash = lambda data, expected: True  # these files are not the published ones\n"
        "original = tiktoken.Encoding.__init__\n"
        "def init(self, name, *, explicit_n_vocab=None, **kw): original(self, name, **kw)\n"
        "tiktoken.Encoding.__init__ = init\n"
        "from gpt.tokenizer import load_gpt2\n"
        "encoding = load_gpt2()\n"
        "print(encoding.name, encoding.encode_ordinary(' the'), encoding.decode([258]))"
    )
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["gpt2", "[258]", "the"]


def test_a_tokenizer_is_restored_from_plain_strings(tmp_path):
    trained = load_bpe(["the cat sat on the mat. " * 20], 280, tmp_path / "a.tiktoken")
    for encoding in (trained, load_bytes()):
        saved = saved_tokenizer(encoding)
        assert all(isinstance(value, str) for value in saved.values())
        restored = restored_tokenizer(saved)
        text = "the mat, ß and 🙂\n"
        assert restored.encode_ordinary(text) == encoding.encode_ordinary(text)
        assert (restored.name, restored.n_vocab) == (encoding.name, encoding.n_vocab)
