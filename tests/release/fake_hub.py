"""A small Hugging Face hub on this machine: the few endpoints that publishing asks, with real LFS uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NEAR = "http://127.0.0.1"


@dataclass
class Hub:
    """What the hub holds, and what was asked of it."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by sha256, committed or not."""
    uploads: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    fail_commits: int = 0
    """How many of the next commits are refused."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _route(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            status, answer = respond(hub, self.command, path, body, self.headers.get("Authorization"))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _route  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"{NEAR}:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def respond(hub: Hub, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
    if method != "GET" and "/upload/" not in path and token != "Bearer hf_test":
        return 401, {"error": "Invalid credentials"}
    if path == "/api/repos/create":
        about = json.loads(body)
        name = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
        hub.repos[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        hub.private[name] = about.get("private", about.get("visibility") == "private")
        return 200, {"url": f"{hub.address}/{name}", "name": name}
    if found := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
        if hashlib.sha256(body).hexdigest() != found[1]:
            return 400, {"error": "damaged"}
        hub.objects[found[1]] = body
        hub.uploads.append(found[1])
        return 200, {}
    if path.endswith(".git/info/lfs/objects/batch"):
        rows = []
        for one in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}
            rows.append({**one, **({} if one["oid"] in hub.objects else {"actions": action})})
        return 200, {"transfer": "basic", "objects": rows}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    parts = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/.*)?", path)
    if parts is None or parts[1] not in hub.repos:
        return 404, {"error": "Repository not found"}
    return _of_repo(hub, method, parts[1], parts[2] or "", body)


def _of_repo(hub: Hub, method: str, name: str, rest: str, body: bytes) -> tuple[int, Any]:
    files = hub.repos[name]
    if rest == "" and method == "GET":
        return 200, {"id": name, "private": hub.private[name], "tags": [], "siblings": []}
    if rest == "/settings":
        about = json.loads(body)
        hub.private[name] = about.get("private", about.get("visibility") == "private")
        return 200, {}
    if rest.startswith("/tree/"):
        return 200, [_listed(path, data) for path, data in files.items()]
    if rest.startswith("/preupload/"):
        asked = json.loads(body)["files"]
        modes = [{"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False} for one in asked]
        return 200, {"files": modes}
    if rest.startswith("/commit/"):
        if hub.fail_commits:
            hub.fail_commits -= 1
            return 400, {"error": "the disk of the hub is full"}
        rows = [json.loads(line) for line in body.splitlines()]
        added = {}
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                added[value["path"]] = hub.objects[value["oid"]]
        files |= added
        hub.commits.append(sorted(added))
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid}
    return 404, {"error": f"{method} {rest}"}


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png", ".parquet")) else "regular"


def _listed(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if _mode(path) == "lfs":
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return row
