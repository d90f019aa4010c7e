"""The models, a module for each package or few small ones."""

from ..expectation import FieldModel
from . import timm_models


def all_models() -> list[FieldModel]:
    """Return all models."""
    return [*timm_models.MODELS]
