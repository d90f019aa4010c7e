"""What a model of transformers reads: token ids alone, which is what it is given here, or something else."""

import inspect
import re
from pathlib import Path
from typing import Any

from attention_monitor.naming import listed
from gpt import InputError

from .errors import first_line
from .positions import Rooms, rooms_of

_BESIDE_TEXT = re.compile(r"pixel_values|image_embeds|audio|video|speech|input_features|input_values|bbox|visual_")


def rooms_for_text(folder: Path, model: Any, start: int | None) -> Rooms:
    """Have a model read a few tokens, and see how many it has positions for.

    Raises:
        InputError: when it does not read token ids alone.
    """
    import transformers

    name, config = type(model).__name__, model.config
    of_two = [getattr(config, part) for part in ("encoder", "decoder") if hasattr(config, part)]
    if model.main_input_name != "input_ids":
        what = f"reads {model.main_input_name}, not text ({name})"
    elif type(config) not in transformers.MODEL_MAPPING and len(of_two) == 2:
        kinds = " and ".join(one.model_type for one in of_two)
        what = f"is made of two, {kinds}, that each have a tokenizer ({name}), and one is given here"
    else:
        try:
            return rooms_of(model, _ordinary_token(config), start)
        except Exception as error:  # whatever a model may raise that lacks an input
            others = [x for x in inspect.signature(model.forward).parameters if _BESIDE_TEXT.search(x)]
            reads = f"reads {listed(others, 3)} beside token ids ({name}), and token ids alone are given here"
            what = reads if others else f"cannot read token ids alone ({name}: {first_line(error)})"
    part = " or ".join(f"model.{part}" for part in _parts_that_read(model))
    save = (
        f"save the part to look at, {part}, with save_pretrained(NEW), and give NEW with its tokenizer, or "
        if part
        else ""
    )
    raise InputError(
        f"The model in {folder} {what}; {save}look at {'all of ' if part else ''}it in Python with "
        "attention_maps(model, BatchProbe(inputs)), as docs/analyze.md shows."
    )


def _parts_that_read(model: Any) -> list[str]:
    """Name the parts of a model that are models, and read token ids alone."""
    import transformers

    found = []
    for name, part in model.named_children():
        if not isinstance(part, transformers.PreTrainedModel) or part.main_input_name != "input_ids":
            continue
        if type(part.config) is type(model.config) or not hasattr(transformers, type(part).__name__):
            continue  # it could not be loaded without the rest
        try:
            rooms_of(part, _ordinary_token(part.config), None)
        except Exception:  # it lacks an input
            continue
        found.append(name)
    return found


def _ordinary_token(config: Any) -> int:
    """Return a token that stands for no image, no end and no padding, as far as a config says what does."""
    special: set[Any] = set()
    for of in (config, text_config(config)):
        special |= {
            v for k, v in of.to_dict().items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)
        }
    return next(token for token in range(len(special) + 1) if token not in special)


def start_of_decoder(model: Any) -> int | None:
    """Return the token that the decoder of an encoder-decoder begins with; None: it is none."""
    config = model.config
    takes_target = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if not getattr(config, "is_encoder_decoder", False) or not takes_target:
        return None
    places = (config, getattr(model, "generation_config", None))
    found = [getattr(place, "decoder_start_token_id", None) for place in places]
    return next((token for token in found if token is not None), getattr(config, "pad_token_id", None) or 0)


def text_config(config: Any) -> Any:
    """Return the part of a config that is about text; the config, where that is not one part."""
    try:
        return config.get_text_config()
    except ValueError:
        return config
