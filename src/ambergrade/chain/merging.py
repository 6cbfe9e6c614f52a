"""Merges model files by a formula, and verifies merged files, as the pipelines `merge` and `verify` ask for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ambergrade.chain.settings import MergePipelineSettings, VerifySettings
from ambergrade.errors import BadSetting
from ambergrade.merge.files import RecipeFile, from_values, read_recipe
from ambergrade.store import find_file


def written_recipe(settings: MergePipelineSettings) -> RecipeFile:
    """The recipe file, or the formula of conf/merge over the models of conf/models. Raises BadSetting for one that
    the formula names and nobody gave."""
    if settings.recipe:
        return read_recipe(settings.recipe.expanduser(), settings.coefficients)
    given = {alias: source for alias, source in settings.models.items() if source}
    missing = [alias for alias in settings.models if alias not in given and alias in settings.merge.formula]
    if missing:
        raise BadSetting(
            f"The formula needs {', '.join(missing)}.\nName the file: models.{missing[0]}=PATH, or give recipe=FILE."
        )
    return from_values({**asdict(settings.merge), "models": given}, Path(), settings.coefficients)


def run(settings: MergePipelineSettings) -> None:
    """Plan and merge; print the audit and what was written."""
    from ambergrade import command

    command.run_written(
        written_recipe(settings),
        out=settings.out,
        dry_run=settings.dry_run,
        threads=settings.compute.threads,
        device="cuda" if settings.compute.device == "cuda" else "cpu",
    )


def verify(settings: VerifySettings) -> None:
    """Make a merged file again from its own header and compare every byte. Raises BadSetting where they differ."""
    from ambergrade import command

    assert settings.model is not None
    assert settings.models_path is not None
    model = find_file(settings.model)
    if not command.verify_model(model, settings.models_path.expanduser(), threads=settings.compute.threads):
        raise BadSetting(f"{model.name} is not what its header says.")
