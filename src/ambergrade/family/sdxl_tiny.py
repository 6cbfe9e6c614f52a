"""The family of the embedded world's models: SDXL's structure, of widths that a processor trains in minutes."""

from __future__ import annotations

from dataclasses import replace

from ambergrade.family import sdxl

FAMILY = replace(sdxl.FAMILY, name="sdxl_tiny", like="sdxl")
