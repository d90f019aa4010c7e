"""Folders of Hugging Face models: what is read of them, and what is said of those that cannot be read."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from attention_monitor import BatchProbe, attention_maps
from gpt import InputError
from inspection.report import look
from inspection.subjects import load_subject

from . import made

LONG = "".join(chr(ord("a") + i % 26) for i in range(100))


def read(folder, text="a cat", target=None):
    """What is found in the model of a folder."""
    return look(load_subject(folder), text, target, [])


def refused(folder):
    """What is said of a folder."""
    with pytest.raises(InputError) as error:
        load_subject(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("make", [made.roberta, made.opt, made.bert])
def test_the_longest_text_is_as_long_as_there_are_positions_for_tokens(tmp_path, make):
    found = read(made.save(tmp_path, make()), LONG)
    room = 34 if make is made.bert else 32
    assert found.maps.tokens == ["<s>", *LONG[-(room - 2) :], "</s>"]
    assert f"The text has 102 tokens, and there is room for {room}: the last {room} are looked at." in found.notes
    assert len(found.induction) == 4
    assert not [note for note in found.notes if "induction" in note]


def test_the_tokenizer_may_have_the_smaller_limit(tmp_path):
    found = read(made.save(tmp_path, made.roberta(), model_max_length=20), LONG)
    assert len(found.maps.tokens) == 20


def test_text_and_target_are_each_as_long_as_there_are_positions_for(tmp_path):
    found = read(made.save(tmp_path, made.led()), LONG)
    assert len(found.maps.tokens) == 40
    assert len(found.maps.target_tokens) == 32
    assert found.induction


def test_a_model_that_sees_images_too_reads_a_text_alone_where_it_can(tmp_path):
    found = read(made.save(tmp_path, made.llava()), LONG)
    assert found.maps.tokens == ["<s>", *LONG[-62:], "</s>"]  # the limit is that of the model for texts in it
    assert len(found.maps) == 2


PARTS = {made.clip: ["text_model"], made.bert_and_gpt2: ["encoder", "decoder"], made.vit_and_bert: ["decoder"]}


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (made.clip, r"reads pixel_values beside token ids \(CLIPModel\), and token ids alone are given here"),
        (made.bert_and_gpt2, r"is made of two, bert and gpt2, that each have a tokenizer \(EncoderDecoderModel\)"),
        (made.vit_and_bert, r"reads pixel_values, not text \(VisionEncoderDecoderModel\)"),
    ],
    ids=["clip", "bert and gpt2", "vit and bert"],
)
def test_of_a_model_that_needs_more_than_a_text_the_parts_that_do_not_are_named(tmp_path, make, what):
    model = make()
    message = refused(made.save(tmp_path / "whole", model))
    assert re.search(what, message)
    named = re.search(r"save the part to look at, (.*), with save_pretrained\(NEW\)", message)[1]
    assert named.split(" or ") == [f"model.{part}" for part in PARTS[make]]
    for part in PARTS[make]:  # what it says to do leads somewhere
        found = read(made.save(tmp_path / part, getattr(model, part)))
        assert found.maps.tokens == ["<s>", *"a cat", "</s>"]
        assert found.notes == ["The roles sink and positional take a text of 16 tokens or more."]


def test_a_model_without_a_part_that_reads_text_is_for_python(tmp_path):
    message = refused(made.save(tmp_path, made.vit()))
    assert "reads pixel_values, not text (ViTModel); look at it in Python with attention_maps(model" in message
    assert "save" not in message


def test_such_a_model_is_looked_at_in_python_as_it_is_said():
    model = made.clip()
    inputs = {"input_ids": torch.tensor([[0, 40, 41, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    maps = attention_maps(model, BatchProbe(inputs))
    assert sorted({call.shape[2] for call in maps.calls}) == [4, 5]  # tokens; patches of the image, and one more


def test_part_of_an_encoder_decoder_is_read(tmp_path):
    model = transformers.T5EncoderModel(transformers.T5Config(**made.T5))
    found = read(made.save(tmp_path, made.differing(model)))
    assert [call.site.split(".")[0] for call in found.maps.calls] == ["encoder", "encoder"]
    assert found.maps.target_tokens is None


@pytest.mark.parametrize(
    "names",
    [
        ["h.0.attn.c_attn.lora_A", "h.0.attn.c_attn.lora_B"],  # loralib
        ["h.1.output_adapters.adapters.mine.adapter_down.0.weight"],  # the library adapters
    ],
)
def test_an_adapter_among_the_weights_is_not_left_out(tmp_path, names):
    folder = made.save(tmp_path, made.gpt2())
    change_weights(folder, lambda weights: weights.update({name: torch.ones(2, 2) for name in names}))
    assert f"have an adapter among them that transformers does not read, such as {names[0]};" in refused(folder)


def test_weights_of_layers_that_a_model_does_not_have_are_told_and_heads_are_not(tmp_path):
    folder = made.save(tmp_path, made.gpt2())
    change_weights(folder, lambda weights: weights.update({"h.2.ln_1.weight": torch.ones(16)}))
    [note] = load_subject(folder).notes
    assert "1 of the weights" in note
    assert "such as h.2.ln_1.weight: it is looked at without them" in note
    change_weights(folder, lambda weights: weights.update({"score.weight": weights.pop("h.2.ln_1.weight")}))
    assert load_subject(folder).notes == []


def test_of_a_folder_of_checkpoints_the_checkpoints_are_named(tmp_path):
    for step in (5, 10):
        made.save(tmp_path / f"checkpoint-{step}", made.gpt2())
    assert "has no config.json" in refused(tmp_path)
    assert "those of its folders that have one are checkpoint-10, checkpoint-5." in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_of_a_file_in_a_folder_the_folder_is_asked_for(tmp_path, name):
    folder = made.save(tmp_path, made.gpt2())
    with pytest.raises(InputError, match=f"{name} is a file of a Hugging Face model; give its folder, {folder}"):
        load_subject(folder / name)


def test_it_is_not_said_how_to_run_what_comes_with_weights(tmp_path):
    folder = made.save(tmp_path, made.gpt2())
    (folder / "model.safetensors").unlink()
    torch.save({"weight": re.compile("")}, folder / "pytorch_model.bin")
    assert "reading that could run code" in refused(folder)
    assert "weights_only" not in refused(folder)


def test_names_in_a_config_are_only_those_of_models(tmp_path):
    folder = made.save(tmp_path, made.bert_and_gpt2())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["AutoConfig", 5]}))
    assert "could not be loaded" in refused(folder)


def test_a_text_that_has_no_room_is_refused(tmp_path):
    made.save(tmp_path, made.made(transformers.BertConfig(**made.TEXT, max_position_embeddings=1)))
    with pytest.raises(InputError, match="has room for 1 tokens of the text, and that is too few"):
        load_subject(tmp_path).read("abc")
