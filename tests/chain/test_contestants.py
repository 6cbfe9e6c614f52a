"""Which points of a sweep people vote on: those that were scored to the end, best first."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ambergrade.chain.contestants import ranked
from ambergrade.errors import BadInput
from ambergrade.search.driver import Job, Outcome
from ambergrade.search.folder import SweepFolder


def scored(folder: SweepFolder, job: Job, rows: list[float], identity: str) -> None:
    value = {"score": 0.0, "rows": rows, "pictures": 0, "seconds": 0.0, "kind": "point", "identity": identity}
    folder.begin(job)
    folder.keep(job, Outcome(True, value))


def test_whole_points_come_best_first_and_failed_ones_not_at_all(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    scored(folder, Job("a 1", {"a": 1.0}), [0.2, math.nan, 0.4], "one")
    scored(folder, Job("a 2", {"a": 2.0}), [0.9, 0.9, 0.9], "two")
    folder.begin(Job("a 3", {"a": 3.0}))
    folder.keep(Job("a 3", {"a": 3.0}), Outcome(False, reason="it failed"))
    folder.begin(Job("a 4", {"a": 4.0}))
    assert list(ranked(tmp_path, True).items()) == [("a 2", ("point", "two")), ("a 1", ("point", "one"))]
    assert list(ranked(tmp_path, False)) == ["a 1", "a 2"]


def test_of_a_race_only_those_that_were_drawn_on_all_prompts(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    for label, first, second in (
        ("a 1", [0.5, 0.5], [0.1, 0.1]),
        ("a 2", [0.4, 0.4], [0.4, 0.4]),
        ("a 3", [1.0, 1.0], None),
    ):
        point = {"a": float(label[2:])}
        scored(folder, Job(label, point, (0, 2)), first, f"{label} first")
        if second is not None:
            scored(folder, Job(label, point, (2, 4)), second, f"{label} second")
    assert ranked(tmp_path, True) == {"a 2": ("point", "a 2 first"), "a 1": ("point", "a 1 first")}


def test_a_folder_without_a_finished_point_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no point"):
        ranked(tmp_path, True)
