"""The findings of `lint` as files: a page to look at, a line for each finding, and the ids to leave out."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from ambergrade.captions.files import PictureFiles
from ambergrade.captions.lint import RULES, Finding, Lint
from ambergrade.errors import BadInput
from ambergrade.lines import write_rows
from ambergrade.pictures import decode_bytes
from ambergrade.store import written_aside

SHOWN = 12
"""Pictures of each rule on the page."""
SIDE = 160
STYLE = """body{margin:0 auto;max-width:1100px;padding:24px;font:15px/1.45 system-ui,sans-serif;color:#222;
background:#fbf9f5}h1{font-size:26px}h2{font-size:18px;margin-top:32px;border-bottom:2px solid #de8e1e}
table{border-collapse:collapse}td,th{padding:4px 12px;border-bottom:1px solid #e4dfd8;text-align:left}
td.n{text-align:right}.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:12px}
.card{background:#fff;border:1px solid #e4dfd8;border-radius:8px;padding:8px;font-size:13px;overflow-wrap:anywhere}
.card img{max-width:100%;display:block;margin-bottom:4px;
background:repeating-conic-gradient(#ddd 0 25%,#fff 0 50%) 0/16px 16px}.soft{color:#767076}"""


def write_report(found: Lint, files: PictureFiles, folder: Path) -> None:
    """Write `lint.html`, `findings.jsonl` and `leave_out.txt` (post ids, or file names, one a line) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"file": f.file, "rule": f.rule, "severity": f.severity, "detail": f.detail}
        | ({} if found.by_name else {"id": f.post_id})
        for f in found.findings
    ]
    with written_aside(folder / "findings.jsonl") as aside:
        write_rows(aside, rows)
    texts = {"leave_out.txt": "".join(f"{name}\n" for name in found.left_out), "lint.html": page(found, files)}
    for name, text in texts.items():
        with written_aside(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")


def page(found: Lint, files: PictureFiles) -> str:
    """One HTML document with everything in it."""
    head = f"<!doctype html><html lang=en><head><meta charset=utf-8><title>Lint</title><style>{STYLE}</style></head>"
    told = (
        f"<h1>Pictures: {found.pictures:,} of {found.posts:,} posts read</h1>"
        f"<p>{len(found.findings):,} findings. Better left out (unusable or repeated): {len(found.left_out):,} posts, "
        "listed in leave_out.txt. What is mended needs nothing done. Folder: "
        f"<code>{escape(str(files.folder))}</code></p>"
    )
    rows = "".join(
        f"<tr><td><a href='#{rule}'>{rule}</a><td class=n>{count:,}<td>{RULES[rule][0]}<td>{escape(RULES[rule][1])}"
        for rule, count in found.counts.items()
    )
    table = f"<table><tr><th>rule<th>posts<th>kind<th>meaning{rows}</table>" if rows else "<p>Nothing was found.</p>"
    return head + f"<body>{told}{table}{''.join(_section(rule, found, files) for rule in found.counts)}</body></html>"


def _section(rule: str, found: Lint, files: PictureFiles) -> str:
    hits = [finding for finding in found.findings if finding.rule == rule]
    cards = "".join(_card(found.called(finding), finding, files) for finding in hits[:SHOWN])
    rest = f"<p class=soft>{len(hits) - SHOWN:,} more in findings.jsonl.</p>" if len(hits) > SHOWN else ""
    return f"<h2 id='{rule}'>{rule}: {len(hits):,}</h2><div class=cards>{cards}</div>{rest}"


def _card(called: str, finding: Finding, files: PictureFiles) -> str:
    shown = ""
    if finding.file and finding.severity != "unusable":
        try:
            picture = decode_bytes(files.read(finding.file), finding.file)
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            png = io.BytesIO()
            picture.save(png, "PNG")
            shown = f"<img alt='' src='data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}'>"
        except BadInput:
            shown = "<p class=soft>(gone since)</p>"
    file = escape(finding.file) if called != finding.file else ""
    return f"<div class=card>{shown}<b>{escape(called)}</b> {file}<br>{escape(finding.detail)}</div>"
