"""Tiny scorer folders and pictures, made once."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ambergrade.nouns import Picture, Prompt, PromptSet

MAKE = runpy.run_path(str(Path(__file__).with_name("tiny_scorers.py")))


@dataclass(frozen=True)
class Folders:
    clip: Path
    tagger: Path
    features: Path
    reference: Path
    pictures: Path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: Any) -> Folders:
    root = tmp_path_factory.mktemp("scorers")
    return Folders(
        clip=MAKE["make_clip"](root / "clip"),
        tagger=MAKE["make_tagger"](root / "tagger"),
        features=MAKE["make_timm"](root / "features", 2, seed=5),
        reference=MAKE["make_pictures"](root / "real", 60),
        pictures=root / "real" / "pictures",
    )


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    """Twelve prompts that ask for one hair colour each and rule out another."""
    colours = ("red", "green", "blue")
    made = []
    for number in range(12):
        colour, other = colours[number % 3], colours[(number + 1) % 3]
        made.append(
            Prompt(
                f"p{number:02}",
                f"1girl, {colour} hair, number {number}",
                seed=100 + number,
                tags=("1girl", f"{colour}_hair", "masterpiece"),
                unwanted=(f"{other}_hair",),
            )
        )
    return PromptSet("twelve", tuple(made))


@pytest.fixture(scope="session")
def pictures(prompts: PromptSet) -> list[Picture]:
    """Two tall noise pictures a prompt."""
    rng = np.random.default_rng(1)
    return [
        Picture(prompt.id, prompt.seed + extra, rng.integers(0, 256, size=(48, 32, 3), dtype=np.uint8))
        for prompt in prompts.prompts
        for extra in (0, 1000)
    ]
