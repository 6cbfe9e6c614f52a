"""Releases as a stranger checks them: whole ones hold at every level, and whatever is changed is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambergrade.chain.verification import LEVELS, Asked, verify_release
from ambergrade.door import command


def test_a_release_holds_at_every_level(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["verify", str(release), "--rebuild", "--rescore"]) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [level.name for level in LEVELS if level.name != "signature"]
    print("\n".join(lines))


def test_x(release: Path) -> None:
    for found in verify_release(release, Asked()):
        print(found)
