"""The server of one page: who may ask it, and what it takes."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from ambergrade.door.serving import LONGEST_RESULT, serve
from ambergrade.errors import BadInput

got: list[bytes] = []


def receive(text: bytes) -> str:
    if text == b"bad":
        raise BadInput("That is no result.")
    got.append(text)
    return "thanks"


@pytest.fixture
def place() -> Iterator[tuple[str, int, str]]:
    """Host, port and path of a running server; it ends by a good result."""
    heard, addresses = threading.Event(), []

    def say(address: str) -> None:
        addresses.append(address)
        heard.set()

    server = threading.Thread(target=serve, args=(b"<p>page", receive), kwargs={"say": say}, daemon=True)
    server.start()
    assert heard.wait(30)
    parts = urlsplit(addresses[0])
    assert parts.hostname == "127.0.0.1"
    assert parts.port
    got.clear()
    yield parts.hostname, parts.port, parts.path
    ask((parts.hostname, parts.port, parts.path), "POST", f"{parts.path}result", b"end")
    server.join(30)
    assert not server.is_alive()
    assert got[-1] == b"end"


def ask(
    place: tuple[str, int, str], method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(place[0], place[1], timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_only_the_address_with_its_token_answers(place: tuple[str, int, str]) -> None:
    path = place[2]
    assert len(path) > 24
    assert ask(place, "GET", path) == (200, b"<p>page")
    assert ask(place, "GET", "/")[0] == 404
    assert ask(place, "GET", path[:-2] + ("x/" if path[-2] != "x" else "y/"))[0] == 404
    assert ask(place, "GET", f"{path}../../etc/passwd")[0] == 404
    assert ask(place, "GET", path, Host="evil.example")[0] == 404  # DNS rebinding
    assert ask(place, "POST", "/result", b"x")[0] == 404
    assert got == []


def test_a_bad_result_is_told_and_awaited_again(place: tuple[str, int, str]) -> None:
    assert ask(place, "POST", f"{place[2]}result", b"bad") == (400, b"That is no result.")
    headers = {"Content-Length": str(LONGEST_RESULT + 1)}
    assert ask(place, "POST", f"{place[2]}result", b"", **headers)[0] == 404
    assert ask(place, "POST", f"{place[2]}result", b"", **{"Content-Length": "-1"})[0] == 404
    assert got == []
