"""Plans a training before it is paid for. It needs no torch."""

from __future__ import annotations

from ambergrade.chain.settings import TrainPipelineSettings
from ambergrade.errors import BadSetting
from ambergrade.train.plan import plan


def print_plan(settings: TrainPipelineSettings) -> None:
    """Print steps, memory, hours and dollars of the training; nothing is trained."""
    if settings.family.name != "sdxl":
        raise BadSetting(f"The plan's tables are SDXL's, not {settings.family.name}'s. Try experiment=base7.")
    resolution, pictures = settings.family.resolution, settings.pictures
    print(plan(settings.trainer, settings.processes, settings.gpu, resolution=resolution, pictures=pictures))
