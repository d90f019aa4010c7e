import hashlib
import http.server
import threading

import numpy as np
import pytest
import torch

from gpt import InputError, data
from gpt.data import TextDataModule, read_text

TEXT = "".join(f"Line {i} of the text, which goes on.\n" for i in range(400))


def make(tmp_path, text=TEXT, prepare=True, **options):
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    module = TextDataModule(
        **{"path": str(path), "cache_dir": str(tmp_path / "cache"), "block_size": 16, "batch_size": 4, **options}
    )
    if prepare:
        module.prepare_data()
        module.setup("fit")
    return module


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_the_tokens_are_the_text(tmp_path, tokenizer):
    module = make(tmp_path, tokenizer=tokenizer)
    tokens = np.concatenate([module.train_tokens, module.val_tokens])
    assert module.tokenizer.decode(tokens.tolist()) == TEXT
    assert isinstance(module.train_tokens, np.memmap)
    assert tokens.dtype == np.uint16


def test_large_vocabularies_take_four_bytes():
    assert data._token_dtype(1 << 16) is np.uint16
    assert data._token_dtype((1 << 16) + 1) is np.uint32


def test_several_files_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second. " * 200)
    (tmp_path / "a.txt").write_text("first. " * 200)
    module = make(tmp_path, path=[str(tmp_path / "b.txt"), str(tmp_path / "a.txt")], tokenizer="bytes")
    text = bytes(np.concatenate([module.train_tokens, module.val_tokens]).astype(np.uint8).tolist()).decode()
    assert text == "second. " * 200 + "first. " * 200


def test_text_is_encoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    encoded = []
    original = data._encode_file
    monkeypatch.setattr(data, "_encode_file", lambda *args: (encoded.append(1), original(*args)))
    make(tmp_path)
    make(tmp_path)
    assert len(encoded) == 1
    changed = make(tmp_path, TEXT.replace("Line 7 ", "LINE 7 "))
    assert len(encoded) == 2
    assert "LINE 7" in changed.tokenizer.decode(changed.train_tokens.tolist())


def test_the_cache_is_named_after_hash_and_size_and_nothing_else_is_written(tmp_path):
    make(tmp_path, vocab_size=300)
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:16]
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == [f"text-{digest}-bpe300.tiktoken", f"text-{digest}-bpe300.tokens"]


def test_windows_and_targets_are_shifted_by_one(tmp_path):
    module = make(tmp_path)
    tokens, targets = next(iter(module.train_dataloader()))
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_validation_covers_its_tokens_once_and_shares_none_with_training(tmp_path):
    module = make(tmp_path)
    batches = list(module.val_dataloader())
    seen = torch.cat([targets.flatten() for _, targets in batches])
    assert torch.equal(seen, torch.from_numpy(module.val_tokens[1 : len(seen) + 1].astype(np.int64)))
    assert len(module.val_tokens) - len(seen) <= 16
    share = len(module.val_tokens) / (len(module.val_tokens) + len(module.train_tokens))
    assert share == pytest.approx(0.1, abs=0.01)


def test_every_window_of_the_training_tokens_can_be_drawn(tmp_path):
    module = make(tmp_path, text=TEXT[:1200], tokenizer="bytes", val_fraction=0.5)
    starts = set(data.RandomWindows(len(module.train_tokens) - 16, 20_000, seed=0))
    assert min(starts) == 0
    assert max(starts) == len(module.train_tokens) - 17
    assert len(module.train_dataloader().dataset[max(starts)][1]) == 16


def test_windows_depend_on_seed_and_epoch_alone(tmp_path):
    def windows(epoch, **options):
        loader = make(tmp_path, **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([tokens for tokens, _ in loader])

    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))
    assert not torch.equal(windows(0), windows(0, seed=1))


def test_processes_share_the_windows_of_an_epoch():
    whole = list(data.RandomWindows(1000, 24, seed=0))
    shares = [list(data.RandomWindows(1000, 24, seed=0, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [8, 8, 8]
    assert sorted(start for share in shares for start in share) == sorted(whole)


def test_a_loader_goes_on_where_its_state_says(tmp_path):
    module = make(tmp_path)
    whole = [tokens for tokens, _ in module.train_dataloader()]
    first = module.train_dataloader()
    served = [batch[0] for _, batch in zip(range(5), first, strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(served, whole, strict=False))
    second = module.train_dataloader()
    second.load_state_dict(first.state_dict())
    rest = [tokens for tokens, _ in second]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))
    assert len(list(second)) == len(whole)  # the next epoch is whole again


def test_the_state_at_the_end_of_an_epoch_is_the_beginning_of_the_next(tmp_path):
    loader = make(tmp_path).train_dataloader()
    n_batches = len(list(loader))
    state = loader.state_dict()
    assert state == {"epoch": 0, "batches_served": n_batches}
    other = make(tmp_path).train_dataloader()
    other.load_state_dict(state)
    other.sampler.set_epoch(1)  # as Lightning does before the first batch
    assert len(list(other)) == n_batches


def test_without_a_path_there_are_stories(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "N_STORIES", 50)
    module = make(tmp_path, path=None)
    assert module.uses_stories
    assert "hid a" in module.tokenizer.decode(module.train_tokens[:200].tolist())


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            self.send_response(200 if self.path == "/text.txt" else 404)
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Handler
        server.shutdown()


def test_a_text_is_downloaded_once_and_checked(tmp_path, server):
    url, handler = server
    good = hashlib.sha256(TEXT.encode()).hexdigest()
    for _ in range(2):
        module = make(tmp_path, path=None, url=f"{url}/text.txt", sha256=good)
    assert handler.requests == 1
    assert not module.uses_stories
    with pytest.raises(InputError, match=f"sha256 {good}, not 00; give a file with --data.path"):
        make(tmp_path, path=None, url=f"{url}/text.txt", sha256="00", cache_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"Could not download .*/nothing \(HTTPError\); give a file with --data\.path"):
        make(tmp_path, path=None, url=f"{url}/nothing")


def test_a_path_takes_precedence_over_a_download(tmp_path):
    module = make(tmp_path, url="http://127.0.0.1:9/none")
    assert module.paths == [tmp_path / "text.txt"]


@pytest.mark.parametrize(
    ("path", "message"), [("missing.txt", "does not exist"), (".", "is a folder"), ("empty.txt", "is empty")]
)
def test_a_file_that_is_not_there_or_empty_is_refused_at_once(tmp_path, path, message):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=f"{message}; give .* with --data.path"):
        TextDataModule(path=str(tmp_path / path))


@pytest.mark.parametrize(("prefix", "at"), [(b"", 2), (b"x" * ((1 << 20) - 1), (1 << 20) + 1), (b"\xc3\xa9" * 9, 20)])
def test_a_file_that_is_not_utf8_is_refused_with_the_place(tmp_path, prefix, at):
    with pytest.raises(InputError, match=rf"text\.txt is not UTF-8 text: byte 0xff at position {at}; convert it"):
        make(tmp_path, prefix + b"ab\xff" + b"cd" * 100)


def test_a_character_cut_off_at_the_end_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not UTF-8"):
        make(tmp_path, b"a" * 500 + "é".encode()[:1])


def test_a_character_may_lie_across_the_pieces_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", 7)
    path = tmp_path / "t"
    text = "aé漢🐈\n" * 20 + "no line break " * 20
    path.write_text(text, encoding="utf-8")
    assert "".join(read_text(path)) == text


@pytest.mark.parametrize("n_bytes", [1, 17, 160])
def test_a_corpus_shorter_than_a_window_is_refused(tmp_path, n_bytes):
    message = rf"of its {n_bytes} tokens \d+ are for (training|validation), but one window takes block_size \+ 1 = 17"
    with pytest.raises(InputError, match=message):
        make(tmp_path, "x" * n_bytes, tokenizer="bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "word"}, "tokenizer='word' is not known; choose one of bpe, gpt2, bytes"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, prepare=False, **options)
