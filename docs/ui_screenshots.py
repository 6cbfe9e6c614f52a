"""Looks at the MLflow UI through headless Chromium: a made-up sweep, or your own record, as PNG files.

python docs/ui_screenshots.py [--root DIR] [--out DIR] [--chromium /usr/bin/chromium]

Without --root it journals a made-up chain of 25 points with pictures and a registered model first.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw

from ambergrade.nouns import Measurement
from ambergrade.track.journal import Journal
from ambergrade.track.ui import deep_link, run_link

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=40000"
)


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


def shoot(url: str, file: Path, chromium: str, size: str) -> None:
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                *FLAGS.split(),
                f"--user-data-dir={profile}",
                f"--window-size={size}",
                f"--screenshot={file}",
                url,
            ],
            check=True,
            capture_output=True,
            timeout=180,
        )
    print(f"{file}  {url}", flush=True)


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
        base, number = f"http://127.0.0.1:{asked.port}", journal.experiment_id
        asked.out.mkdir(parents=True, exist_ok=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "ambergrade.track.ui", "--root", str(root), "--port", str(asked.port)]
        )
        try:
            await_server(base)
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
                "version": f"{base}/#/models/{asked.experiment}/versions/1",
            }
            for name in asked.page or pages:
                url = pages[name]
                shoot(url, asked.out / f"{name}.png", asked.chromium, "1600,1500")
        finally:
            server.terminate()
            server.wait()


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
