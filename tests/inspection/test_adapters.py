"""Adapters in folders: put into the model that they change, or refused, and never left out."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from gpt import InputError
from inspection.adapters import KINDS, Adapter, adapter_in
from inspection.subjects import load_subject

from . import made

LORA = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}


@pytest.fixture
def folder(tmp_path):
    """A model without an adapter."""
    return made.save(tmp_path / "model", made.gpt2())


@pytest.fixture
def no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)


def write(folder, files):
    """Files by name; a dict is written as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def refused(folder):
    """What is said of a folder."""
    with pytest.raises(InputError) as error:
        load_subject(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


MERGE = ".merge_and_unload().save_pretrained(NEW), and give the folder NEW, with the tokenizer"
ELSEWHERE = "load it in Python with the library that wrote it"


def test_without_peft_an_adapter_beside_its_weights_is_refused(folder, no_peft):
    write(folder, {"adapter_config.json": LORA, "adapter_model.safetensors": ""})
    message = refused(folder)
    assert "has an adapter (adapter_config.json, adapter_model.safetensors) beside its weights" in message
    assert "pip install peft" in message
    assert f'PeftModel.from_pretrained(model, "{folder}"){MERGE}' in message


def test_without_peft_an_adapter_of_a_model_elsewhere_is_refused(folder, tmp_path, no_peft):
    write(tmp_path / "adapter", {"adapter_config.json": LORA | {"base_model_name_or_path": str(folder)}})
    write(tmp_path / "adapter", {"adapter_model.bin": ""})
    assert f"for the model in {folder}, and there is no package peft" in refused(tmp_path / "adapter")


@pytest.mark.parametrize("base", ["gpt2", "", None, "no/such/folder", "a\0b"])
def test_an_adapter_without_the_model_that_it_changes_is_refused(tmp_path, base):
    files = {"adapter_config.json": LORA | {"base_model_name_or_path": base}, "adapter_model.safetensors": ""}
    write(tmp_path, files)
    assert f"and not the model that it changes, {base or ''!r}, which is no folder" in refused(tmp_path)
    assert MERGE in refused(tmp_path)


UNREAD = {
    "tokens before the text": (LORA | {"peft_type": "PREFIX_TUNING"}, "adapter_model.safetensors", "PREFIX_TUNING"),
    "other adapters": (LORA | {"peft_type": "XLORA"}, "adapter_model.safetensors", "XLORA"),
    "library adapters": ({"config": {}, "model_name": "x"}, "pytorch_adapter.bin", "an unknown kind"),
    "no config": (None, "adapter_model.safetensors", "an unknown kind"),
    "mlx": (None, "adapters.safetensors", "an unknown kind"),
    "by hand": (None, "my_lora.pt", "an unknown kind"),
    "diffusers": (None, "pytorch_lora_weights.safetensors", "an unknown kind"),
}


@pytest.mark.parametrize(("config", "weights", "kind"), UNREAD.values(), ids=UNREAD)
def test_an_adapter_that_cannot_be_read_is_refused_and_not_left_out(folder, config, weights, kind):
    write(folder, {weights: ""} if config is None else {"adapter_config.json": config, weights: ""})
    message = refused(folder)
    assert weights in message
    assert kind in message
    assert ", ".join(KINDS) in message
    assert ELSEWHERE in message


@pytest.mark.parametrize(
    "config",
    [LORA | {"megatron_config": {"a": 1}, "megatron_core": "some.module"}, LORA],
    ids=["megatron", "no weights"],
)
def test_an_adapter_that_names_code_or_has_no_weights_is_refused(folder, config):
    write(folder, {"adapter_config.json": config})
    if "megatron_core" in config:
        write(folder, {"adapter_model.safetensors": ""})
    assert "that cannot be read here: what can is the adapter_config.json of peft, without Megatron" in refused(folder)
    assert MERGE in refused(folder)


@pytest.mark.parametrize("config", ["{", "[1]", "\0"])
def test_a_config_of_an_adapter_that_is_none_is_refused(folder, config):
    write(folder, {"adapter_config.json": config})
    assert "anew" in refused(folder)


def test_adapters_in_folders_of_their_own_are_not_left_out(folder):
    write(folder, {"one/adapter_config.json": LORA, "other/adapter_config.json": LORA})
    message = refused(folder)
    assert "has adapters in folders of their own, one, other," in message
    assert "move these folders elsewhere" in message


def test_earlier_states_in_folders_of_the_trainer_are_no_adapters_of_a_model(folder):
    write(folder, {"checkpoint-10/adapter_config.json": LORA})
    assert adapter_in(folder) is None


@pytest.mark.parametrize("name", ["model-lorax.json", "exploration.pt", "adapter_notes.md", "README.md"])
def test_other_files_are_no_adapters(folder, name):
    write(folder, {name: "{}"})
    assert adapter_in(folder) is None


def info(**names):
    return SimpleNamespace(**({"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()} | names))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (info(missing_keys={"h.0.lora_A"}), "1 of its weights are missing or of another shape, such as h.0.lora_A"),
        (info(mismatched_keys={("h.0.lora_B", 1, 2)}), "1 of its weights are missing or of another shape"),
        (info(unexpected_keys={"h.7.lora_A"}), "1 of its weights have no place in it, such as h.7.lora_A"),
        (
            ValueError("Target modules not found\nlong"),
            r"could not be put .*: ValueError: Target modules not found; merge",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, found, message):
    def load_adapter(folder, **options):
        if isinstance(found, Exception):
            raise found
        return found

    adapter = Adapter(tmp_path, Path("base"), "LORA")
    with pytest.raises(InputError, match=message):
        adapter.put_into(SimpleNamespace(load_adapter=load_adapter))


def test_what_is_for_a_head_on_top_of_the_layers_need_not_fit(tmp_path):
    found = info(unexpected_keys={"classifier.weight"})
    Adapter(tmp_path, tmp_path, "LORA").put_into(SimpleNamespace(load_adapter=lambda folder, **options: found))


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def classifier():
    return made.differing(
        transformers.BertForSequenceClassification(transformers.BertConfig(**made.TEXT, max_position_embeddings=34))
    )


def trained(peft, folder, config, model, **options):
    """Save an adapter with random weights; what the model with it attends to."""
    model.config._name_or_path = str(folder)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(folder, **options)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return adapted.eval()(torch.tensor([[0, *range(40, 60), 2]]), output_attentions=True).attentions


def same(folder, expected):
    """Whether the model of a folder attends to what it should."""
    subject = load_subject(folder)
    ids = subject.tokenizer.decode(list(range(40, 60)))
    maps = subject.read(ids)
    return all(torch.allclose(maps.pattern(i), weights[0], atol=1e-5) for i, weights in enumerate(expected))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "IA3Config", "HRAConfig"])
def test_with_peft_a_model_is_read_with_its_adapter(tmp_path, peft, kind, safe):
    model = classifier()
    made.save(tmp_path, model)
    options = {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(task_type="SEQ_CLS", target_modules=["query", "key"], **options)
    expected = trained(peft, tmp_path, config, model, safe_serialization=safe)
    assert same(tmp_path, expected)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / name).unlink(missing_ok=True)
    assert not same(tmp_path, expected)


def test_with_peft_the_model_that_an_adapter_names_is_read_with_it(folder, tmp_path, peft):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    expected = trained(peft, tmp_path / "adapter", config, model)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder)}))
    assert same(tmp_path / "adapter", expected)
    assert "with its adapter, LORA" in load_subject(tmp_path / "adapter").name


def test_with_peft_weights_that_are_not_there_are_not_made_up(folder, peft):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trained(peft, folder, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    assert "are not those of its config.json: 12 are missing" in refused(folder)


def test_with_peft_code_in_the_weights_of_an_adapter_is_not_run(folder, peft):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trained(peft, folder, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), model)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": Path("x")}, folder / "adapter_model.bin")
    assert "reading that could run code" in refused(folder)
