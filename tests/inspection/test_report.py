"""What is told of models that do not look at a text token by token."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from gpt import InputError
from inspection.report import as_json, look
from inspection.subjects import load_subject

from . import made

SHORT, LONG = "a cat sat here", "a cat sat here. " * 6


@pytest.fixture
def read(tmp_path):
    """What is found in a model, and a document of it; nothing is warned of beside it."""

    def read(model, text, target=None):
        with warnings.catch_warnings(action="error", category=UserWarning):
            found = look(load_subject(made.save(tmp_path, model)), text, target, [])
        return found, as_json(found, [(layer, range(found.maps.n_heads(layer))) for layer in range(len(found.maps))], 3)

    return read


def unlisted(found):
    """Layers, of the note that says where not every token is listed."""
    notes = [note for note in found.notes if note.startswith("Not every token is listed by name in ")]
    assert len(notes) <= 1  # one sentence says it all
    return notes[0] if notes else ""


def window(config, **options):
    sizes = {"num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 8}
    return made.made(config(**made.TEXT, **sizes, **options))


WINDOWS = {
    "mistral": lambda: window(transformers.MistralConfig),
    "qwen2": lambda: window(transformers.Qwen2Config, use_sliding_window=True, max_window_layers=1),
    "gemma2": lambda: window(transformers.Gemma2Config, head_dim=8),
    "modernbert": lambda: made.made(
        transformers.ModernBertConfig(**made.TEXT, local_attention=8, max_position_embeddings=64)
    ),
}


@pytest.mark.parametrize("make", WINDOWS.values(), ids=WINDOWS)
def test_a_window_that_is_a_mask_leaves_every_token_listed(read, make):
    found, document = read(make(), "abcdefghij" * 3)
    assert not unlisted(found)
    for layer in document["layers"]:
        for head in layer["heads"]:
            assert len(head["attended"]) == len(document["tokens"]) == 32
            assert all(one["token"] == document["tokens"][one["key"]] for row in head["attended"] for one in row)
    assert 0 in [found.maps.pattern(layer)[:, 20, :5].max() for layer in range(2)]  # out of the window
    assert len(found.induction) == 4


@pytest.mark.parametrize(("text", "n_windows"), [(SHORT, 4), (LONG, 20)], ids=["short", "long"])
def test_where_a_text_is_cut_into_windows_it_is_said_why_not_every_token_is_listed(read, text, n_windows):
    found, document = read(made.long_t5(), text)
    assert "in L00, L01: the model cuts the text into windows there" in unlisted(found)
    assert f"so that maps are 5 by 15 (the first of {n_windows}, and statistics are of all);" in unlisted(found)
    listed = [len(layer["attended"]) for layer in document["layers"]]
    assert listed == [5, 5, *[len(document["target_tokens"])] * 4]  # its decoder attends to everything
    assert "no induction scores of L00, L01: on repeated random tokens" in " ".join(found.notes)
    assert {layer for layer, _, _ in found.induction} == {2, 3}
    assert document["layers"][0]["heads"][-1]["repeated_tokens"]["induction"] is None


def test_a_model_that_reads_short_texts_otherwise_has_no_induction_scores_and_no_roles_from_them(read):
    found, document = read(made.big_bird(), LONG)  # in blocks
    assert len(document["layers"]) == 10
    assert "L00, L01, L02, L03, L04 and 5 more" in unlisted(found)
    assert found.induction == []
    short, document = read(made.big_bird(), SHORT)
    assert not unlisted(short)
    assert len(document["layers"]) == 2


def test_pooled_text_is_told(read):
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 1], "num_decoder_layers": 1}
    found, _ = read(
        made.differing(transformers.FunnelModel(transformers.FunnelConfig(vocab_size=made.V, **sizes))), SHORT
    )
    assert "in L01: " in unlisted(found)
    assert "so that maps are 8 by 16;" in unlisted(found)
    assert "Of L01: where its queries are among its keys is not known." in found.notes


class NotSeen(nn.Module):
    """Attention that cannot be looked at."""

    def forward(self, hidden_states, **_):
        x = hidden_states[:, None]  # (B, 1, T, D)
        return torch.vmap(F.scaled_dot_product_attention)(x, x, x)[:, 0], None


def test_attention_that_could_not_be_looked_at_is_told_once_for_each_reason(tmp_path):
    model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=made.V, n_embd=16, n_layer=3, n_head=2))
    subject = load_subject(made.save(tmp_path, model))
    for layer in (1, 2):
        subject.model.h[layer].attn = NotSeen()
    found = look(subject, SHORT, None, [])
    assert found.notes == ["The attention of h.1.attn, h.2.attn is left out: it runs inside torch.vmap."]
    assert len(found.maps) == 1
    subject.model.h[0].attn = NotSeen()
    sentence = r"No attention call was seen in GPT2Model: .*h\.0\.attn \(it runs inside torch\.vmap\).*; what can be"
    with pytest.raises(InputError, match=sentence):
        subject.read(SHORT)


def test_a_model_without_attention_is_one_sentence(tmp_path):
    mamba = transformers.MambaConfig(vocab_size=made.V, hidden_size=16, num_hidden_layers=1, state_size=4)
    subject = load_subject(made.save(tmp_path, made.made(mamba)))
    with pytest.raises(
        InputError, match="No attention call was seen in MambaModel: no module in it looks like"
    ) as error:
        subject.read(SHORT)
    assert ". " not in str(error.value)
