"""Folders of Hugging Face models, as ``save_pretrained`` writes them."""

from pathlib import Path
from typing import Any

from gpt import InputError

from .subject import Subject


def load_folder(folder: Path) -> Subject:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json; give a .ckpt file of train.py, or a folder that save_pretrained() wrote."
        )
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            'A Hugging Face model needs the package transformers: pip install "attention-monitor[transformers]".'
        ) from error
    transformers.logging.set_verbosity_error()  # what it says of unused weights and long texts is not for here
    transformers.logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, found = transformers.AutoModel.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **local
        )
    except Exception as error:  # whatever a folder may bring about
        raise InputError(f"The model in {folder} could not be loaded: {first_line(error)}") from error
    # what is not there would be made up; a pooler stands behind the last layer, and many models are saved without one
    absent = sorted({str(name) for name in found["missing_keys"]} | {str(key[0]) for key in found["mismatched_keys"]})
    absent = [name for name in absent if "pooler" not in name]
    if absent:
        raise InputError(
            f"The weights in {folder} are not those of its config.json: {len(absent)} are missing or of another shape, "
            f"such as {absent[0]}."
        )
    if model.main_input_name != "input_ids":
        raise InputError(f"The model in {folder} reads {model.main_input_name}, not text ({type(model).__name__}).")
    tokenizer, reason = None, "it has no such files"  # of which transformers would make up an empty one
    if any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken")):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:
            reason = first_line(error)
    if tokenizer is None:
        raise InputError(
            f"The model in {folder} has no tokenizer that can be loaded ({reason}); save one into its folder with "
            "tokenizer.save_pretrained()."
        )
    config = model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    if getattr(config, "model_type", "") in ("t5", "mt5", "umt5"):
        limits = []  # positions are relative: there is no limit
    limits.append(tokenizer.model_max_length)
    known = [n for n in limits if isinstance(n, int) and 0 < n < 10**9]
    start = None
    if getattr(config, "is_encoder_decoder", False):
        places = (config, getattr(model, "generation_config", None))
        found = [getattr(place, "decoder_start_token_id", None) for place in places]
        start = next((token for token in found if token is not None), getattr(config, "pad_token_id", None) or 0)
    vocab_size = getattr(config, "vocab_size", None)
    name = f"{folder} ({type(model).__name__})"
    return Subject(name, model.eval(), tokenizer, min(known, default=None), start, vocab_size)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
