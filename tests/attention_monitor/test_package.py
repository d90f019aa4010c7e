"""The boundaries between the parts, which the design rests on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attention_monitor

PACKAGE = Path(attention_monitor.__file__).parent
ROOT = PACKAGE.parents[1]
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(path):
    """Top-level names of what a file imports, also inside functions; relative imports are left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def modules_imported(module):
    """Modules of the package that one of them imports, also inside functions."""
    path = PACKAGE / module
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            named = [folder / alias.name for alias in node.names] if folder.is_dir() else [folder]
            found |= {f"{at.relative_to(PACKAGE).as_posix()}.py" for at in named}
    return found


# A room is a module, or a folder, and imports from rooms before it. From a model to a Snapshot all is torch; from a
# Snapshot to people all is numpy; the last rooms join the two. Those in brackets are not built yet.
GROUND = ["discovery", "errors", "naming", "traits", "snapshots"]
TORCH = [*GROUND, "capturing", "statistics", "probes"]
NUMPY = [*GROUND, "[history]", "diagnosis", "plots", "writers", "[tensorboard_tab]"]
JOINED = ["monitoring", "analysis", "[cli]"]
TAB = [*GROUND, "history"]


def room_of(module):
    return module.split("/")[0].removesuffix(".py")


def may_import(room):
    """Rooms that a room may import from."""
    torch, numpy = ([name.strip("[]") for name in rooms] for rooms in (TORCH, NUMPY))
    joined = [name.strip("[]") for name in JOINED]
    if room == "tensorboard_tab":
        return set(TAB)
    for rooms in (torch, numpy, [*torch, *numpy, *joined]):
        if room in rooms:
            return set(rooms[: rooms.index(room)])
    raise AssertionError(f"{room} is no room of the house: put it where it belongs in TORCH, NUMPY or JOINED")


def wrong_arrows(arrows):
    """Imports that do not go from a room to one before it, of (module, module imported)."""
    rooms = [(one, other, room_of(one), room_of(other)) for one, other in arrows]
    return [(one, other) for one, other, here, there in rooms if here != there and there not in may_import(here)]


def test_imports_go_one_way_through_the_house():
    arrows = [(module, other) for module in MODULES if module != "__init__.py" for other in modules_imported(module)]
    assert arrows
    assert wrong_arrows(arrows) == []


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("naming.py", "snapshots.py"),
        ("snapshots.py", "capturing/attention_call.py"),
        ("capturing/capture_mode.py", "statistics/totals.py"),
        ("statistics/registry.py", "probes/base.py"),
        ("probes/base.py", "diagnosis/roles.py"),
        ("diagnosis/runner.py", "plots/fonts.py"),
        ("plots/fonts.py", "writers/tags.py"),
        ("writers/tags.py", "statistics/registry.py"),
        ("writers/writer.py", "monitoring/recorder.py"),
        ("monitoring/recorder.py", "analysis.py"),
        ("tensorboard_tab/plugin.py", "plots/fonts.py"),
    ],
)
def test_an_arrow_that_is_turned_round_is_found(module, other):
    assert wrong_arrows([(module, other)]) == [(module, other)]


def test_no_modules_import_one_another_in_a_circle():
    arrows = {module: modules_imported(module) - {"__init__.py"} for module in MODULES if module != "__init__.py"}
    while free := [module for module, targets in arrows.items() if not targets & set(arrows)]:
        for module in free:
            del arrows[module]
    assert not arrows


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_module(module):
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]
    assert [alias.name for node in imports for alias in node.names if alias.name.startswith("_")] == []


WITHOUT_TORCH = """
import sys
from importlib import import_module


class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError(f"{{name}} is not for this half")


sys.meta_path.insert(0, Refused())
for module in {modules}:
    import_module(module)
{then}
"""


def run_without(libraries, modules, then=""):
    names = [f"attention_monitor.{module.removesuffix('.py').replace('/', '.')}" for module in modules]
    names = [name.removesuffix(".__init__") for name in names]
    code = WITHOUT_TORCH.format(refused=set(libraries), modules=names, then=then)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def in_rooms(rooms):
    return [module for module in MODULES if room_of(module) in [room.strip("[]") for room in rooms]]


def test_what_comes_after_a_snapshot_works_where_torch_cannot_be_imported():
    assert {room_of(module) for module in in_rooms(NUMPY)} == {room for room in NUMPY if room[0] != "["}
    then = """
import numpy as np
from attention_monitor import Snapshot
from attention_monitor.diagnosis.roles import HeadRoles
from attention_monitor.diagnosis.runner import Diagnosis
from attention_monitor.snapshots import Column, HeadScore, SiteRecord
from attention_monitor.writers.sinks import sinks_for
from attention_monitor.writers.writer import Writer


class Logger:
    written = {}

    def log_metrics(self, values, step):
        self.written.update(values)

    def log_image(self, key, images, step):
        self.written[key] = images[0].shape


names = ["nonfinite_fraction", "collapse_fraction", "max_score"]
values = {name: np.ones(2, np.float32) for name in names} | {"sink": np.ones(2, np.float32)}
columns = {name: Column(name) for name in names} | {"sink": HeadScore("sink", threshold=0.3)}
record = SiteRecord("L00", "h.0.attn", values=values, pattern=np.ones((2, 3, 3)) / 3)
snapshot = Snapshot(0, "live", [record], columns)
assert [finding.head for finding in Diagnosis().update(snapshot)] == 2 * ["L00H00", "L00H01"]
roles = HeadRoles()
assert roles.update(snapshot)
writer = Writer(sinks_for(Logger()))
writer.write(snapshot)
writer.write_text("attention_roles", roles.table(), 0)
writer.close()
assert Logger.written["attention_max_score/L00H01"] == 1
assert len(Logger.written["attention_maps/live"]) == 3
"""
    run = run_without(["torch", "pytorch_lightning", "lightning"], in_rooms(NUMPY), then)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", ["capturing/capture_mode.py", "statistics/totals.py", "monitoring/measuring.py"])
def test_an_import_of_torch_in_the_wrong_half_is_found(module):
    run = run_without(["torch"], [module])
    assert run.returncode != 0
    assert "is not for this half" in run.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import attention_monitor; dir(attention_monitor)",
            {"torch", "matplotlib", "pytorch_lightning", "numpy", "tensorboard", "PIL"},
        ),
        (
            "from attention_monitor import capture, summarize, TextProbe, AttentionRecorder",
            {"matplotlib", "pytorch_lightning"},
        ),
    ],
)
def test_importing_loads_no_library_that_is_not_needed(statement, absent):
    code = f"{statement}; import sys; print(sorted({absent} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", attention_monitor.__all__)
def test_every_public_name_can_be_imported_and_says_what_it_is(name):
    assert getattr(attention_monitor, name) is getattr(attention_monitor, name)
    assert name in dir(attention_monitor)
    assert name == "STATISTICS" or getattr(attention_monitor, name).__doc__
    for path in (PACKAGE / f"{name}.py", PACKAGE / name):
        assert not path.exists(), "once imported, a module or folder of that name would take the name's place"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attention_monitor.nothing  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("pytorch_lightning", {"monitoring/lightning_callback.py"}),
        ("lightning_fabric", {"monitoring/lightning_callback.py"}),
        ("matplotlib", {f"plots/{name}.py" for name in ("figures", "values", "maps", "drawing", "repainted", "fonts")}),
        ("tensorboard", {"writers/sinks.py"}),
        ("transformers", {"monitoring/huggingface_callback.py"}),
        ("gpt", set()),
        ("attention_monitor", set()),  # imports inside the package are relative
    ],
)
def test_only_the_part_that_is_meant_to_imports(module, library, allowed):
    assert library not in imported(PACKAGE / module) or module in allowed


@pytest.mark.parametrize("module", MODULES)
def test_only_writers_make_tags(module):
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    # f"attention_{statistic}/..." begins with the constant "attention_"
    tags = [s for s in strings if re.match(r"attention_(|roles|heads/|maps/|rollout/)$", s)]
    assert bool(tags) == (module == "writers/tags.py")


@pytest.mark.parametrize("path", sorted((ROOT / "gpt").glob("*.py")), ids=lambda path: path.name)
def test_the_model_knows_nothing_of_the_monitor(path):
    assert "attention_monitor" not in imported(path)
