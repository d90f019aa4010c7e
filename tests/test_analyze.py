"""analyze.py as it is used, on models small enough to draw in a blink."""

import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import analyze
from attention_monitor import AttentionMonitorError, capture
from attention_monitor.naming import head_name
from attention_monitor.plots.fonts import missing_glyphs
from gpt import InputError
from gpt.checkpoint import load_checkpoint
from gpt.model import GPT, GPTConfig
from gpt.tokenizer import load_bytes, saved_tokenizer
from inspection import report
from inspection.subjects import load_subject

ROOT = Path(__file__).parents[1]
TEXT = "The cat sat on the mat."


def write_checkpoint(path, step=7, seed=0, **shape):
    """As train.py's, with random weights large enough for heads to differ."""
    torch.manual_seed(seed)
    config = {"vocab_size": 256, "block_size": 64, "n_layer": 2, "n_head": 3, "n_embd": 12} | shape
    gpt = GPT(GPTConfig(**config))
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "c_attn" in name or "w" in name.split(".")[-2][:1]:
                parameter.normal_()
    torch.save(
        {
            "hyper_parameters": vars(gpt.config),
            "state_dict": {f"gpt.{name}": weight for name, weight in gpt.state_dict().items()},
            "TextDataModule": {"tokenizer": saved_tokenizer(load_bytes())},
            "global_step": step,
        },
        path,
    )
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.ckpt")


def write_folder(folder, model, special=False):
    """As save_pretrained writes them, with a tokenizer of bytes."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if special:
        tokens = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    )


def bert():
    config = transformers.BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config)


def t5():
    config = transformers.T5Config(vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def run(capsys, *args):
    analyze.main([str(arg) for arg in args])
    return capsys.readouterr()


def as_json(capsys, *args):
    return json.loads(run(capsys, *args, "--json").out)


def test_pictures_of_heads_layers_and_over_layers_are_written(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(capsys, "--checkpoint", checkpoint, "--text", TEXT)
    expected = {f"layer_{layer}_head_{head}.png" for layer in range(2) for head in range(3)}
    expected |= {f"layer_{layer}_all_heads.png" for layer in range(2)}
    expected |= {"layers_averaged.png", "attention_flow.png", "rollout.png"}
    expected |= {f"matrix_{name}.png" for name in ("entropy", "max_weight", "mean_distance")}
    found = {path.name for path in (tmp_path / "attention_plots").iterdir()}
    assert found == expected
    assert f"{len(expected)} pictures are in attention_plots" in printed.err
    for name in found:
        with Image.open(tmp_path / "attention_plots" / name) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_pictures_of_heads_are_those_of_plot_head(checkpoint, tmp_path, capsys):
    from attention_monitor import plot_head

    run(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--output-dir", tmp_path / "out")
    maps = load_subject(checkpoint).read(TEXT)
    for layer in range(2):
        for head in range(3):  # each is painted over the one before
            file = io.BytesIO()
            ax = plot_head(maps.pattern(layer)[head], maps.tokens, title=head_name(layer, head))
            ax.figure.savefig(file, dpi=100)
            with Image.open(file) as one, Image.open(tmp_path / "out" / f"layer_{layer}_head_{head}.png") as other:
                a, b = (
                    torch.frombuffer(bytearray(x.convert("RGB").tobytes()), dtype=torch.uint8) for x in (one, other)
                )
            assert one.size == other.size
            assert (a.int() - b.int()).abs().gt(8).float().mean() < 0.002  # the edges of the frame


def test_tables_and_json_have_what_capture_saw(checkpoint, capsys):
    found = as_json(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--top-k", 3)
    gpt = load_checkpoint(checkpoint).gpt
    with torch.no_grad(), capture(gpt) as calls:
        gpt(torch.tensor([list(TEXT.encode())]))
    assert found["tokens"] == list(TEXT)
    assert [layer["site"] for layer in found["layers"]] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    for layer, call in zip(found["layers"], calls, strict=True):
        pattern = call.pattern()[0]
        for head in layer["heads"]:
            weights = pattern[head["head"]]
            for query, row in enumerate(head["attended"]):
                assert len(row) == min(3, query + 1)
                for one in row:
                    assert one["weight"] == pytest.approx(weights[query, one["key"]].item())
                    assert one["token"] == TEXT[one["key"]]
                assert row[0]["weight"] == pytest.approx(weights[query].max().item())
            statistics = head["statistics"]
            assert statistics["max_weight"] == pytest.approx(weights[1:].amax(-1).mean().item(), abs=1e-5)
            assert 0 <= statistics["entropy"] <= statistics["max_entropy"]
            assert head["repeated_tokens"].keys() == {"induction", "duplicate_token", "previous_token"}
        mean = [sum(one["weight"] for one in row) for row in layer["attended"][:3]]
        assert mean == [pytest.approx(1)] * 3  # all their keys are listed
    entropy = {head["name"]: head["statistics"]["normalized_entropy"] for la in found["layers"] for head in la["heads"]}
    assert found["remarkable"]["most focused"]["name"] == min(entropy, key=entropy.get)
    assert found["remarkable"]["most diffuse"]["name"] == max(entropy, key=entropy.get)
    ranked = [one["value"] for one in found["induction_ranking"]]
    assert len(ranked) == 6
    assert ranked == sorted(ranked, reverse=True)


def test_the_terminal_shows_the_same_numbers(checkpoint, capsys, tmp_path):
    common = ["--checkpoint", checkpoint, "--text", TEXT, "--layer", 1, "--head", 2]
    found = as_json(capsys, *common)
    printed = run(capsys, *common, "--output-dir", tmp_path).out
    [head] = found["layers"][0]["heads"]
    assert "L01H02" in printed
    assert f"{head['statistics']['entropy']:.2f}" in printed
    assert f"{head['repeated_tokens']['induction']:.2f}" in printed
    last = head["attended"][-1][0]
    assert f"{last['token'].replace(' ', '·')} {last['weight']:.2f}" in printed
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".png") == ["layer_1_head_2.png"]


def test_json_draws_nothing_unless_a_folder_is_given(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_json(capsys, "--checkpoint", checkpoint, "--text", TEXT)
    assert not (tmp_path / "attention_plots").exists()
    as_json(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--output-dir", "here", "--layer", 0)
    assert (tmp_path / "here" / "layer_0_all_heads.png").exists()
    assert not (tmp_path / "here" / "layers_averaged.png").exists()


def test_heads_that_are_drawn_are_bounded_but_told(checkpoint, tmp_path, capsys):
    printed = run(
        capsys, "--checkpoint", checkpoint, "--text", TEXT, "--max-heads", 2, "--output-dir", tmp_path / "out"
    )
    assert "2 heads of a layer are drawn; --max-heads 3 draws all" in printed.err
    assert not (tmp_path / "out" / "layer_0_head_2.png").exists()
    assert "L00H02" in printed.out


def test_a_model_of_many_heads_lists_the_most_focused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "LISTED", 4)
    path = write_checkpoint(tmp_path / "many.ckpt")
    found = as_json(capsys, "--checkpoint", path, "--text", TEXT)
    entropy = {
        f"L{layer['layer']:02d}H{head['head']:02d}": head["statistics"]["normalized_entropy"]
        for layer in found["layers"]
        for head in layer["heads"]
    }
    printed = run(capsys, "--checkpoint", path, "--text", TEXT, "--output-dir", tmp_path / "out").out
    table = printed.split("Most focused head")[0]
    assert "The 4 most focused of 6 heads" in table
    assert {name for name in entropy if name in table} == set(sorted(entropy, key=entropy.get)[:4])


def test_another_statistic_may_be_drawn(checkpoint, tmp_path, capsys):
    run(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--statistics", "effective_keys", "--output-dir", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("matrix_*")) == ["matrix_effective_keys.png"]
    with pytest.raises(AttentionMonitorError, match="Unknown statistic 'nonsense'"):
        run(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--statistics", "nonsense")


@pytest.mark.parametrize("make", [gpt2, bert])
def test_the_folder_of_a_hugging_face_model_is_read(tmp_path, capsys, make):
    model = make().eval()
    folder = write_folder(tmp_path / "model", model, special=make is bert)
    found = as_json(capsys, "--checkpoint", folder, "--text", "a cat", "--top-k", 9)
    assert found["tokens"] == (["<s>", *"a cat", "</s>"] if make is bert else list("a cat"))
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a cat", return_tensors="pt")["input_ids"]
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    for layer, pattern in zip(found["layers"], expected, strict=True):
        for head in layer["heads"]:
            for query, row in enumerate(head["attended"]):
                assert sum(one["weight"] for one in row) == pytest.approx(1)
                for one in row:
                    assert one["weight"] == pytest.approx(pattern[0, head["head"], query, one["key"]].item(), abs=1e-5)


def test_an_encoder_decoder_reads_a_text_and_a_target(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", t5().eval())
    common = ["--checkpoint", folder, "--text", "a cat", "--output-dir", tmp_path / "out"]
    found = as_json(capsys, *common, "--target", "le")
    assert found["tokens"] == list("a cat")
    assert found["target_tokens"][1:] == list("le")
    assert [len(layer["attended"]) for layer in found["layers"]] == [5, 5, 3, 3, 3, 3]
    assert [layer["label"].split(".")[0] for layer in found["layers"]] == ["encoder"] * 2 + ["decoder"] * 4
    assert found["layers"][5]["heads"][0]["attended"][0][0]["token"] in "a cat"
    assert found["induction_ranking"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"layers_averaged_0.png", "layers_averaged_2.png", "rollout_1.png", "attention_flow_0.png"} <= names
    assert not {"rollout_2.png", "attention_flow_2.png"} & names  # cross-attention
    itself = as_json(capsys, *common)
    assert itself["target_tokens"][1:] == list("a cat")


def test_a_target_is_for_encoder_decoders(checkpoint, capsys):
    with pytest.raises(InputError, match="leave --target out"):
        run(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--target", "x")


def test_an_untrained_model_is_said_to_be_one(capsys, tmp_path):
    config = ROOT / "configs" / "tiny.yaml"
    found = as_json(capsys, "--config", config, "--n-layer", 2, "--text", "Hé")
    assert found["model"]["trained"] is False
    assert len(found["layers"]) == 2
    assert found["tokens"] == ["H", "é", "⋯"]
    printed = run(capsys, "--n-embd", 16, "--text", TEXT, "--output-dir", tmp_path).out
    assert "The weights of this model are random" in printed


def test_two_models_are_compared(tmp_path, capsys):
    before, after = (write_checkpoint(tmp_path / f"{seed}.ckpt", step=seed, seed=seed) for seed in (1, 2))
    common = ["--checkpoint", before, "--compare", after, "--text", TEXT]
    found = as_json(capsys, *common)
    assert found["comparison"]["with"].endswith("2.ckpt, step 2")
    maps = [load_subject(path).read(TEXT) for path in (before, after)]
    for one in found["comparison"]["heads"]:
        a, b = (of.pattern(one["layer"])[one["head"]] for of in maps)
        assert one["value"] == pytest.approx(((a - b).abs().sum(-1) / 2)[1:].mean().item(), abs=1e-5)
    values = [one["value"] for one in found["comparison"]["heads"]]
    assert values == sorted(values, reverse=True)
    printed = run(capsys, *common, "--output-dir", tmp_path / "out").out
    first = found["comparison"]["heads"][0]
    assert f"L{first['layer']:02d}H{first['head']:02d}" in printed.split("Heads that changed most")[1]
    assert f"{first['value']:.2f}" in printed
    assert {"layer_0_difference.png", "layer_1_difference.png", "changes.png"} <= set(os.listdir(tmp_path / "out"))


def test_models_of_other_shapes_are_not_compared(checkpoint, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other.ckpt", n_head=2)
    with pytest.raises(AttentionMonitorError, match="Only models with the same layers and heads"):
        run(capsys, "--checkpoint", checkpoint, "--compare", other, "--text", TEXT, "--json")


def test_roles_that_were_lost_and_taken_on_are_told(tmp_path, capsys, monkeypatch):
    before, after = (write_checkpoint(tmp_path / f"{seed}.ckpt", step=seed, seed=seed) for seed in (1, 2))
    roles = [{"L00H01": ["sink"], "L01H00": ["induction"]}, {"L00H01": ["positional"], "L01H00": ["induction"]}]
    monkeypatch.setattr(report.ModelReading, "roles", property(lambda found: roles[found.subject.step - 1]))
    printed = run(capsys, "--checkpoint", before, "--compare", after, "--text", TEXT, "--output-dir", tmp_path / "out")
    assert "L00H01: no longer sink, now positional" in printed.out
    assert "L01H00:" not in printed.out
    found = as_json(capsys, "--checkpoint", before, "--compare", after, "--text", TEXT)
    assert found["comparison"]["role_changes"] == [
        {"name": "L00H01", "layer": 0, "head": 1, "lost": ["sink"], "taken": ["positional"]}
    ]


@pytest.mark.parametrize("chosen", [[], ["--layer", 0, "--head", 1], ["--layer", 1]])
def test_the_checkpoints_of_a_run_become_an_animation(tmp_path, capsys, chosen):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (300, 5, 40):
        write_checkpoint(folder / f"step={step}.ckpt", step=step, seed=step)
    write_checkpoint(folder / "last.ckpt", step=300, seed=300)
    printed = run(capsys, "--animate", folder, "--text", TEXT, "--output-dir", tmp_path / "out", *chosen).err
    assert "over 3 checkpoints, steps 5 to 300" in printed
    [gif] = (tmp_path / "out").iterdir()
    with Image.open(gif) as frames:
        assert frames.n_frames == 3
    first, last = (load_subject(folder / f"step={step}.ckpt").read(TEXT) for step in (5, 300))
    changes = {
        (layer, head): ((first.pattern(layer)[head] - last.pattern(layer)[head]).abs().sum(-1) / 2)[1:].mean().item()
        for layer in range(2)
        for head in range(3)
        if (not chosen or layer == chosen[1]) and (len(chosen) < 4 or head == chosen[3])
    }
    layer, head = max(changes, key=changes.get)
    assert gif.name == f"layer_{layer}_head_{head}.gif"


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"n_head": 2}, "sizes of maps"),
        ({"n_layer": 1}, "layers are"),
        ({"block_size": 8}, "tokens are"),  # it reads less
    ],
)
def test_a_checkpoint_of_another_run_among_those_of_an_animation_is_named(tmp_path, capsys, odd, message):
    for step in (1, 3):
        write_checkpoint(tmp_path / f"{step}.ckpt", step=step)
    write_checkpoint(tmp_path / "2.ckpt", step=2, **odd)
    with pytest.raises(InputError, match=rf"2.ckpt is not of the same run as those before it.*{message}"):
        run(capsys, "--animate", tmp_path, "--text", TEXT, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_animation_takes_two_steps(tmp_path, capsys):
    for name in ("a", "last"):
        write_checkpoint(tmp_path / f"{name}.ckpt", step=5)
    with pytest.raises(InputError, match="are of step 5; an animation takes two steps"):
        run(capsys, "--animate", tmp_path, "--text", TEXT)


@pytest.mark.parametrize("n", [0, 1])
def test_an_animation_takes_two_checkpoints(tmp_path, capsys, n):
    for i in range(n):
        write_checkpoint(tmp_path / f"{i}.ckpt")
    with pytest.raises(InputError, match=f"has {n} .ckpt files; an animation takes a folder with two or more"):
        run(capsys, "--animate", tmp_path, "--text", TEXT)


def test_of_a_text_that_is_too_long_the_last_part_is_read(checkpoint, tmp_path, capsys):
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    found = as_json(capsys, "--checkpoint", checkpoint, "--text", text)
    assert found["tokens"] == list(text[-64:])
    assert "The text has 100 tokens, and there is room for 64: the last 64 are looked at" in found["notes"][0]
    folder = write_folder(tmp_path / "model", bert().eval(), special=True)
    found = as_json(capsys, "--checkpoint", folder, "--text", text)
    assert found["tokens"] == ["<s>", *text[-30:], "</s>"]


def test_one_token_is_looked_at(checkpoint, tmp_path, capsys):
    common = ["--checkpoint", checkpoint, "--text", "a"]
    found = as_json(capsys, *common)
    assert found["layers"][0]["heads"][0]["attended"] == [[{"key": 0, "token": "a", "weight": 1.0}]]
    assert found["layers"][0]["heads"][0]["statistics"]["entropy"] is None
    assert found["remarkable"]["most focused"] is None
    assert "a 1.00" in run(capsys, *common, "--output-dir", tmp_path / "out").out
    assert (tmp_path / "out" / "rollout.png").exists()


def test_strange_texts_are_shown_as_they_are_and_nothing_is_interpreted(checkpoint, tmp_path, capsys):
    text = "[red]x[/] \x1b[31m 🙂 שלום $\\frac$ \u202e"
    printed = run(capsys, "--checkpoint", checkpoint, "--text", text, "--output-dir", tmp_path / "out")
    assert "\x1b" not in printed.out + printed.err
    assert "\u202e" not in printed.out + printed.err
    assert "🙂" in printed.out
    assert ("No installed font has" in printed.err) == bool(missing_glyphs(text))  # with or without a font of emoji
    assert as_json(capsys, "--checkpoint", checkpoint, "--text", text)["text"] == text


def test_a_text_comes_from_a_file_or_standard_input(checkpoint, tmp_path, capsys, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("ß 🙂", encoding="utf-8")
    assert as_json(capsys, "--checkpoint", checkpoint, "--file", file)["text"] == "ß 🙂"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("née".encode())))
    assert as_json(capsys, "--checkpoint", checkpoint, "--file", "-")["text"] == "née"
    windows = b"\xef\xbb\xbfone\r\ntwo"
    file.write_bytes(windows)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(windows)))
    texts = [as_json(capsys, "--checkpoint", checkpoint, "--file", path)["text"] for path in (file, "-")]
    assert texts == ["one\ntwo"] * 2
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8"):
        run(capsys, "--checkpoint", checkpoint, "--file", file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        run(capsys, "--checkpoint", checkpoint, "--file", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", ""], "The text is empty"),
        (["--text", "a", "--layer", "2"], "There is no layer 2: this model has layers 0 to 1"),
        (["--text", "a", "--layer", "-1"], "There is no layer -1"),
        (["--text", "a", "--head", "3"], "There is no head 3: layer 0 has heads 0 to 2"),
        (["--text", "a", "--device", "nonsense"], "The device 'nonsense' cannot be used here"),
        (["--text", "a", "--device", "cuda:99"], "The device 'cuda:99' cannot be used here"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(checkpoint, capsys, options, message):
    with pytest.raises(InputError, match=message):
        run(capsys, "--checkpoint", checkpoint, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --text --file is required"),
        (["--text", "a", "--file", "b"], "not allowed with argument"),
        (["--text", "a", "--checkpoint", "x", "--n-layer", "3"], "--n-layer is for an untrained model"),
        (["--text", "a", "--compare", "x"], "--compare needs a --checkpoint"),
        (["--text", "a", "--animate", "x", "--json"], "--animate makes a GIF and nothing else; leave --json out"),
        (["--text", "a", "--animate", "x", "--checkpoint", "y"], "leave --checkpoint out"),
        (["--text", "a", "--animate", "x", "--n-head", "2"], "--n-head is for an untrained model"),
        (["--text", "a", "--max-heads", "0"], "--max-heads must be 1 or more, got 0"),
        (["--text", "a", "--top-k", "-1"], "--top-k must be 1 or more, got -1"),
        (["--text", "a", "--layer", "x"], "invalid int value: 'x'"),
    ],
)
def test_options_that_make_no_sense_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes_and_configs_that_cannot_be_are_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="n_embd=10 is not divisible by n_head=4"):
        run(capsys, "--n-embd", 10, "--text", "a")
    with pytest.raises(InputError, match=r"The config .*nothing.yaml cannot be read"):
        run(capsys, "--config", tmp_path / "nothing.yaml", "--text", "a")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match=r"is not a config of train.py"):
        run(capsys, "--config", tmp_path / "list.yaml", "--text", "a")


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_weights_of_a_folder_that_want_to_run_code_are_refused_and_not_run(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "model", gpt2())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(InputError, match=r"The model in .*model could not be loaded"):
        run(capsys, "--checkpoint", folder, "--text", "a")
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"The model in .*model could not be loaded"):
        run(capsys, "--checkpoint", folder, "--text", "a")
    assert not ran


def test_a_model_that_brings_its_own_code_is_refused_and_not_run(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", gpt2())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match=r"The model in .*model could not be loaded"):
        run(capsys, "--checkpoint", folder, "--text", "a")


def test_folders_that_are_no_models_are_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"has no config.json"):
        run(capsys, "--checkpoint", tmp_path, "--text", "a")
    bert().save_pretrained(tmp_path / "no_tokenizer")
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        run(capsys, "--checkpoint", tmp_path / "no_tokenizer", "--text", "a")
    with pytest.raises(InputError, match="does not exist"):
        run(capsys, "--checkpoint", tmp_path / "nothing", "--text", "a")


def test_weights_that_a_folder_does_not_have_are_not_made_up(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", gpt2())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(
        InputError, match=r"are not those of its config.json: 12 are missing or of another shape, such as"
    ):
        run(capsys, "--checkpoint", folder, "--text", "a")
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 8}))
    with pytest.raises(InputError, match=r"are not those of its config.json"):
        run(capsys, "--checkpoint", folder, "--text", "a")
    without_pooler = transformers.BertModel(bert().config, add_pooling_layer=False)
    folder = write_folder(tmp_path / "bert", without_pooler, special=True)
    assert as_json(capsys, "--checkpoint", folder, "--text", "a")["tokens"] == ["<s>", "a", "</s>"]


def test_a_tokenizer_of_another_model_is_told(tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=90, n_embd=16, n_layer=1, n_head=4, n_positions=32)
    folder = write_folder(tmp_path / "model", transformers.GPT2LMHeadModel(config))
    with pytest.raises(InputError, match=r"makes token \d+ of the text, and the model knows 90 tokens"):
        run(capsys, "--checkpoint", folder, "--text", "zz")


def test_a_model_that_reads_no_text_is_told(tmp_path, capsys):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    folder = write_folder(tmp_path / "model", transformers.ViTModel(config))
    with pytest.raises(InputError, match=r"reads pixel_values, not text \(ViTModel\)"):
        run(capsys, "--checkpoint", folder, "--text", "a")


def test_an_empty_target_is_called_one(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", t5())
    with pytest.raises(InputError, match="The target is empty"):
        run(capsys, "--checkpoint", folder, "--text", "a", "--target", "")


def test_attention_that_is_not_finite_is_told(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "broken.ckpt")
    state = torch.load(path, weights_only=True)
    state["state_dict"]["gpt.transformer.h.1.attn.c_attn.weight"][0, 0] = torch.nan
    torch.save(state, path)
    notes = as_json(capsys, "--checkpoint", path, "--text", TEXT)["notes"]
    assert "There is NaN or infinity in the attention of 1 heads, such as L01H00." in notes
    healthy = write_checkpoint(tmp_path / "healthy.ckpt")
    run(capsys, "--checkpoint", healthy, "--compare", path, "--text", TEXT, "--output-dir", tmp_path / "out")
    assert (tmp_path / "out" / "layer_1_difference.png").exists()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_names_and_numbers_are_never_cut(checkpoint, width):
    console = Console(width=width, file=io.StringIO())
    found = report.look(load_subject(checkpoint), TEXT, None, ["entropy"])
    report.tell(console, found, [(0, range(3)), (1, range(3))], 5, of_heads=False)
    printed = console.file.getvalue()
    table = printed[: printed.index("Most focused head")]
    assert "…" not in table
    for layer in range(2):
        for head in range(3):
            assert f"L{layer:02d}H{head:02d}" in table
            assert f"{found.snapshot.values[layer]['entropy'][head]:.2f}" in table
    assert ("distance" in table) == (width == 160)
    assert max(map(len, table.splitlines()[1:])) <= width


def test_the_folder_is_made_before_anything_is_told(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"The output folder .*file/sub cannot be made: Not a directory"):
        run(capsys, "--checkpoint", checkpoint, "--text", TEXT, "--output-dir", tmp_path / "file" / "sub")
    assert capsys.readouterr().out == ""


def test_standard_input_that_is_closed_is_told(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="Standard input is closed"):
        run(capsys, "--checkpoint", checkpoint, "--file", "-")


def test_windows_are_opened_only_where_there_is_a_screen(checkpoint, tmp_path, capsys, monkeypatch):
    import matplotlib.pyplot as plt

    common = ["--checkpoint", checkpoint, "--text", TEXT, "--show-plots", "--output-dir", tmp_path / "out"]
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    monkeypatch.setattr(plt, "get_backend", lambda: "agg")
    assert "There is no screen" in run(capsys, *common).err
    assert not shown
    monkeypatch.setattr(plt, "get_backend", lambda: "qtagg")
    run(capsys, *common)
    assert len(shown) == 12
    plt.close("all")


def test_the_command_starts_at_once_and_ends_in_one_sentence_when_it_cannot_go_on(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "analyze.py"), "--checkpoint", "nothing.ckpt", "--text", "a"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "analyze.py: error: The checkpoint nothing.ckpt does not exist.\n"
    assert time.perf_counter() - start < 15  # 2 s on a quiet machine
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(ROOT / "analyze.py"), "--checkpoint", checkpoint, "--text", "a", "--layer", "0"]
    result = subprocess.run([*command, "--output-dir", tmp_path / "file"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "analyze.py: error: " in result.stderr
