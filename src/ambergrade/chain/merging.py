"""Reads what the merge pipeline is asked for: a recipe file, or a formula of conf/merge over conf/models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ambergrade.chain.settings import MergePipelineSettings
from ambergrade.errors import BadSetting
from ambergrade.merge.files import RecipeFile, from_values, read_recipe


def written_recipe(settings: MergePipelineSettings) -> RecipeFile:
    """Return the recipe that the settings mean. Raises BadSetting for a model that nobody gave a file for."""
    if settings.recipe:
        return read_recipe(settings.recipe.expanduser(), settings.coefficients)
    given = {alias: source for alias, source in settings.models.items() if source}
    missing = [alias for alias in settings.models if alias not in given and alias in settings.merge.formula]
    if missing:
        raise BadSetting(
            f"The formula needs {', '.join(missing)}.\nName the file: models.{missing[0]}=PATH, or give recipe=FILE."
        )
    return from_values({**asdict(settings.merge), "models": given}, Path(), settings.coefficients)
