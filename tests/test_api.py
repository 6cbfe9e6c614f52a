"""What may be used from Python is named on one page, loaded lazily, and documented with an example."""

import subprocess
import sys
from pathlib import Path

import pytest

import ambergrade
from ambergrade import api

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


@pytest.mark.parametrize("name", ambergrade.__all__)
def test_a_public_name_is_on_the_page_and_has_an_example(name: str) -> None:
    assert f"ambergrade.{name}(" in PAGE
    assert ">>> " in (getattr(api, name).__doc__ or "")
    assert getattr(ambergrade, name) is getattr(api, name)


def test_the_lists_agree() -> None:
    assert sorted(ambergrade.__all__) == sorted(api.__all__)
    with pytest.raises(AttributeError, match="merge_files"):
        _ = ambergrade.merge_all


def test_the_import_takes_nothing_along() -> None:
    script = "import sys, ambergrade; sys.exit(len({'torch', 'numpy', 'mlflow', 'hydra'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
