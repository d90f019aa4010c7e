"""Folders of Hugging Face models, as ``save_pretrained`` writes them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attention_monitor.naming import listed
from gpt import InputError

from .adapters import CONFIG, IN_PYTHON, adapter_in, of_adapters
from .errors import first_line
from .inputs import rooms_for_text, start_of_decoder, text_config
from .subject import Subject, on_device

# Nothing is fetched, and no code that comes with a model is run.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Where transformers looks for an adapter of its own accord: then it says no more what a base model lacks.
NOWHERE = {"subfolder": "no adapter"}
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")
RELATIVE = ("t5", "mt5", "umt5")  # positions are relative: what their configs say is no limit
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_folder(folder: Path, device: str) -> Subject:
    """Load the model of a folder, with its adapter and its tokenizer.

    Raises:
        InputError: when that cannot be, or the model reads something else than token ids; the message says what to do.
    """
    adapter = adapter_in(folder)
    base = folder if adapter is None else adapter.base
    _require_config(base)
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            'A Hugging Face model needs the package transformers: pip install "attention-monitor[transformers]".'
        ) from error
    transformers.logging.set_verbosity_error()  # what it says of unused weights and long texts is not for here
    transformers.logging.disable_progress_bar()
    model, notes = _load_model(base)
    if adapter is not None:
        adapter.put_into(model)
    model = on_device(model.eval(), device)
    start = start_of_decoder(model)
    rooms = rooms_for_text(folder, model, start)
    tokenizer = _load_tokenizer([folder] if base == folder else [folder, base])
    text = text_config(model.config)
    limits = [getattr(config, name, None) for config in (model.config, text) for name in CONTEXTS]
    if getattr(model.config, "model_type", "") in RELATIVE:
        limits = []
    of_text, of_target = (_smallest([*limits, tokenizer.model_max_length, room]) for room in (rooms.text, rooms.target))
    return Subject(
        name=f"{folder} ({type(model).__name__}{'' if adapter is None else f' with its adapter, {adapter.kind}'})",
        model=model,
        tokenizer=tokenizer,
        context=of_text,
        start=start,
        target_context=of_target,
        vocab_size=getattr(text, "vocab_size", None),
        notes=notes,
    )


def _require_config(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    names = ("config.json", CONFIG)
    within = sorted({path.parent.name for name in names for path in folder.glob(f"*/{name}")})
    instead = f"; those of its folders that have one are {listed(within, 5)}" if within else ""
    raise InputError(
        f"{folder} has no config.json; give a .ckpt file of train.py, or a folder that save_pretrained() wrote"
        f"{instead}."
    )


def _load_model(folder: Path) -> tuple[Any, list[str]]:
    """Load the model of a folder, without an adapter: the model, and sentences for the user."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        for kind in _classes_of(config):
            model, found = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, adapter_kwargs=NOWHERE, **LOCAL
            )
            if not (absent := _absent(found)):
                break
    except Exception as error:  # whatever a folder may bring about
        raise InputError(f"The model in {folder} could not be loaded: {first_line(error)}") from error
    if absent:
        raise InputError(
            f"The weights in {folder} are not those of its config.json: {len(absent)} are missing or of another shape, "
            f"such as {absent[0]}."
        )
    unused = _in_layers(model, found["unexpected_keys"])
    if adapted := of_adapters(unused):
        raise InputError(
            f"The weights in {folder} have an adapter among them that transformers does not read, such as "
            f"{adapted[0]}; merge it into the others before they are saved, or {IN_PYTHON}."
        )
    if unused:
        some = f"{len(unused)} of the weights in {folder} have no place in the model of its config.json, such as"
        return model, [f"{some} {unused[0]}: it is looked at without them."]
    return model, []


def _classes_of(config: Any) -> list[Any]:
    """List the classes to load a model as, the first that its weights are enough for.

    That which its config names may be a part of the one that ``AutoModel`` knows (T5EncoderModel), or one that it does
    not know, as it is made of other models.
    """
    import transformers

    classes: list[Any] = [transformers.AutoModel] if type(config) in transformers.MODEL_MAPPING else []
    for name in config.architectures or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            classes.append(named)
    return classes or [transformers.AutoModel]  # which says that it does not know it


def _absent(found: Mapping[str, Any]) -> list[str]:
    """List the weights that are not there and would be made up.

    A pooler stands behind the last layer, and many models are saved without one.
    """
    names = {str(name) for name in found["missing_keys"]} | {str(key[0]) for key in found["mismatched_keys"]}
    return sorted(name for name in names if "pooler" not in name)


def _in_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Pick the names of weights that would be in the layers of a model: heads on top of them are not looked at."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def is_in_layers(name: str) -> bool:
        module: Any = model
        for piece in name.removeprefix(prefix).split("."):
            if isinstance(module, nn.ModuleList):
                return not name.endswith(".masked_bias")  # a number, of old GPT-2s
            module = getattr(module, piece, None)
        return False

    return sorted(name for name in names if is_in_layers(name))


def _load_tokenizer(folders: Sequence[Path]) -> Any:
    """Load the tokenizer of the first folder that has one."""
    import transformers

    reason = "it has no such files"  # of which transformers would make up an empty one
    for folder in folders:
        if any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
            try:
                return transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
            except Exception as error:
                reason = first_line(error)
                break
    raise InputError(
        f"The model in {folders[0]} has no tokenizer that can be loaded ({reason}); save one into its folder with "
        "tokenizer.save_pretrained()."
    )


def _smallest(limits: Iterable[Any]) -> int | None:
    return min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)
