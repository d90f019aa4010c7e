"""That what is generated is up to date, and that what the documents name is there."""

import importlib.util
import re
from pathlib import Path

import pytest

from attention_monitor import STATISTICS
from attention_monitor.analysis import KINDS

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_statistics_page_is_what_the_registry_says():
    made = load(ROOT / "docs/make_statistics.py").page()
    assert (ROOT / "docs/statistics.md").read_text(encoding="utf-8") == made, "run: python docs/make_statistics.py"
    here = "attention_monitor.statistics.catalogue"
    own = {name for name, stat in STATISTICS.items() if stat.function.__module__ == here}
    assert set(re.findall(r"^## `(\w+)`", made, re.MULTILINE)) == own


def test_the_kinds_of_heads_are_told_with_their_rules():
    page = (ROOT / "docs/analyze.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"| {kind.name} | `{kind.rule}` |" in page


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_every_link_to_a_file_leads_to_one(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_tree_in_contributing_has_every_module_with_a_line_of_its_own():
    package = ROOT / "callbacks/attention_monitor"
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.search(r"^callbacks/attention_monitor/\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1].splitlines()
    named, folders = [], []
    for line in lines:
        found = re.match(r"( +)([\w/.]+)  +\S", line)
        if found:
            depth = len(found[1]) // 2 - 1
            folders[depth:] = [found[2]]
            named.append("".join(folders))
    modules = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    there = {module for module in modules if module == "__init__.py" or not module.endswith("/__init__.py")}
    assert {name for name in named if name.endswith(".py")} == there
    folders = {f"{Path(module).parent}/" for module in modules if "/" in module}
    assert {name for name in named if name.endswith("/")} == folders


def test_the_guide_names_every_statistic():
    page = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    here = "attention_monitor.statistics.catalogue"
    own = {name for name, stat in STATISTICS.items() if stat.function.__module__ == here}
    assert {name for name in own if f"`{name}`" not in page} == set()
