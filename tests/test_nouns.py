"""Prompt and caption files: what people write is read as they mean it, or refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from ambergrade.errors import BadInput
from ambergrade.nouns import Caption, CaptionedPicture, CaptionSet, Prompt, PromptSet


def prompts(folder: Path, text: str, encoding: str = "utf-8") -> tuple[Prompt, ...]:
    (folder / "p.jsonl").write_text(text, encoding=encoding)
    return PromptSet.read(folder / "p.jsonl").prompts


def test_prompts_as_editors_save_them(tmp_path: Path) -> None:
    row = '{"id": "a", "text": "1girl, hat"}\n'
    for text, encoding in ((row, "utf-8-sig"), (row + "\n\n", "utf-8"), (row.replace("\n", "\r\n"), "utf-8")):
        assert prompts(tmp_path, text, encoding) == (Prompt("a", "1girl, hat", 0),)


def test_rows_as_scripts_write_them(tmp_path: Path) -> None:
    (one,) = prompts(tmp_path, '{"id": 7, "text": "x", "tags": "1girl, long hair,", "unwanted": ["tail"]}')
    assert (one.id, one.tags, one.unwanted) == ("7", ("1girl", "long_hair"), ("tail",))
    first, second = prompts(tmp_path, '{"id": "a", "text": ""}\n\n{"id": "b", "text": "", "seed": 9}')
    assert (first.seed, second.seed) == (0, 9)


def test_a_set_is_read_back_whatever_its_texts_hold(tmp_path: Path) -> None:
    made = PromptSet("p", (Prompt("a", "1girl\u2028hat\u0085x\u2029", 5, tags=("o_o",)), Prompt("b", "\ufeffé", 6)))
    made.write(tmp_path / "p.jsonl")
    assert PromptSet.read(tmp_path / "p.jsonl") == made


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"id": "a", "text": "x", "sed": 7}', "'sed' is not known[\\s\\S]*'seed'"),
        ('{"id": "a", "text": "x", "cfg": 7}', "'cfg' is not known"),
        ('{"id": "a", "text": null}', "text: a text is needed, found None"),
        ('{"id": "a"}', "text: no value given"),
        ('{"id": true, "text": "x"}', "id: a text is needed"),
        ('{"id": "", "text": "x"}', "is empty"),
        ('{"id": "a", "text": "x", "seed": NaN}', "NaN"),
        ('{"id": "a", "text": "x", "seed": 1.5}', "seed: a whole number"),
        ('{"id": "a", "text": "x", "seed": -1}', "seed: 0 to"),
        ('{"id": "a", "text": "x", "seed": 1' + "0" * 30 + "}", "seed: 0 to"),
        ('{"id": "a", "text": "x", "tags": [1]}', r"tags\[0\]: a text"),
        ('{"id": "a", "text": "x", "rating": "explicite"}', "explicit"),
        ('{"id": "fine", "text": "x"}', "'fine' is there twice"),
    ],
)
def test_a_wrong_prompt_is_refused_with_its_line(tmp_path: Path, row: str, told: str) -> None:
    with pytest.raises(BadInput, match=rf"p\.jsonl, line 2: [\s\S]*{told}"):
        prompts(tmp_path, '{"id": "fine", "text": "x"}\n' + row)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no prompt"):
        prompts(tmp_path, "\n")


PICTURE = CaptionedPicture(
    5, "a\u2028.png", "ab" * 32, Caption(("1girl",), ("x\u0085", "y"), (), (1, 1), ("y",)), (9, 8), (7, 6), (5, 4)
)


def test_a_caption_set_is_read_back(tmp_path: Path) -> None:
    CaptionSet((PICTURE, PICTURE), "r").write(tmp_path / "c.jsonl")
    assert CaptionSet.read(tmp_path / "c.jsonl") == CaptionSet((PICTURE, PICTURE), "r")


@pytest.mark.parametrize(
    "changed",
    [
        {"crop": [1]},
        {"crop": [1, 2, 3]},
        {"bucket": [1.5, 2]},
        {"post_id": "5"},
        {"caption": {"keep": "1girl", "flexible": []}},
        {"caption": {"keep": [None], "flexible": []}},
        {"caption": {"keep": []}},
        {"caption": []},
        {"more": 1},
        {"sha256": None},
    ],
    ids=str,
)
def test_a_wrong_caption_row_is_refused_with_its_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    CaptionSet((PICTURE,), "r").write(tmp_path / "c.jsonl")
    head, row = (tmp_path / "c.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    (tmp_path / "c.jsonl").write_text(f"{head}\n{json.dumps({**json.loads(row), **changed})}\n")
    with pytest.raises(BadInput, match=r"c\.jsonl, line 2 is no line of a caption set"):
        CaptionSet.read(tmp_path / "c.jsonl")
    for broken in ("", "{}\n"):
        (tmp_path / "c.jsonl").write_text(broken)
        with pytest.raises(BadInput, match="caption set"):
            CaptionSet.read(tmp_path / "c.jsonl")
