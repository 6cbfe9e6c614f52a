"""Pieces of reports that need nothing beside them: a page, tables, intervals drawn, pictures inside the file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ambergrade.pictures import open_picture

SIDE = 320
"""Longest side of an embedded picture, pixels."""
LARGE = 500_000
"""Bytes from which an embedded file is compressed harder."""
STYLE = """
:root{--ink:#222;--soft:#767076;--line:#e4dfd8;--paper:#fbf9f5;--card:#fff;--good:#0072b2;--bad:#d55e00;--mid:#8a8a8a}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 60px}h1{font-size:26px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 10px;padding-bottom:4px;border-bottom:2px solid #de8e1e}p{margin:6px 0}
.soft{color:var(--soft)}.small{font-size:13px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:10px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;background:var(--card);width:100%}.wide{overflow-x:auto}
td,th{padding:4px 10px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
th{font-weight:600;font-size:13px;color:var(--soft)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.better{color:var(--good)}.worse{color:var(--bad)}.undecided{color:var(--mid)}
.strip{display:grid;grid-template-columns:repeat(12,1fr);gap:4px;margin:14px 0}
.strip img{width:100%;border-radius:4px;display:block}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}
.card img{width:100%;image-rendering:auto;border-radius:4px;display:block;margin-bottom:4px}
.card .two{display:grid;grid-template-columns:1fr 1fr;gap:4px}
.big{font-size:26px;font-weight:600;margin:0}.miss{color:var(--bad);font-weight:600}
ul{margin:6px 0;padding-left:20px}details{margin-top:6px}summary{cursor:pointer}
code{font-size:12px;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;
font-size:12px;overflow-x:auto}
figure{margin:14px 0}figure img{max-width:100%;border:1px solid var(--line);border-radius:8px;display:block}
figcaption{color:var(--soft);font-size:13px;margin-top:4px}
table.sorts th{cursor:pointer;user-select:none;white-space:normal;vertical-align:bottom}
table.sorts th[data-way=up]::after{content:" ▲"}
table.sorts th[data-way=down]::after{content:" ▼"}tr.winner td{background:#fdeed2}
tr.member td:first-child{font-weight:600}
a{color:var(--good)}table.sorts svg{display:block;margin-left:auto}
"""
SORTS = """
for(const table of document.querySelectorAll("table.sorts"))table.rows[0].addEventListener("click",event=>{
const head=event.target.closest("th");if(!head)return;const way=head.dataset.way==="down"?"up":"down";
for(const other of table.rows[0].cells)delete other.dataset.way;head.dataset.way=way;
const key=row=>row.cells[head.cellIndex].dataset.v??row.cells[head.cellIndex].textContent;
const blank=text=>text===""||text==="nan";
const rows=[...table.rows].slice(1).sort((one,two)=>{const a=key(one),b=key(two);
if(blank(a)||blank(b))return blank(a)-blank(b);const apart=isNaN(a)||isNaN(b)?a.localeCompare(b):a-b;
return way==="down"?-apart:apart});table.append(...rows)});
"""
"""Lets a reader sort tables of the class `sorts` by a click on a heading; what has no value stays last."""


def page(title: str, parts: Sequence[str], script: str = "") -> str:
    """A whole HTML document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    runs = f"<script>{script}</script>" if script else ""
    body = f"<body><main>{''.join(parts)}</main>{runs}</body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head>{body}</html>"


def table(heading: str, note: str, head: str, rows: Sequence[str]) -> str:
    whole = f"<div class=wide><table>{head}{''.join(rows)}</table></div>"
    return f"<h2>{heading}</h2><p class='soft small'>{note}</p>{whole}"


def bar(
    value: float,
    low: float,
    high: float,
    verdict: str = "",
    tick: float = math.nan,
    ends: tuple[float, float] | None = None,
) -> str:
    """An interval as inline SVG: shares on 0 to 1, everything else on its own scale (or `ends`) with zero in it."""
    if math.isnan(value) or math.isnan(low) or math.isnan(high):
        return ""
    start, end = (0.0, 1.0) if not verdict and low >= 0 and high <= 1 else (min(low, 0.0), max(high, 0.0))
    start, end = ends or (start, end)
    span = (end - start) or 1.0

    def x(number: float) -> float:
        return 4 + 152 * (number - start) / span

    colour = {"better": "var(--good)", "worse": "var(--bad)", "undecided": "var(--mid)"}.get(verdict, "var(--good)")
    zero = f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="2" y2="16" stroke="#222"/>' if start <= 0 <= end else ""
    floor = (
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="3" y2="15" stroke="var(--bad)" stroke-width="2"/>'
        if tick == tick
        else ""
    )
    return (
        f'<svg width="160" height="18" role="img" aria-label="{number(low)} to {number(high)}">'
        f'<line x1="4" x2="156" y1="9" y2="9" stroke="var(--line)"/>{zero}{floor}'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9" stroke="{colour}" stroke-width="3" '
        f'stroke-linecap="round"/><circle cx="{x(value):.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def data(pixels: npt.NDArray[np.uint8], side: int = SIDE) -> str:
    """The picture as a data URL: PNG as it is where it is small, else a JPEG of `side` pixels at most."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) > SIDE:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(file, "JPEG", quality=90)
        kind = "jpeg"
    else:
        image.save(file, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(path: Path, caption: str) -> str:
    """A picture file inside the page with a line below: as it is, or as a JPEG where that is far smaller."""
    held, kind = path.read_bytes(), "png"
    if len(held) > LARGE:
        file = io.BytesIO()
        open_picture(path).save(file, "JPEG", quality=88)
        if 2 * file.tell() < len(held):
            held, kind = file.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(held).decode()}"
    words = escape(caption, quote=True)
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def definitions(rows: Mapping[str, str]) -> str:
    """What stands under a title."""
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in rows.items()) + "</dl>"


def number(value: float, signed: bool = False, like: float = 0.0) -> str:
    """With three decimals or fewer, as suits the larger of it and of `like`, which stands beside it."""
    if math.isnan(value):
        return "–"
    size = max(abs(value), abs(like))
    digits = 3 if size < 2 else 2 if size < 100 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def short(value: float) -> str:
    """Two significant digits, for what may be very small."""
    return "–" if math.isnan(value) else f"{value:.2g}".replace("-", "−")


def interval(low: float, high: float, signed: bool = False) -> str:
    return "[–]" if math.isnan(low) else f"{number(low, signed, high)} … {number(high, signed, low)}"


def arrow(higher_is_better: bool) -> str:
    return "<span class=soft>↑</span>" if higher_is_better else "<span class=soft>↓</span>"
