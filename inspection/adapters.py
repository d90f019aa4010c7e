"""Adapters in the folders of models: weights, such as LoRA's, that change those of a base model.

A base model that is read without its adapter is another model, and nothing in its maps says so. An adapter is put into
its base model by peft, or refused.
"""

import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attention_monitor.naming import listed
from gpt import InputError

from .errors import first_line

# of peft
CONFIG, SAFE_WEIGHTS, PICKLED_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# kinds of peft that change weights and do nothing else, as transformers puts them into a model
KINDS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "LN_TUNING")
# of peft, of the library adapters, of LoRA by hand
_OF_ADAPTER = re.compile(r"adapter|(?<![a-z])(lora|loha|lokr|dora|ia3)(?![a-z])", re.IGNORECASE)
_OF_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".npz"}
_OF_TRAINER = re.compile(r"checkpoint-\d+")  # folders with earlier states of what a folder has
IN_PYTHON = (
    "load it in Python with the library that wrote it, and call attention_maps(model, text, tokenizer), as "
    "docs/analyze.md shows"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter that peft puts into its base model.

    Attributes:
        folder: that it is in.
        base: folder of its base model; the same where its weights are beside it.
        kind: as peft calls it, such as ``LORA``.
    """

    folder: Path
    base: Path
    kind: str

    def put_into(self, model: Any) -> None:
        """Put it into its base model, of transformers.

        Raises:
            InputError: when it does not fit.
        """
        try:
            with warnings.catch_warnings(action="ignore"):  # of what is new or rare in peft
                found = model.load_adapter(
                    str(self.folder),
                    adapter_kwargs={"local_files_only": True},
                    use_safetensors=(self.folder / SAFE_WEIGHTS).is_file(),
                    weights_only=True,
                )
            lacking = sorted({*found.missing_keys, *(str(key[0]) for key in found.mismatched_keys)})
            # in a layer that is not there; what is for a head on top of the layers is of no account
            left = sorted(name for name in found.unexpected_keys if re.search(r"\.\d+\.", name))
        except Exception as error:  # whatever an adapter may bring about
            raise self._does_not_fit(first_line(error)) from error
        if lacking or left:
            what = "are missing or of another shape" if lacking else "have no place in it"
            raise self._does_not_fit(f"{len(lacking or left)} of its weights {what}, such as {(lacking or left)[0]}")

    def _does_not_fit(self, reason: str) -> InputError:
        return InputError(
            f"The adapter in {self.folder} ({self.kind}) could not be put into the model in {self.base}: {reason}; "
            f"{_merge(self.folder)}."
        )


def adapter_in(folder: Path) -> Adapter | None:
    """Find the adapter of a folder; None: there is none.

    Raises:
        InputError: when there is one that is not read here.
    """
    files = sorted(path.name for path in folder.iterdir() if _is_of_adapter(path))
    if not files:
        if within := _folders_with_adapters(folder):
            raise InputError(
                f"{folder} has adapters in folders of their own, {listed(within, 5)}, and nothing says with which of "
                f"them its weights are to be read; {_merge(folder / within[0])}, or move these folders elsewhere to "
                "look at the model without them."
            )
        return None
    config = _read_config(folder / CONFIG) if CONFIG in files else {}
    kind, named = str(config.get("peft_type") or ""), str(config.get("base_model_name_or_path") or "")
    advice = _merge(folder) if kind in KINDS else IN_PYTHON
    what = f"{folder} has an adapter ({listed(files, 5)})"
    if kind not in KINDS or config.get("megatron_config") or not {SAFE_WEIGHTS, PICKLED_WEIGHTS} & set(files):
        raise InputError(
            f"{what} of {f'the kind {kind}' if kind else 'an unknown kind'} that cannot be read here: what can is the "
            f"{CONFIG} of peft, without Megatron, of a kind that changes weights and nothing else "
            f"({', '.join(KINDS)}), with {SAFE_WEIGHTS} or {PICKLED_WEIGHTS}; {advice}."
        )
    base = folder if (folder / "config.json").is_file() else Path(named)
    if not (base / "config.json").is_file():
        raise InputError(
            f"{what} and not the model that it changes, {named!r}, which is no folder with a config.json here; "
            f"{advice}."
        )
    if base != folder and any(_is_of_adapter(path) for path in base.iterdir()):
        raise InputError(f"{what}, and the model that it changes, {base}, has one too; {advice}.")
    if find_spec("peft") is None:
        raise InputError(
            f"{what} {'beside its weights' if base == folder else f'for the model in {base}'}, and there is no "
            f"package peft, which puts it there: pip install peft, or {advice}."
        )
    return Adapter(folder, base, kind)


def of_adapters(names: Iterable[str]) -> list[str]:
    """Pick the names of tensors that are an adapter's."""
    return [name for name in names if _OF_ADAPTER.search(name)]


def _is_of_adapter(path: Path) -> bool:
    is_weights = path.suffix in _OF_WEIGHTS and _OF_ADAPTER.search(path.name)
    return path.is_file() and (path.name == CONFIG or bool(is_weights))


def _folders_with_adapters(folder: Path) -> list[str]:
    return sorted(
        path.parent.name for path in folder.glob(f"*/{CONFIG}") if not _OF_TRAINER.fullmatch(path.parent.name)
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); save the adapter anew.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__} and not the config of an adapter; save it anew.")
    return found


def _merge(folder: Path) -> str:
    return (
        f'merge it in Python, PeftModel.from_pretrained(model, "{folder}").merge_and_unload().save_pretrained(NEW), '
        "and give the folder NEW, with the tokenizer"
    )
