"""That the experiments run; what they show takes minutes."""

import json

import torch

from experiments import induction


def test_induction_writes_a_figure_and_its_numbers(tmp_path, capsys):
    runs = induction.main(["--steps=4", "--every=2", f"--output={tmp_path}"])
    assert [run.n_layer for run in runs] == [2, 1]
    assert (tmp_path / "induction.png").read_bytes().startswith(b"\x89PNG")
    [two, one] = json.loads((tmp_path / "induction.json").read_text())["runs"]
    assert two["steps"] == [0, 2]
    assert len(two["scores"]["induction"][0]) == 2
    assert len(one["scores"]["induction"][0]) == 1
    assert "induction heads: none" in capsys.readouterr().out


def test_what_comes_next_is_called_known_where_it_has_been_seen_before():
    tokens, known = induction.draw(torch.Generator().manual_seed(0))
    for row, seen in zip(tokens.tolist(), known.tolist(), strict=True):
        assert row[0] == induction.BOS
        length = seen.index(True) - 1
        assert 10 <= length <= 40
        assert all(row[i + 1] == row[i + 1 - length] for i in range(length, induction.T - 1))
        assert all(seen[length + 1 :])
        assert not any(seen[: length + 1])
