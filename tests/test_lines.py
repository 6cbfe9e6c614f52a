"""Text files as editors, scripts and other systems save them: what is read, and what is refused by name."""

from pathlib import Path

import pytest

from ambergrade.errors import BadInput, MissingObject
from ambergrade.lines import read_lines, read_rows, read_text, write_rows


@pytest.mark.parametrize(
    ("saved", "lines"),
    [
        (b"1girl, hat\nsolo", [(1, "1girl, hat"), (2, "solo")]),
        (b"\xef\xbb\xbf1girl, hat\r\n", [(1, "1girl, hat")]),
        (b"\r\n\n  a \t\n\n\nb\n\n", [(3, "a"), (6, "b")]),
        ("a\u2028b\u2029c\u0085d\x0ce\x1ff\nsecond".encode(), [(1, "a\u2028b\u2029c\u0085d\x0ce\x1ff"), (2, "second")]),
        ("\xa0é\u3000\n".encode(), [(1, "\xa0é\u3000")]),
        (b"", []),
    ],
)
def test_lines_end_at_line_feeds_alone(tmp_path: Path, saved: bytes, lines: list[tuple[int, str]]) -> None:
    (tmp_path / "a.txt").write_bytes(saved)
    assert list(read_lines(tmp_path / "a.txt")) == lines
    assert read_text(tmp_path / "a.txt") == "\n".join(text for _, text in lines)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ("1girl, hat".encode("utf-16"), r"a\.txt is written in UTF-16"),
        ("1girl, hat".encode("utf-16-be"), "zero bytes: it is UTF-16"),
        ("fine\n1girl, café".encode("latin-1"), r"a\.txt, line 2 is not UTF-8: byte 0xe9 after 10 others"),
    ],
)
def test_other_encodings_are_refused_by_name(tmp_path: Path, saved: bytes, told: str) -> None:
    (tmp_path / "a.txt").write_bytes(saved)
    with pytest.raises(BadInput, match=told):
        list(read_lines(tmp_path / "a.txt"))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingObject, match="No file"):
        list(read_lines(tmp_path / "absent.txt"))
    with pytest.raises(BadInput, match="directory"):
        list(read_lines(tmp_path))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c\u2029", "n": 1}, {"text": "\ufeff é", "n": 2.5}]
    write_rows(tmp_path / "a.jsonl", rows)
    assert list(read_rows(tmp_path / "a.jsonl")) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('[{"id": 1}]', "JSON object is needed on each line"),
        ("id,text", "Expecting value"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "no JSON number"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": ' + "9" * 5000 + "}", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"a": 1', "not a JSON object"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"fine": "\\ud83d\\ude00"}\n\n' + line + "\n")
    with pytest.raises(BadInput, match=r"a\.jsonl, line 3: ") as refused:
        list(read_rows(tmp_path / "a.jsonl"))
    assert told in str(refused.value)
    assert len(str(refused.value)) < 400
