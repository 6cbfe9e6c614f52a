"""The vote's page in a real headless Chromium, by keys and clicks, from a file and from the local server."""

from __future__ import annotations

import json
import runpy
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ambergrade.door.serving import serve
from ambergrade.score.vote_page import Answers, Shown, vote_page

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
BALLOT = "c" * 64
COUNT = "document.getElementById('count').textContent"
NASTY = "<b id=nasty>1girl</b>, (o)_(o)"


def page() -> str:
    def picture(level: int) -> Any:
        return np.full((32, 32, 3), level, np.uint8)

    return vote_page(BALLOT, "Which one?", [Shown(picture(k), picture(200 - k), f"{NASTY} {k}") for k in range(4)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("There is no Chromium here: the page is not voted on. Debian: apt-get install chromium")
    with runpy.run_path(str(REPOSITORY / "docs" / "ui_screenshots.py"))["Browser"](chromium) as found:
        yield found


def test_a_person_votes_by_keys_goes_back_reloads_and_saves(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "vote.html"
    file.write_text(page(), "utf-8")
    browser.open(file.as_uri())
    browser.wait("document.images[0].naturalWidth === 32")
    assert browser.ask(COUNT) == "1 of 4"
    assert browser.ask("document.getElementById('text').textContent") == f"{NASTY} 0"
    assert browser.ask("document.getElementById('nasty')") is None  # shown as text, not as an element
    browser.press("ArrowLeft")
    browser.press("2")
    browser.press("ArrowDown")
    assert browser.ask(COUNT) == "4 of 4"
    browser.press("u")
    browser.press("u")
    assert browser.ask(COUNT) == "2 of 4"
    browser.open(file.as_uri())  # a fresh tab goes on where the old one was
    browser.wait(f"{COUNT} === '2 of 4'")
    browser.ask("document.getElementById('right').click()")
    browser.ask("document.getElementById('tie').click()")
    browser.press("1")
    browser.wait("!document.getElementById('done').hidden")
    browser.press("2")  # there is nothing more to answer
    assert browser.ask("document.getElementById('send').hidden")
    name = "document.getElementById('voter')"
    browser.ask(f"{name}.focus(), {name}.value = 'Kay 1', {name}.dispatchEvent(new Event('input'))")
    browser.keep_downloads(tmp_path)
    browser.ask("document.getElementById('save').click()")
    browser.wait("document.getElementById('told').textContent.startsWith('Saved')")
    saved = tmp_path / f"vote-{BALLOT[:12]}.json"
    for _ in range(100):
        if saved.is_file() and saved.stat().st_size:
            break
        browser.ask("new Promise(done => setTimeout(done, 100))")
    found = Answers.read(saved.read_bytes(), saved.name)
    assert (found.ballot, found.voter, found.answers) == (BALLOT, "Kay 1", ("left", "right", "tie", "left"))


def test_served_it_sends_its_answers_itself(browser: Any) -> None:
    got: list[bytes] = []
    addresses: list[str] = []
    said = threading.Event()

    def say(address: str) -> None:
        addresses.append(address)
        said.set()

    def receive(text: bytes) -> str:
        got.append(text)
        return "Thank you <b>"

    server = threading.Thread(target=serve, args=(page().encode(), receive), kwargs={"say": say}, daemon=True)
    server.start()
    assert said.wait(30)
    browser.open(addresses[0])
    browser.wait(f"{COUNT} === '1 of 4'")
    browser.press("ArrowRight")
    browser.press("0")
    browser.ask("document.getElementById('stop').click()")
    browser.wait("document.getElementById('head').textContent.startsWith('2 of 4')")
    browser.ask("document.getElementById('send').click()")
    browser.wait("document.getElementById('told').textContent === 'Thank you <b>'")
    server.join(30)
    assert not server.is_alive()
    assert json.loads(got[0])["answers"] == ["right", "tie"]
