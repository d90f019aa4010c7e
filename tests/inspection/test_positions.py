"""How many tokens a model has positions for, compared with how many it does read."""

import pytest
import torch
import transformers

from inspection.positions import Rooms, rooms_of

from . import made

TOKEN, START = 40, 2


def reads(model, n, n_target=None):
    """Whether a model takes a text of n tokens."""
    inputs = {"input_ids": torch.full((1, n), TOKEN)}
    if n_target is not None:
        inputs["decoder_input_ids"] = torch.full((1, n_target), TOKEN)
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError):
        return False
    return True


def kind_of(config, **options):
    return lambda: made.made(config(**made.TEXT, **options))


POSITIONS = {
    "gpt2": made.gpt2,
    "bert": made.bert,
    "roberta": made.roberta,
    "camembert": kind_of(transformers.CamembertConfig, max_position_embeddings=34),
    "xlm-roberta": kind_of(transformers.XLMRobertaConfig, max_position_embeddings=34),
    "mpnet": kind_of(transformers.MPNetConfig, max_position_embeddings=34),
    "esm": kind_of(transformers.EsmConfig, max_position_embeddings=34),
    "ibert": kind_of(transformers.IBertConfig, max_position_embeddings=34),
    "opt": made.opt,
}


@pytest.mark.parametrize("make", POSITIONS.values(), ids=POSITIONS)
def test_as_many_tokens_are_read_as_are_found_and_no_more(make):
    model = make()
    rooms = rooms_of(model, TOKEN, None)
    assert rooms.target is None
    assert reads(model, rooms.text)
    assert not reads(model, rooms.text + 1)


@pytest.mark.parametrize("make", [made.bart, made.led])
def test_text_and_target_have_rooms_of_their_own(make):
    model = make()
    rooms = rooms_of(model, TOKEN, START)
    assert reads(model, rooms.text, rooms.target)
    assert not reads(model, rooms.text + 1, rooms.target)  # of LED, of which texts are padded to windows of 8
    assert not reads(model, rooms.text, rooms.target + 1)


def test_positions_that_are_padded_to_a_window_are_found():
    model = made.longformer()  # what is too long for it is padded with positions that it has
    assert rooms_of(model, TOKEN, None) == Rooms(32, None)
    assert reads(model, 32)


@pytest.mark.parametrize(("make", "start"), [(made.llama, None), (made.t5, START), (made.pegasus_x, START)])
def test_where_no_positions_are_looked_up_no_limit_is_known(make, start):
    """PegasusX looks up tokens of its own, all that it has, one after the other."""
    assert rooms_of(make(), TOKEN, start) == Rooms(None, None)


def test_a_model_is_afterwards_as_it_was():
    model = made.big_bird()  # after a short text it attends to all of a text for good, unless it is put back
    before = {name: type(module) for name, module in model.named_modules()}
    rooms_of(model, TOKEN, None)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.attention_type == "block_sparse"
    assert not model.training
