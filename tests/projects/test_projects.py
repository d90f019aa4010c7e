"""Projects of other people, run as they would run them: with one callback, and without.

``PROJECT_PYTHON`` is the Python to run them with; .ci/run gives that of a fresh environment into which only the built
wheel and what the projects need have been installed. By default it is this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PYTHON = os.environ.get("PROJECT_PYTHON", sys.executable)
HERE = Path(__file__).parent

ENCODER = [f"encoder.layers.{i}.self_attn" for i in range(2)]
TRANSLATION = [f"transformer.{name}" for name in ENCODER] + [
    f"transformer.decoder.layers.{i}.{kind}" for kind in ("self_attn", "multihead_attn") for i in range(2)
]
PROJECTS = {  # project -> labels of its layers, source of its maps
    "image_classifier": (["L00", "L01", "L02"], "live"),
    "causal_lm": (["L00", "L01"], "text"),
    "translation": (TRANSLATION, "live"),
}


def run(name, folder, *arguments):
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # no code but what is installed
    result = subprocess.run(
        [PYTHON, str(HERE / f"{name}.py"), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    [logs] = folder.rglob("version_0")
    return EventAccumulator(str(logs), size_guidance={"scalars": 0, "images": 0}).Reload(), result.stderr


@pytest.mark.parametrize("name", PROJECTS)
def test_a_foreign_project_sees_its_heads_and_trains_as_before(name, tmp_path):
    labels, source = PROJECTS[name]
    plain, _ = run(name, tmp_path / "plain")
    watched, stderr = run(name, tmp_path / "watched", "--monitor")
    losses = [[event.value for event in events.Scalars("loss")] for events in (plain, watched)]
    assert len(losses[0]) >= 40
    assert losses[0] == losses[1]
    tags = watched.Tags()
    for label in labels:
        separator = "" if label.startswith("L0") else "/"
        heads = [f"attention_entropy/{label}{separator}H{head:02d}" for head in range(4)]
        assert set(heads) <= set(tags["scalars"])
    assert [event.step for event in watched.Scalars("attention_entropy/mean")] == [0, 10, 20, 30, 39]
    assert f"attention_maps/{source}" in tags["images"]
    assert "could not" not in stderr
