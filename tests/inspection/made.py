"""Models of many kinds, small and with random weights, and their folders."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ["<s>", "<pad>", "</s>"]
V = 256 + len(SPECIAL)
TEXT = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BOTH = {
    "vocab_size": V, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 0, "pad_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "pad_token_id": 1}
IMAGES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def made(config):
    """The model that a folder of that config is loaded as, with weights large enough for heads to differ."""
    return differing(transformers.AutoModel.from_config(config))


def differing(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.5)
    return model.eval()


def save(folder, model, **options):
    """A model with a tokenizer of bytes, that puts text between <s> and </s>."""
    model.save_pretrained(folder)
    tokenizer_of_bytes(**options).save_pretrained(folder)
    return folder


def tokenizer_of_bytes(**options):
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", **options
    )


def gpt2():
    return made(transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=34))


def bert(**options):
    return made(transformers.BertConfig(**TEXT, max_position_embeddings=34, **options))


def roberta():
    return made(transformers.RobertaConfig(**TEXT, max_position_embeddings=34))


def longformer():
    return made(transformers.LongformerConfig(**TEXT, max_position_embeddings=34, attention_window=8))


def opt():
    config = {k: v for k, v in TEXT.items() if k != "intermediate_size"}
    return made(transformers.OPTConfig(**config, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=32))


def llama():
    return made(transformers.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=64))


def bart():
    return made(transformers.BartConfig(**BOTH, max_position_embeddings=32))


def led():
    limits = {"max_encoder_position_embeddings": 45, "max_decoder_position_embeddings": 32}
    return made(transformers.LEDConfig(**BOTH, **limits, attention_window=8))


def pegasus_x():
    return made(transformers.PegasusXConfig(**BOTH, num_global_tokens=20, block_size=8))


def big_bird():
    sizes = {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 2048}
    return made(transformers.BigBirdConfig(**TEXT, **sizes))


def t5():
    return made(transformers.T5Config(**T5, decoder_start_token_id=1))


def long_t5():
    return made(transformers.LongT5Config(**T5, decoder_start_token_id=1, local_radius=4))


def vit():
    return made(transformers.ViTConfig(**IMAGES))


def clip():
    texts = TEXT | {"max_position_embeddings": 34, "projection_dim": 8}
    images = IMAGES | {"projection_dim": 8}
    return made(transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=8))


def llava():
    texts = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=64)
    images = transformers.CLIPVisionConfig(**IMAGES)
    return made(transformers.LlavaConfig(text_config=texts, vision_config=images, image_token_index=3))


def bert_and_gpt2():
    decoder = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, add_cross_attention=True)
    return differing(transformers.EncoderDecoderModel(encoder=bert(), decoder=transformers.GPT2LMHeadModel(decoder)))


def vit_and_bert():
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    return differing(
        transformers.VisionEncoderDecoderModel(encoder=vit(), decoder=transformers.BertLMHeadModel(decoder))
    )
