"""What pipelines share that needs none of the networks' libraries, which take seconds to import."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ambergrade.identity import digest
from ambergrade.store import write_json


def draw_world(settings: dict[str, Any]) -> None:
    """Draw the mini-booru that `data.draw` describes, unless its folder holds it already."""
    from ambergrade.world.booru import write_booru

    wanted, folder = settings["data"]["draw"], Path(settings["data"]["folder"])
    marker = folder / "drawn.json"
    there = marker.exists() and json.loads(marker.read_text()) == wanted
    start = time.monotonic()
    if not there:
        write_booru(folder, **wanted, workers=settings["compute"]["workers"])
        write_json(marker, wanted)
    how = "  finished before" if there else f"{time.monotonic() - start:8.1f} s"
    print(f"  {'mini-booru':<34}{how:<18}{digest(wanted)[:12]}", flush=True)


def label_of(point: Mapping[str, float]) -> str:
    """`a 0.8, b 0.5`."""
    return ", ".join(f"{name} {value:g}" for name, value in point.items())


def cut(strip: Path, width: int) -> list[np.ndarray]:
    pixels = np.asarray(Image.open(strip).convert("RGB"))
    return [pixels[:, start : start + width] for start in range(0, pixels.shape[1], width)]
