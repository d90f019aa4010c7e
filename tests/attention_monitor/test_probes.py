import random

import numpy as np
import pytest
import tiktoken
import torch
from torch import nn

from attention_monitor import AttentionMonitorError, TextProbe, score_relations
from attention_monitor.probes import TokenProbe, undisturbed

BYTES = tiktoken.Encoding(
    "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
)


class Meddler(nn.Module):
    """A model whose forward changes everything that a probe must not change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Dropout().eval()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.cache = torch.randn(5)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return self.norm(torch.randn(4, 3))


def everything(model):
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "modes": [module.training for module in model.modules()],
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "buffer identity": {name: id(buffer) for name, buffer in model.named_buffers()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "grad": torch.is_grad_enabled(),
    }


def test_running_a_probe_leaves_no_trace():
    model = Meddler()
    before = everything(model)
    TokenProbe("text", torch.tensor([[1, 2]]), ["a", "b"]).run(model)
    assert everything(model) == before


def test_a_probe_that_fails_leaves_no_trace_either():
    model = Meddler()
    before = everything(model)
    with pytest.raises(TypeError), undisturbed(model):
        model(model(torch.zeros(1)), "too much")
    assert everything(model) == before


def test_a_text_is_encoded_by_the_tokenizer_given_and_labelled_by_token():
    probe = TextProbe("Hé").encode(BYTES)
    assert probe.tokens.tolist() == [[72, 195, 169]]
    assert probe.labels == ["H", "�", "�"]


def test_the_probes_own_tokenizer_comes_first():
    class Shout:
        def encode(self, text):
            return [len(text)]

        def decode(self, ids):
            return f"<{ids[0]}>"

    probe = TextProbe("abc", tokenizer=Shout()).encode(BYTES)
    assert (probe.tokens.tolist(), probe.labels) == ([[3]], ["<3>"])


def test_special_tokens_in_a_text_are_plain_text():
    special = tiktoken.Encoding(
        "s", pat_str=r"\S+|\s+", mergeable_ranks=BYTES._mergeable_ranks, special_tokens={"<|x|>": 256}
    )
    assert 256 not in TextProbe("<|x|>").encode(special).tokens


def test_a_text_without_a_tokenizer_or_without_tokens_is_refused():
    with pytest.raises(AttentionMonitorError, match=r"no tokenizer was found.*TextProbe\(text, tokenizer\)"):
        TextProbe("abc").encode(None)
    with pytest.raises(AttentionMonitorError, match="has no tokens"):
        TextProbe("").encode(BYTES)


def test_a_model_that_does_not_take_the_probe_is_named_with_its_own_complaint():
    with pytest.raises(AttentionMonitorError, match=r"'text' \(2 tokens\) .* Linear: RuntimeError: .*shape"):
        TokenProbe("text", torch.tensor([[1.0, 2.0]]), ["a", "b"]).run(nn.Linear(5, 1))


def test_relations_are_scored_per_head_beside_the_best_fixed_offset():
    patterns = torch.zeros(1, 2, 5, 5)  # (layers, H, T, T)
    patterns[0, 0, 3, 1] = patterns[0, 0, 4, 1] = 0.9  # head 0 finds both keys
    patterns[0, 1, 3, 2] = patterns[0, 1, 4, 1] = 0.9  # head 1 finds one
    patterns[0, :, :, 4] = 1.0  # the token itself and later ones do not count
    other = torch.zeros(1, 2, 3, 3)
    other[0, :, 2, 0] = 0.5
    scores = score_relations([(patterns, [(3, 1, "a"), (4, 1, "a")]), (other, [(2, 0, "a"), (1, 0, "b")])])
    assert [score.name for score in scores] == ["a", "b"]
    assert scores[0].n_pairs == 3
    assert scores[0].accuracy.tolist() == [pytest.approx([1, 2 / 3])]
    assert (scores[0].baseline, scores[0].offset) == (pytest.approx(2 / 3), 2)


@pytest.mark.parametrize("pair", [(1, 1, "a"), (1, 2, "a"), (5, 1, "a"), (1, -1, "a")])
def test_a_relation_that_does_not_look_back_is_refused(pair):
    with pytest.raises(AttentionMonitorError, match="key must come before the query"):
        score_relations([(torch.zeros(1, 1, 3, 3), [pair])])
