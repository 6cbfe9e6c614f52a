"""The page of a blind vote: what it holds, what it must not hold, and which results are read."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from ambergrade.errors import BadInput
from ambergrade.score.vote_page import FORMAT, Answers, Shown, vote_page

NASTY = '</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028 & "quotes" javascript:alert(3)'


def pixels(value: int, side: int = 16) -> Any:
    return np.full((side, side, 3), value, np.uint8)


def asked(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="asked">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_every_picture_is_in_the_file_once_and_nothing_is_fetched() -> None:
    page = vote_page("b" * 64, "Which?", [Shown(pixels(1), pixels(2), "one"), Shown(pixels(2), pixels(3), "two")])
    held = asked(page)
    assert [row[:2] for row in held["pairs"]] == [[0, 1], [1, 2]]
    assert len(held["pictures"]) == 3
    assert all(picture.startswith("data:image/png;base64,") for picture in held["pictures"])
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page


def test_a_large_picture_is_shrunk_to_what_a_screen_shows() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1536, 1024, 3), np.uint8)
    (picture, _) = asked(vote_page("b", "?", [Shown(noise, pixels(1), "")]))["pictures"]
    assert picture.startswith("data:image/jpeg")


def test_prompts_and_questions_cannot_leave_their_places() -> None:
    page = vote_page("b", NASTY, [Shown(pixels(1), pixels(2), NASTY)])
    assert asked(page)["pairs"][0][2] == NASTY
    outside = page.replace(re.search(r'id="asked">(.*?)</script>', page, re.DOTALL)[1], "")  # type: ignore[index]
    assert "<img src=x" not in page
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "&lt;/script&gt;" in outside


GOOD: dict[str, Any] = {"format": FORMAT, "ballot": "b" * 64, "voter": "Kay", "answers": ["left", "tie"]}


def test_a_result_is_read() -> None:
    assert Answers.read(json.dumps(GOOD).encode(), "x").answers == ("left", "tie")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"answers": []},
        {"answers": ["up"]},
        {"answers": "left"},
        {"answers": [["left"]]},
        {"voter": "x" * 61},
        {"voter": "a\nb"},
        {"more": 1},
        {"ballot": 7},
    ],
)
def test_anything_else_is_refused_in_a_few_lines(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="no result of a vote") as refused:
        Answers.read(json.dumps({**GOOD, **change}).encode(), "result.json")
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"answers": NaN}'])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(BadInput, match="no result of a vote"):
        Answers.read(text, "result.json")
