"""Paths of modules: what wrappers put into them is left out, and two modules never become one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attention_monitor import capture
from attention_monitor.capturing.running_modules import module_names

from ..wrappers import WRAPPERS, LoraModel, PeftModel
from .test_capture_mode import Attention


class Named(nn.Module):
    """Modules of given names, which are run one after the other."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


def sites(model):
    with capture(model) as calls:
        model(torch.randn(1, 4, 8))
    return [call.site for call in calls]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("inside", [True, False])
def test_wrappers_leave_no_trace_in_site_names(wrap, inside):
    model = Named(net=wrap(Named(attn=Attention()))) if inside else wrap(Named(attn=Attention()))
    assert sites(model) == ["net.attn" if inside else "attn"]


def test_what_derives_from_a_wrapper_is_one():
    class Mine(nn.DataParallel):
        pass

    assert sites(Mine(Named(attn=Attention()))) == ["attn"]


def test_the_modules_of_a_model_may_be_called_as_wrappers_call_theirs():
    def attention(*names):
        module = Attention()
        for name in reversed(names):
            module = Named(**{name: module})
        return module

    assert sites(Named(base_model=attention("model", "attn"), model=attention("attn"))) == [
        "base_model.model.attn",
        "model.attn",
    ]
    assert sites(Named(model=Named(base_model=Attention(), attn=Attention()))) == ["model.base_model", "model.attn"]
    assert sites(Named(module=attention("_orig_mod", "attn"), attn=Attention())) == ["module._orig_mod.attn", "attn"]


def test_a_wrapper_stays_in_the_path_where_it_has_a_module_of_its_own_of_the_same_name():
    wrapper = PeftModel(LoraModel(Named(attn=Attention(), out=Named(attn=Attention()))))
    wrapper.attn = Attention()
    assert set(module_names(wrapper).values()) >= {"attn", "model.attn", "model.out.attn"}
    del wrapper.attn
    wrapper.prompt_encoder = Attention()
    assert set(module_names(wrapper).values()) >= {"attn", "out.attn", "prompt_encoder"}


class Both(PeftModel, nn.DataParallel):
    pass


WRAPPED_AS = {
    Named: [],
    nn.DataParallel: ["module"],
    PeftModel: ["base_model"],
    LoraModel: ["model"],
    Both: ["module", "base_model"],
}
NAMES = st.sampled_from(["module", "base_model", "model", "attn", "0"])


def made(cls, children):
    """A module of a class, with any children: a wrapper need not have one that it wraps, and may have others."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, child in children.items():
        module.add_module(name, child)
    return module


def trees(children):
    return st.builds(made, st.sampled_from(list(WRAPPED_AS)), st.dictionaries(NAMES, children, max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.recursive(trees(st.nothing()), trees, max_leaves=12))
def test_two_modules_have_one_path_only_if_one_is_what_the_other_wraps(model):
    full = {module: path for path, module in model.named_modules()}
    names = module_names(model)
    assert names.keys() == full.keys()
    alike = {}
    for module, name in names.items():
        alike.setdefault(name, []).append(module)
    for name, modules in alike.items():
        for outer, inner in pairwise(modules):  # each wraps the next
            assert inner in [getattr(outer, wrapped, None) for wrapped in WRAPPED_AS[type(outer)]]
        # and nothing but names of wrapped modules is left out
        rest = full[modules[-1]].split(".")
        for part in filter(None, name.split(".")):
            assert part in rest
            rest = rest[rest.index(part) + 1 :]


def test_names_of_peft_are_those_of_the_model_without_it():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    options = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM"),
        peft.IA3Config(task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
        with capture(wrapped := peft.get_peft_model(model, config)) as calls:
            wrapped(torch.zeros(1, 4, dtype=torch.long))
        assert [call.site for call in calls] == ["transformer.h.0.attn", "transformer.h.1.attn"]
