"""What is captured from real architectures is what transformers itself returns under eager attention."""

from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers.integrations.flex_attention import WrappedFlexAttention

from attention_monitor import capture, summarize

V, B, T = 97, 2, 9
N = 2  # layers
DECODER = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
OLD = {"vocab_size": V, "n_embd": 32, "n_layer": N, "n_head": 4, "n_positions": 64}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": N,
    "decoder_layers": N,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def tokens(**more):
    return {"input_ids": torch.randint(4, V, (B, T)), **more}


def padded(left=False):
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, slice(0, 3) if left else slice(-3, None)] = 0
    return tokens(attention_mask=mask)


def images(size=16):
    return {"pixel_values": torch.randn(B, 3, size, size)}


def translation():  # source and target of equal lengths: nothing but their origin tells them apart
    return {**padded(), "decoder_input_ids": torch.randint(4, V, (B, T))}


def self_sites(path):
    return lambda: [(path.format(i), True) for i in range(N)]


def seq2seq_sites(encoder, decoder, cross):
    def sites():
        decoding = [site for i in range(N) for site in ((decoder.format(i), True), (cross.format(i), False))]
        return [(encoder.format(i), True) for i in range(N)] + decoding

    return sites


def attentions(out):
    return out.attentions


def seq2seq_attentions(out):
    decoding = [a for pair in zip(out.decoder_attentions, out.cross_attentions, strict=True) for a in pair]
    return [*out.encoder_attentions, *decoding]


@dataclass
class Case:
    """An architecture, small and random.

    Attributes:
        config: class and options.
        model: class.
        inputs: makes them.
        sites: (path, is self-attention), in order of execution.
        expected: the library's own patterns, in the same order, from its output.
        implementations: of attention that it has on a CPU.
    """

    config: tuple
    model: str
    inputs: object
    sites: object
    expected: object = attentions
    implementations: tuple = ("eager", "sdpa", "flex_attention")


NO_FLEX = ("eager", "sdpa")
EAGER = ("eager",)
LLAMA = self_sites("model.layers.{}.self_attn")
BART = seq2seq_sites(
    "model.encoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.encoder_attn"
)

CASES = {
    "gpt2": Case(("GPT2", OLD), "GPT2LMHeadModel", padded, self_sites("transformer.h.{}.attn"),
                 implementations=NO_FLEX),
    "llama": Case(("Llama", GROUPED), "LlamaForCausalLM", lambda: padded(left=True), LLAMA),
    "mistral": Case(("Mistral", {**GROUPED, "sliding_window": 4}), "MistralForCausalLM", tokens, LLAMA),
    "qwen2": Case(("Qwen2", {**DECODER, "num_key_value_heads": 2}), "Qwen2ForCausalLM", padded, LLAMA),
    "qwen3": Case(("Qwen3", GROUPED), "Qwen3ForCausalLM", padded, LLAMA),
    "bert": Case(("Bert", DECODER), "BertForMaskedLM", padded, self_sites("bert.encoder.layer.{}.attention.self")),
    "vit": Case(("ViT", IMAGES), "ViTForImageClassification", images, self_sites("vit.layers.{}.attention")),
    "t5": Case(
        ("T5", {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": N, "num_heads": 4,
                "decoder_start_token_id": 0}),
        "T5ForConditionalGeneration", translation,
        seq2seq_sites("encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention",
                      "decoder.block.{}.layer.1.EncDecAttention"),
        seq2seq_attentions, NO_FLEX,  # under flex on a CPU it fails by itself
    ),
    "bart": Case(("Bart", SEQ2SEQ), "BartForConditionalGeneration", translation, BART, seq2seq_attentions),
    "clip": Case(
        ("CLIP", {"text_config": {**DECODER, "projection_dim": 16}, "vision_config": {**IMAGES, "projection_dim": 16},
                  "projection_dim": 16}),
        "CLIPModel", lambda: {**tokens(), **images()},
        lambda: [(f"{tower}_model.encoder.layers.{i}.self_attn", True) for tower in ("vision", "text") for i in (0, 1)],
        lambda out: [*out.vision_model_output.attentions, *out.text_model_output.attentions],
    ),
    # further kinds: soft-capped scores, experts with routers, learned sinks, layers shared over depth, scores from
    # several products, einsum, alibi, scaled after the mask, several towers, learned queries
    "gemma2": Case(("Gemma2", {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8}), "Gemma2ForCausalLM",
                   padded, LLAMA, implementations=("eager", "flex_attention")),
    "mixtral": Case(("Mixtral", {**GROUPED, "num_local_experts": 4}), "MixtralForCausalLM", padded, LLAMA,
                    implementations=NO_FLEX),
    "gpt_oss": Case(("GptOss", {**GROUPED, "num_local_experts": 4, "sliding_window": 4}), "GptOssForCausalLM", padded,
                    LLAMA, implementations=EAGER),
    "albert": Case(
        ("Albert", {**DECODER, "embedding_size": 16}), "AlbertForMaskedLM", padded,
        lambda: [(f"albert.encoder.albert_layer_groups.0.albert_layers.0.attention[{i}]", True) for i in range(N)],
        implementations=NO_FLEX,
    ),
    "deberta": Case(
        ("DebertaV2", {**DECODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}), "DebertaV2ForMaskedLM",
        padded, self_sites("deberta.encoder.layer.{}.attention.self"), implementations=EAGER,
    ),
    "xlnet": Case(("XLNet", {"vocab_size": V, "d_model": 32, "n_layer": N, "n_head": 4, "d_inner": 64}),
                  "XLNetLMHeadModel", padded, self_sites("transformer.layer.{}.rel_attn"), implementations=EAGER),
    "bloom": Case(("Bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": N, "n_head": 4}), "BloomForCausalLM",
                  padded, self_sites("transformer.h.{}.self_attention"), implementations=EAGER),
    "mpt": Case(("Mpt", {"vocab_size": V, "d_model": 32, "n_layers": N, "n_heads": 4, "max_seq_len": 64}),
                "MptForCausalLM", padded, self_sites("transformer.blocks.{}.attn"), implementations=EAGER),
    "gpt_neo": Case(
        ("GPTNeo", {"vocab_size": V, "hidden_size": 32, "num_layers": N, "num_heads": 4, "window_size": 4,
                    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}),
        "GPTNeoForCausalLM", padded, self_sites("transformer.h.{}.attn.attention"), implementations=EAGER,
    ),
    "modernbert": Case(("ModernBert", {**DECODER, "local_attention": 4}), "ModernBertForMaskedLM", padded,
                       self_sites("model.layers.{}.attn"), implementations=NO_FLEX),
    "fsmt": Case(
        ("FSMT", {**SEQ2SEQ, "src_vocab_size": V, "tgt_vocab_size": V, "langs": ["a", "b"]}),
        "FSMTForConditionalGeneration", translation, BART, seq2seq_attentions, EAGER,
    ),
    "whisper": Case(
        ("Whisper", {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64}),
        "WhisperForConditionalGeneration",
        lambda: {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": torch.randint(4, V, (B, T))},
        BART, seq2seq_attentions, NO_FLEX,
    ),
    "perceiver": Case(
        ("Perceiver", {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1,
                       "num_self_attends_per_block": N, "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
                       "vocab_size": V, "max_position_embeddings": T}),
        "PerceiverForMaskedLM", padded,
        lambda: [("perceiver.encoder.cross_attention.attention.self", False),
                 *((f"perceiver.encoder.self_attends.{i}.attention.self", True) for i in range(N)),
                 ("perceiver.decoder.decoding_cross_attention.attention.self", False)],
        lambda out: [out.cross_attentions[0], *out.attentions, *out.cross_attentions[1:]], EAGER,
    ),
}  # fmt: skip


def make(case, implementation):
    name, options = case.config
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, case.model)._from_config(config, attn_implementation=implementation).eval()


def tensors(out):
    return [value for value in out.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, implementation) for name, case in CASES.items() for implementation in case.implementations],
)
def test_captured_patterns_are_the_library_s_own(name, implementation, recwarn):
    case = CASES[name]
    if implementation == "flex_attention":
        torch._dynamo.reset()  # it compiles anew for every shape, and gives up after eight
        WrappedFlexAttention._instance = None
    torch.manual_seed(1)
    inputs = case.inputs()
    eager, model = make(case, "eager"), make(case, implementation)
    with torch.no_grad():
        reference = eager(**inputs, output_attentions=True)
        plain = model(**inputs)
        with capture(model) as calls:
            watched = model(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(watched), strict=True))
    assert [(call.site, call.is_self_attention) for call in calls] == case.sites()
    for call, expected in zip(calls, case.expected(reference), strict=True):
        pattern = call.pattern()
        assert pattern.shape == expected.shape
        if pattern.shape[2] == T and "attention_mask" in inputs:  # what padding looks at is up to the implementation
            real = inputs["attention_mask"].bool()[:, None, :, None]
            pattern, expected = pattern * real, expected * real
        torch.testing.assert_close(pattern, expected, atol=1e-5, rtol=0)
    assert [str(w.message) for w in recwarn if "attention_monitor" in str(w.message)] == []


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_statistics_do_not_depend_on_the_implementation(name):
    torch.manual_seed(1)
    inputs, summaries = CASES[name].inputs(), []
    for implementation in NO_FLEX:
        with torch.no_grad(), capture(model := make(CASES[name], implementation)) as calls:
            model(**inputs)
        summaries.append([summarize(call) for call in calls])
    for one, other in zip(*summaries, strict=True):
        for statistic in one:
            torch.testing.assert_close(one[statistic], other[statistic], atol=1e-5, rtol=1e-5, msg=statistic)


def test_padding_is_left_out_of_the_statistics():
    torch.manual_seed(1)
    inputs = padded()
    model = make(CASES["bert"], "sdpa")
    with torch.no_grad(), capture(model) as calls:
        model(**inputs)
        for sequence in (0, 1):
            length = int(inputs["attention_mask"][sequence].sum())
            model(input_ids=inputs["input_ids"][sequence : sequence + 1, :length])
    both, short, long = (summarize(calls[i])["entropy"] for i in (0, 2, 4))
    torch.testing.assert_close(both, (short * (T - 3) + long * T) / (2 * T - 3))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_generation_with_a_cache(name):
    """Each token after the first is one query that looks at all keys so far."""
    model = make(CASES[name], "sdpa")
    prompt = torch.randint(4, V, (1, 5))
    with torch.no_grad():
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        plain = model.generate(prompt, **options)
        with capture(model) as calls:
            watched = model.generate(prompt, **options)
        assert torch.equal(plain, watched)
    decoding = [call for call in calls if "encoder." not in call.site]
    own = [call for call in decoding if call.is_self_attention]
    assert {call.site for call in own} == {
        site for site, is_self in CASES[name].sites() if is_self and "encoder." not in site
    }
    first = 5 if name in ("gpt2", "llama") else 1
    lengths = [call.shape[2:] for call in own if call.site == own[0].site]
    assert lengths == [(first, first)] + [(1, first + i) for i in range(1, 4)]
    assert all(call.query_offset == call.shape[3] - call.shape[2] for call in own)
    cross = [call for call in decoding if not call.is_self_attention]
    assert all(call.shape[3] == 5 for call in cross)
    assert len(cross) == (4 * N if name in ("t5", "bart") else 0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_with_gradient_checkpointing_is_counted_once(use_reentrant):
    model = make(CASES["gpt2"], "sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs = tokens()
    with capture(model) as calls:  # also where the backward pass, which runs every forward again, is inside
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [call.site for call in calls] == ["transformer.h.0.attn", "transformer.h.1.attn"]
