import json
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import InputError
from gpt.model import GPT, GPTConfig

SMALL = {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def test_a_hugging_face_checkpoint_gives_the_same_logits(tmp_path):
    config = GPT2Config(vocab_size=50, n_positions=16, n_layer=2, n_head=4, n_embd=32, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # away from the initial zeros and ones
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_huggingface(tmp_path).eval()
    tokens = torch.randint(50, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_a_checkpoint_in_torchs_own_format_is_read_without_running_its_code(tmp_path):
    config = GPT2Config(vocab_size=50, n_positions=16, n_layer=1, n_head=2, n_embd=8, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    tokens = torch.randint(50, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_huggingface(tmp_path).eval()(tokens), theirs(tokens).logits)

    class Malicious:
        def __reduce__(self):
            return (print, ("code was run",))

    torch.save({"wte.weight": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights only|WeightsUnpickler"):
        GPT.from_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "type 'llama'; only 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function='relu'; only 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True; only False"),
        ({"n_inner": 7}, "n_inner=7; only None"),
    ],
)
def test_a_checkpoint_that_would_compute_something_else_is_refused(tmp_path, change, message):
    config = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        GPT.from_huggingface(tmp_path)


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        GPT.from_huggingface(tmp_path)
    config = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4, "n_layer": 1, "n_head": 1, "n_embd": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        GPT.from_huggingface(tmp_path)


def test_gpt2_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    model.requires_grad_(False)
    block = model.transformer.h[3]
    assert model.transformer.wte.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.attn.c_attn.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.attn.c_proj.weight.std() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.mlp.c_proj.weight.std() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.mlp.c_fc.bias.any()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"bias": False}])
def test_later_tokens_do_not_change_earlier_logits(options):
    model = GPT(GPTConfig(**SMALL, **options)).eval()
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 50
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.equal(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_shared_key_heads_equal_full_heads_with_repeated_weights():
    shared = GPT(GPTConfig(**SMALL, n_kv_head=2)).eval()
    full = GPT(GPTConfig(**SMALL)).eval()
    state = shared.state_dict()
    for name, value in list(state.items()):
        if "c_attn" in name:
            q, k, v = value.split([32, 16, 16])
            k, v = (x.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
            state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    tokens = torch.randint(50, (2, 16))
    torch.testing.assert_close(full(tokens), shared(tokens))


def test_qk_norm_bounds_the_scores(monkeypatch):
    model = GPT(GPTConfig(**SMALL, qk_norm=True))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(1e4)
    largest = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, *a, **kw: (largest.append((q @ k.mT).abs().max().item()), original(q, k, *a, **kw))[1],
    )
    model(torch.randint(50, (1, 16)))
    assert largest[0] <= 8 * 1.001  # two vectors of 8 entries, each of mean square 1


def test_activation_checkpointing_changes_no_gradient():
    plain = GPT(GPTConfig(**SMALL))
    saving = GPT(GPTConfig(**SMALL, activation_checkpointing=True))
    saving.load_state_dict(plain.state_dict())
    tokens = torch.randint(50, (2, 16))
    for model in (plain, saving):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 30}, "n_embd=30 is not divisible by n_head=4: every head gets n_embd / n_head dimensions; choose"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"n_kv_head": 0}, "n_head=4 is not divisible by n_kv_head=0"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_head": -1}, "n_head must be at least 1, got -1"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**{**SMALL, **change})


def test_a_sequence_longer_than_the_context_is_refused():
    message = re.escape("got 17 tokens but the model's context is block_size=16")
    with pytest.raises(InputError, match=message):
        GPT(GPTConfig(**SMALL))(torch.zeros(1, 17, dtype=torch.long))
