"""Looks at the MLflow UI through headless Chromium: a made-up sweep, or your own record, as PNG files.

python docs/ui_screenshots.py [--root DIR] [--out DIR] [--chromium /usr/bin/chromium]

Without --root it journals a made-up chain of 25 points with pictures and a registered model first.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ambergrade.nouns import Measurement
from ambergrade.track.journal import Journal
from ambergrade.track.ui import deep_link, run_link

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
)
STATE = """JSON.stringify([document.readyState, document.body?.innerText, document.querySelectorAll("*").length,
[...document.images].filter(image => image.complete && image.naturalWidth).length])"""
"""What of a page must stand still before it counts as drawn."""
CLOSE = """(() => {
  const button = document.querySelector('[data-component-id="mlflow.assistant.chat_panel.close"]');
  button?.click();
  return !!button;
})()"""
"""Closes the panel of MLflow's assistant, which takes a quarter of the window."""


class Browser:
    """Headless Chromium, driven over its debugging pipe: no port, and no package beside Debian's chromium.

    The protocol is Chrome's own: https://chromedevtools.github.io/devtools-protocol
    """

    def __init__(self, chromium: str = "/usr/bin/chromium", width: int = 1600, height: int = 1500) -> None:
        self.width, self.height = width, height
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 50) for end in (theirs_in, theirs_out)]  # clear of 3 and 4
        line = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
        command = ["bash", "-c", line, "bash", chromium, *FLAGS.split(), f"--user-data-dir={self._profile.name}"]
        quiet: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        self._process = subprocess.Popen(command, pass_fds=high, start_new_session=True, **quiet)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._number, self._rest, self._session, self._target = 0, b"", "", ""

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Show an address in a fresh tab."""
        old, self._session = self._target, ""
        self._target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        size = {"width": self.width, "height": self.height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.enable")
        self._call("Page.navigate", url=url)
        self.wait("document.body !== null && location.href !== 'about:blank'")
        if old:
            self._call("Target.closeTarget", targetId=old)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 90) -> Any:
        """Ask until the answer is true, and return it. Raises TimeoutError with what the page shows instead."""
        end = time.monotonic() + seconds
        while not (answer := self.ask(script)):
            if time.monotonic() > end:
                shown = str(self.ask("document.body ? document.body.innerText : 'nothing'"))
                raise TimeoutError(f"After {seconds:g} s still not: {script}\nThe page shows:\n{shown[:2000]}")
            time.sleep(0.2)
        return answer

    def settle(self, still: float = 2.0, seconds: float = 90) -> None:
        """Wait until nothing on the page has moved for a while."""
        end, since, last = time.monotonic() + seconds, time.monotonic(), ""
        while time.monotonic() - since < still:
            now = str(self.ask(STATE))
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() > end:
                raise TimeoutError(f"The page still moves after {seconds:g} s.")
            time.sleep(0.2)

    def keep_downloads(self, folder: Path) -> None:
        """Put what the open page saves into a folder."""
        self._call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def press(self, key: str) -> None:
        """Press a key, as a person does."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 else {}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    def shoot(self, file: Path) -> None:
        """The window as a PNG file."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        about: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        about |= {"sessionId": self._session} if self._session and not method.startswith("Target.") else {}
        os.write(self._out, json.dumps(about).encode() + b"\0")
        end = time.monotonic() + 120
        while True:
            message = json.loads(self._read(end))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result

    def _read(self, end: float) -> bytes:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            held = os.read(self._in, 1 << 20) if ready else b""
            if not held:
                raise TimeoutError("Chromium does not answer." if not ready else "Chromium has ended.")
            self._rest += held
        message, _, self._rest = self._rest.partition(b"\0")
        return message


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def picture(a: float, b: float, number: int) -> Image.Image:
    image = Image.new("RGB", (128, 128), (int(60 + 100 * a), int(60 + 150 * b), 60 + 40 * number))
    ImageDraw.Draw(image).ellipse((20, 20, 60 + 30 * a, 60 + 30 * b), fill="white")
    return image


def made_up_chain(root: Path) -> None:
    """A chain as pipelines/gamma.py journals it, with numbers from a formula."""
    journal = Journal.open(
        root, "gamma_tiny", note="Gamma rev1 on the embedded world: train → sweep → evaluate → release."
    )
    parents = {name: sha(name) for name in ("beta7", "anxl3", "anxl2")}
    checkpoint = root / "made_up.safetensors"
    checkpoint.write_bytes(b"\0" * 4096)
    with journal.run("gamma rev1", key="chain-1", kind="chain", params={"experiment": "gamma_tiny"}) as chain:
        chain.text("seed: 1\n", "config.yaml")
        with journal.run("train base7", key="train-1", kind="train", parent=chain, params={"unet_lr": 1e-5}) as train:
            train.datasets({"captions": sha("captions")}, "training")
            for step in range(0, 200, 5):
                train.metrics({"loss/train": 0.2 * math.exp(-step / 80) + 0.05}, step)
            train.model("base7", checkpoint, sha("base7"), parents={"beta7": parents["beta7"]})
        best = 0.0
        for a in (0.0, 0.4, 0.8, 1.2, 1.6):
            for b in (0.0, 0.25, 0.5, 0.75, 1.0):
                score = math.exp(-((a - 0.8) ** 2) - 2 * (b - 0.5) ** 2)
                best = max(best, score)
                with journal.run(
                    f"a {a:g}, b {b:g}", key=f"point-{a}-{b}", kind="point", parent=chain, params={"a": a, "b": b}
                ) as point:
                    point.metrics(
                        {
                            "tag_balance": Measurement(score, score - 0.05, score + 0.05, 48),
                            "clip_score": Measurement(25 + score, 24.5 + score, 25.5 + score, 48),
                            "fid": Measurement(40 - 10 * score, 38 - 10 * score, 42 - 10 * score, 48, False),
                        }
                    )
                    if not point.done:
                        for number in range(4):
                            point.picture(f"sweep/{number:02d}", picture(a, b, number))
        with journal.run("release gamma rev1", key="release-1", kind="release", parent=chain) as release:
            release.model(
                "gamma-rev1",
                checkpoint,
                sha("gamma-rev1"),
                kind="merge",
                parents={**parents, "base7": sha("base7")},
                registered_as="gamma_tiny",
                aliases=["candidate"],
                note="`gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)`",
                params={"a": 0.8, "b": 0.5},
                metrics={"tag_balance": best},
            )
        chain.metrics({"tag_balance": best})
        columns = ["tag_balance", "tag_balance_lo", "tag_balance_hi", "clip_score", "fid"]
        chain.view("sweep", "point", order_by="tag_balance", params=["a", "b"], metrics=columns)
        chain.note("| point | tag_balance |\n|---|---|\n| a 0.8, b 0.5 | **1.000** [0.950, 1.050] |")


@contextlib.contextmanager
def served(root: Path, port: int) -> Iterator[str]:
    """MLflow's UI on a record, as `make ui` opens it; its address."""
    command = [sys.executable, "-m", "ambergrade.track.ui", "--root", str(root), "--port", str(port)]
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, start_new_session=True)
    try:
        await_server(base)
        yield base
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # its worker processes too
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder that holds mlruns/; made up when left out")
    parser.add_argument("--experiment", default="gamma_tiny")
    parser.add_argument("--out", type=Path, default=Path("ui_screenshots"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--page", action="append", help="only this page; may be given several times")
    parser.add_argument("--port", type=int, default=5055)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = asked.root or Path(scratch)
        if asked.root is None:
            made_up_chain(root)
        journal = Journal.open(root, asked.experiment)
        assert journal.client is not None, journal.troubles
        runs = journal.client.search_runs([journal.experiment_id], order_by=["attributes.start_time DESC"])
        by_kind = {run.data.tags["ag.kind"]: run for run in reversed(runs)}
        chain, point = by_kind["chain"].info.run_id, by_kind["point"].info.run_id
        made = journal.client.get_run(by_kind["release"].info.run_id).outputs.model_outputs[0].model_id
        number = journal.experiment_id
        registered = next(iter(journal.client.search_registered_models())).name
        asked.out.mkdir(parents=True, exist_ok=True)
        with served(root, asked.port) as base, Browser(asked.chromium) as browser:
            pages = {
                "home": f"{base}/",
                "runs": deep_link(number, base=base),
                "leaderboard": deep_link(number, view=f"sweep-{chain[:8]}", base=base),
                "pictures": deep_link(number, view=f"sweep-{chain[:8]}", chart=True, base=base),
                "chain": run_link(number, chain, base),
                "point": run_link(number, point, base),
                "point_pictures": run_link(number, point, base).replace("?", "/artifacts?"),
                "train": run_link(number, by_kind["train"].info.run_id, base).replace("?", "/model-metrics?"),
                "release": run_link(number, by_kind["release"].info.run_id, base),
                "model": f"{base}/#/experiments/{number}/models/{made}?workflowType=machine_learning",
                "models": f"{base}/#/experiments/{number}/models?workflowType=machine_learning",
                "registry": f"{base}/#/models",
                "version": f"{base}/#/models/{registered}/versions/1",
            }
            for name in asked.page or pages:
                browser.open(pages[name])
                browser.settle()
                if browser.ask(CLOSE):
                    browser.settle(1.0)
                browser.shoot(asked.out / f"{name}.png")
                print(f"{asked.out / name}.png  {pages[name]}", flush=True)


def await_server(base: str) -> None:
    for _ in range(480):
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"{base} did not answer in 4 minutes")


if __name__ == "__main__":
    main()
