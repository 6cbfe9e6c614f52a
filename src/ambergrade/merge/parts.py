"""The canonical parts of a single file's tensors: what methods see, whatever the layout of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ambergrade.family.detect import Layout
from ambergrade.family.layouts import Source

Parts = Mapping[str, Sequence[tuple[str, Source]]]
"""Single-file name to its canonical parts: canonical name, and how it is taken from the single file's tensor."""


def canonical_parts(layout: Layout | None, shapes: Mapping[str, tuple[int, ...]]) -> Parts:
    """The parts that methods see, named `component/diffusers key`; none for what is canonical as it is."""
    if layout is None:
        return {}
    found: dict[str, list[tuple[str, Source]]] = {}
    for part in layout.family.components:
        for key, source in layout.family.to_diffusers(part, shapes).items():
            found.setdefault(source.keys[0], []).append((f"{part}/{key}", source))
    return {name: sorted(parts, key=lambda item: item[1].part) for name, parts in found.items()}
