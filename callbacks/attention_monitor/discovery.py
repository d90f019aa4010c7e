"""Folders of extensions: a module that is put into one is loaded, and registers what it defines by itself."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def load_modules(folder: ModuleType) -> None:
    """Import every module of a folder of the package."""
    for found in iter_modules(folder.__path__):
        import_module(f"{folder.__name__}.{found.name}")
