"""The examples in docstrings run, and every public name has one."""

import doctest
import inspect
from importlib import import_module

import pytest

import attention_monitor

from .test_package import MODULES

NAMES = [
    f"attention_monitor.{module.removesuffix('.py').replace('/', '.')}"
    for module in MODULES
    if not module.endswith(("__init__.py", "kernel.py"))  # the kernel needs Triton, and is not public
]
# What is raised or warned needs no example; a table is no place for one.
WITHOUT = {"AttentionMonitorError", "AttentionWarning", "NoAttentionError", "STATISTICS"}


@pytest.mark.parametrize("name", NAMES)
def test_examples_run_as_they_are_written(name):
    before = dict(attention_monitor.STATISTICS)
    result = doctest.testmod(import_module(name))
    assert result.failed == 0, f"python -m doctest: {result.failed} examples of {name} failed"
    assert before == attention_monitor.STATISTICS, "an example leaves a statistic behind"


@pytest.mark.parametrize("name", sorted(set(attention_monitor.__all__) - WITHOUT))
def test_every_public_name_has_an_example(name):
    found = getattr(attention_monitor, name)
    assert ">>> " in inspect.getdoc(found), f"give {name} an Example section that runs"
