"""The boundaries between the parts, which the design rests on."""

import ast
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


def test_no_modules_import_one_another_in_a_circle():
    arrows = {module: modules_imported(module) - {"__init__.py"} for module in MODULES if module != "__init__.py"}
    while free := [module for module, targets in arrows.items() if not targets & set(arrows)]:
        for module in free:
            del arrows[module]
    assert not arrows


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
        ("matplotlib", {"plots/figures.py", "plots/drawing.py", "plots/repainted.py", "plots/fonts.py"}),
        ("tensorboard", {"writers/sinks.py"}),
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
    tags = [s for s in strings if s == "attention_" or s.startswith(("attention_heads/", "attention_maps/"))]
    assert not tags or module.startswith("writers/")


@pytest.mark.parametrize("path", sorted((ROOT / "gpt").glob("*.py")), ids=lambda path: path.name)
def test_the_model_knows_nothing_of_the_monitor(path):
    assert "attention_monitor" not in imported(path)
