"""Single file to diffusers folder and back, on disk: one tensor in memory at a time, values untouched."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.family.detect import EMA, Layout, detect, require
from ambergrade.family.files import PASSIVE_FILE, entries, write_streamed
from ambergrade.family.header import Entry
from ambergrade.family.layouts import Source, listed, renamed
from ambergrade.family.load import Family, families
from ambergrade.family.prediction import lacking_marks, read_scheduler, scheduler_settings
from ambergrade.store import write_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
"""The file names that diffusers reads; text encoders have transformers' `model.safetensors`."""
Ema = Literal["drop", "use"]


@dataclass(frozen=True)
class Opened:
    """A checkpoint of either layout, opened by its headers."""

    entries: Mapping[str, Entry]
    layout: Layout

    def read(self, source: Source) -> Tensor:
        """One tensor from the disk."""
        return source.take({key: self.entries[key].read() for key in source.keys})

    def described(self, source: Source) -> tuple[str, tuple[int, ...]]:
        """Its dtype, as safetensors spells it, and its shape."""
        dtypes = {self.entries[key].dtype for key in source.keys}
        if len(dtypes) > 1:
            raise BadInput(f"{', '.join(source.keys)} are one tensor in a single file, but of {len(dtypes)} dtypes.")
        return dtypes.pop(), source.shape({key: self.entries[key].shape for key in source.keys})


def open_checkpoint(path: Path, family: Family | None = None) -> Opened:
    """Read the headers of a single file or a diffusers folder, of any family or of the given one.

    Raises BadInput for a damaged file or an unknown or another family, MissingObject for a path that is not there.
    """
    found = entries(path, {part for each in families() for part in each.components})
    shapes = {key: entry.shape for key, entry in found.items()}
    return Opened(found, require(family, shapes, path.name) if family else detect(shapes))


def to_folder(checkpoint: Path, folder: Path, config: Path, *, ema: Ema = "drop") -> Layout:
    """Write a single file as a diffusers folder that `from_pretrained` reads; returns what was found in it.

    `config` is the family's folder, whose configs and tokenizers are copied. What no network holds goes to
    `passive.safetensors`. `ema` says what becomes of moving averages, which a folder has no place for: they are left
    out (`drop`) or take the place of the weights they average (`use`). The folder appears under its name when whole.
    """
    opened = open_checkpoint(checkpoint)
    layout = opened.layout
    _require_whole(checkpoint, layout)
    if layout.kind == "folder":
        raise BadSetting(f"{checkpoint} is a diffusers folder already.")
    if folder.exists():
        raise BadSetting(f"{folder} is there already. Name a folder that is not, or remove it.")
    if not (config / "model_index.json").is_file():
        raise MissingObject(f"{config} is no config folder of a diffusers pipeline: it has no model_index.json.")
    averaged = layout.ema if ema == "use" else {}
    own = {name: averaged.get(name, source.keys[0]) for name, source in layout.sources.items()}
    shapes = {name: opened.entries[source.keys[0]].shape for name, source in layout.sources.items()}
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        passive = {name: source for name, source in layout.sources.items() if layout.family.component_of(name) is None}
        write_config(config, aside, passive)
        for part in layout.family.components:
            plan = renamed(layout.family.to_diffusers(part, shapes), own.__getitem__)
            write(aside / part / WEIGHTS.get(part, "model.safetensors"), opened, plan, {"format": "pt"})
        if passive:
            write(aside / PASSIVE_FILE, opened, passive, {})
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return layout


def to_single_file(folder: Path, checkpoint: Path, metadata: Mapping[str, str] | None = None) -> Layout:
    """Write a diffusers folder as a single file of canonical bytes; returns what was found in it.

    The marker `v_pred` is added where the folder's scheduler says so, since a single file has no scheduler.
    """
    opened = open_checkpoint(folder)
    layout = opened.layout
    _require_whole(folder, layout)
    if layout.kind == "single file":
        raise BadSetting(f"{folder} is a single file already.")
    import torch

    marks = {
        name: torch.empty(0) for name in lacking_marks((), None, read_scheduler(folder)) if name not in layout.sources
    }
    write(checkpoint, opened, layout.sources, metadata or {}, marks)
    return layout


def write(
    path: Path,
    opened: Opened,
    plan: Mapping[str, Source],
    metadata: Mapping[str, str],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the plan's tensors, read one by one, and the small tensors of `extra`."""
    extra = extra or {}
    described = {name: opened.described(source) for name, source in plan.items()}
    described |= {name: ("F32", tuple(tensor.shape)) for name, tensor in extra.items()}
    write_streamed(path, described, lambda name: extra[name] if name in extra else opened.read(plan[name]), metadata)


def _require_whole(path: Path, layout: Layout) -> None:
    complaints = [f"no {part}" for part in layout.absent] + [f"missing: {name}" for name in layout.missing]
    unknown = [key for key in layout.unexpected if not key.startswith(EMA)]
    complaints += [f"unknown: {key}" for key in unknown]
    if complaints:
        raise BadInput(
            f"{path.name} is not a whole {layout.family.name}:\n{listed(complaints)}\n"
            "Only whole checkpoints are converted, so that nothing is lost on the way."
        )


def write_config(config: Path, folder: Path, names: Collection[str]) -> None:
    """Copy what diffusers reads of a pipeline's folder beside its weights: JSON, and the text files of tokenizers.

    The scheduler's config will say what a single file with tensors of these `names` says by empty ones.
    """
    for file in sorted(config.rglob("*")):
        if file.is_file() and file.suffix in {".json", ".txt"} and ".index." not in file.name:
            target = folder / file.relative_to(config)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    path = folder / "scheduler" / "scheduler_config.json"
    said = scheduler_settings(names)
    if said and path.is_file():
        write_json(path, {**read_scheduler(folder), **said})
