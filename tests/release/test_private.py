"""What ties a release to the machine that made it, in whatever position of whatever text."""

from __future__ import annotations

import getpass
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from ambergrade.errors import BadInput
from ambergrade.nouns import Prompt, PromptSet
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import Draft
from ambergrade.release.private import refuse_private


@pytest.mark.parametrize(
    "text",
    [
        "/home/kim",
        "Trained on the box at /home/kim over a weekend.",
        "models in (/mnt/disk/models) were used",
        "weights=/srv/weights/a.safetensors",
        "see file:///etc/passwd",
        "from ~/models and ~kim/models",
        "at C:\\Users\\kim\\models",
        "on \\\\server\\share",
        "in /root",
        "made 2026-11-30T20:33:26Z",
        "made on 2026-11-30 20:33",
    ],
)
def test_a_place_or_a_time_is_refused_wherever_it_stands(text: str) -> None:
    for facts in ({"summary": text}, {"deep": [{"er": ["x", text]}]}, {text: 1}):
        with pytest.raises(BadInput, match="must be the same wherever it is made"):
            refuse_private(facts)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/a/b/blob/main/LICENSE.md",
        "builtin://sdxl_tiny",
        "8e-6/2e-6, he/she, 1/2, and/or, w/ a hat",
        "fate/grand order, >:/, \\||/, o_o/",
        "768x1024 / 1024x1024, danbooru2023 until 2023-11-20, ratio 4:3",
        "2.13.0+cpu",
        "<br>/",
    ],
)
def test_what_only_looks_like_a_place_passes(text: str) -> None:
    refuse_private({"summary": text})


def test_the_own_names_of_machine_and_user_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "amber-box-3")
    monkeypatch.setattr(getpass, "getuser", lambda: "kimberly")
    for text in ("trained on Amber-Box-3.", "by kimberly at night"):
        with pytest.raises(BadInput, match="name"):
            refuse_private({"summary": text})
    refuse_private({"summary": "amber-box-34 and kimberlyite"})
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    refuse_private({"summary": "the root of two"})


def test_no_text_of_a_release_names_a_place(tmp_path: Path, draft: Draft, payload: Payload) -> None:
    told = replace(draft, summary="It lay at /home/kim all night.")
    with pytest.raises(BadInput, match=r"summary = .*'/home/kim' is a path"):
        build_release(tmp_path / "out", told, payload)
    prompts = PromptSet("heldout", (Prompt("1", "1girl in /home/kim", 7),))
    with pytest.raises(BadInput, match=r"prompts\.jsonl"):
        build_release(tmp_path / "out", draft, replace(payload, prompts=prompts))
    assert list(tmp_path.iterdir()) == []
