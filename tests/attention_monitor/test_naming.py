"""Names of stacks and layers."""

import pytest

from attention_monitor.naming import layer_labels, stacks


@pytest.mark.parametrize(
    ("sites", "labels"),
    [
        (["gpt.h.0.attn", "gpt.h.1.attn"], ["L00", "L01"]),
        (["net.1.attn", "net.2.attn"], ["L00", "L01"]),
        (["h.2.attn", "h.5.attn", "h.11.attn"], ["L00", "L01", "L02"]),
        (["h.11.attn", "h.5.attn"], ["L01", "L00"]),  # by their numbers, in whatever order they are run
        (["h.3.attn"], ["L00"]),
        (["h.0.attn.3", "h.1.attn.3"], ["L00", "L01"]),
        (["attn"], ["L00"]),
        (["h.01.attn", "h.1.attn", "h.2.attn"],) * 2,
        (["enc.0.attn", "dec.0.attn"], ["enc.0.attn", "dec.0.attn"]),
        (["stage.0.block.0", "stage.0.block.1", "stage.1.block.0"],) * 2,
        (["shared[0]", "shared[1]"],) * 2,
        ([], []),
    ],
)
def test_layers_of_a_plain_stack_are_counted_from_0_and_others_keep_their_path(sites, labels):
    assert layer_labels(sites) == labels


@pytest.mark.parametrize(
    ("sites", "cross", "names"),
    [
        (["h.0.attn", "h.1.attn"], [False, False], ["h.*.attn"] * 2),
        (
            ["enc.0.attn", "enc.1.attn", "dec.0.self", "dec.0.cross", "dec.1.self", "dec.1.cross"],
            [False, False, False, True, False, True],
            ["enc.*.attn", "enc.*.attn", "dec.*.self", "dec.*.cross", "dec.*.self", "dec.*.cross"],
        ),
        (["b.0.layer.1.x", "b.1.layer.1.x"], [True, True], ["b.*.layer.1.x"] * 2),
        (["h.0", "h.1"], [False, True], ["h.* (self)", "h.* (cross)"]),
        (["x[0]", "x[1]"], [False, False], ["x[0]", "x[1]"]),
        ([], [], []),
    ],
)
def test_stacks_are_sites_that_differ_in_a_number(sites, cross, names):
    assert stacks(sites, cross) == names


def test_a_layer_has_its_number_also_where_others_are_skipped():
    modules = ["blocks", *(f"blocks.{i}.attn" for i in range(1, 5)), "head"]
    assert layer_labels(["blocks.2.attn", "blocks.4.attn"], modules) == ["L01", "L03"]
    assert layer_labels(["blocks.3.attn"], modules) == ["L02"]
    assert layer_labels(["pool.attn"], modules) == ["L00"]
