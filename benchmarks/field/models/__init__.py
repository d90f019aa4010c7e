"""The models, a module for each of the fields that they are from."""

from ..expectation import FieldModel
from . import molecules, sequences, series, timm_models, vision


def all_models() -> list[FieldModel]:
    """Return all models, those of a package together."""
    models = [model for field in (timm_models, vision, sequences, series, molecules) for model in field.MODELS]
    packages = list(dict.fromkeys(model.package for model in models))
    return sorted(models, key=lambda model: packages.index(model.package))
