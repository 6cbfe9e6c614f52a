"""Shows one page on this machine and waits for what it sends back: a server of the standard library, on loopback only.

The address holds a random token, and requests must name the server's own address as their host, so that neither
another user's program nor a web page elsewhere (by DNS rebinding) can answer in the voter's place.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ambergrade.errors import AmbergradeError

LONGEST_RESULT = 1 << 20
HOST = "127.0.0.1"


def serve(page: bytes, receive: Callable[[bytes], str], *, port: int = 0, say: Callable[[str], None] = print) -> None:
    """Serve a page until `receive` has taken a result; `say` hears its address.

    receive: takes what the page sent, and returns what the page then tells; an AmbergradeError that it raises is told
    there too, and the server goes on waiting.
    """
    token, done = secrets.token_urlsafe(24), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, page, "text/html; charset=utf-8") if self._is_ours("") else self._nothing()

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self._is_ours("result") or not length.isdecimal() or int(length) > LONGEST_RESULT:
                self._nothing()
                return
            try:
                told = receive(self.rfile.read(int(length)))
            except AmbergradeError as error:
                self._answer(400, str(error).encode(), "text/plain; charset=utf-8")
                return
            self._answer(200, told.encode(), "text/plain; charset=utf-8")
            done.set()

        def _is_ours(self, name: str) -> bool:
            host = f"{HOST}:{server.server_port}"
            return self.headers.get("Host") == host and hmac.compare_digest(
                self.path.encode(), f"/{token}/{name}".encode()
            )

        def _nothing(self) -> None:
            self._answer(404, b"Nothing here.", "text/plain; charset=utf-8")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
            }
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Write no line a request: it would hold the token."""

    with ThreadingHTTPServer((HOST, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        say(f"http://{HOST}:{server.server_port}/{token}/")
        try:
            done.wait()
        finally:
            server.shutdown()
            thread.join()
