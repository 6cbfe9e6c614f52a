"""A score sheet as one HTML file that needs nothing beside it: numbers with intervals, pictures, tags, fingerprints."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ambergrade.nouns import RATINGS, Measurement, Prompt, PromptSet
from ambergrade.score.adherence import Tables, per_tag, rating_confusion
from ambergrade.score.comparison import aggregates, differences, remarks
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import PairedDifference, prompt_means

Pixels = npt.NDArray[np.uint8]
Find = Callable[[str, int], Pixels | None]
"""(prompt id, seed) to the picture, or None where it was not kept."""

SIDE = 320
"""Longest side of an embedded picture, pixels."""
SHOWN = 6
"""Best prompts, and worst prompts."""
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
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}
.card img{width:100%;image-rendering:auto;border-radius:4px;display:block;margin-bottom:4px}
.card .two{display:grid;grid-template-columns:1fr 1fr;gap:4px}
.miss{color:var(--bad);font-weight:600}
ul{margin:6px 0;padding-left:20px}details{margin-top:6px}summary{cursor:pointer}
code{font-size:12px;overflow-wrap:anywhere}
"""


def html_report(
    sheet: ScoreSheet,
    *,
    title: str,
    facts: Mapping[str, str],
    primary: str = "",
    prompts: PromptSet | None = None,
    find: Find = lambda prompt_id, seed: None,
    baseline: ScoreSheet | None = None,
    contrast: ScoreSheet | None = None,
    seed: int = 0,
) -> str:
    """The report's text.

    Args:
        facts: what stands under the title: model, prompts, sampler, …
        primary: the column that orders the best and the worst prompts; left out, the first of the sheet.
        prompts, find: without them no pictures and no prompt texts are shown.
        baseline: adds paired differences, of aggregates and of tags. Raises BadInput where it cannot be paired.
        contrast: the sheet of `control_response`.
    """
    first = primary or next(iter(sheet.columns), "")
    parts = [f"<h1>{escape(title)}</h1>", _facts(facts), _remarks(sheet)]
    parts.append(_aggregates("Scores", aggregates(sheet, seed=seed)))
    if baseline is not None:
        parts.append(_differences(differences(sheet, baseline, seed=seed)))
    if contrast is not None:
        parts.append(_aggregates("Control response", aggregates_of_contrast(contrast, seed), _CONTRAST))
    if prompts is not None and first:
        parts.append(_prompts(sheet, prompts, find, first))
    if "tag_adherence" in sheet.fingerprints:
        parts += [_tags(per_tag(sheet, baseline, seed=seed)), _rating(sheet)]
    parts.append(_made_of(sheet))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head>{body}</html>"


def aggregates_of_contrast(contrast: ScoreSheet, seed: int) -> dict[str, Measurement]:
    """The responses alone: a mean over both poles says nothing."""
    return {name: m for name, m in aggregates(contrast, seed=seed).items() if name.startswith("response_")}


_CONTRAST = (
    "The same prompts and seeds with one word swapped (masterpiece for worst quality, newest for old, safe for nsfw). "
    "<code>response_</code> is the share of the change that is common to all prompts: 0 is chance. The rest is the "
    "first word's picture less the second's."
)


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<dl>{rows}</dl>"


def _remarks(sheet: ScoreSheet) -> str:
    said = remarks(sheet)
    if not said:
        return ""
    return "<h2>To know</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in said) + "</ul>"


def _aggregates(heading: str, found: Mapping[str, Measurement], about: str = "") -> str:
    rows = [
        f"<tr><td>{escape(name)} {_arrow(m.higher_is_better)}</td><td class=n>{_number(m.value)}</td>"
        f"<td class=n>{_interval(m.low, m.high)}</td><td>{_bar(m.value, m.low, m.high)}</td><td class=n>{m.n}</td></tr>"
        for name, m in found.items()
    ]
    note = about or "95 % intervals; the unit is the prompt. ↑ higher is better, ↓ lower is better."
    head = "<tr><th>score</th><th class=n>value</th><th class=n>95 % interval</th><th></th><th class=n>n</th></tr>"
    return (
        f"<h2>{heading}</h2><p class='soft small'>{note}</p><div class=wide><table>{head}{''.join(rows)}</table></div>"
    )


def _differences(found: Mapping[str, PairedDifference]) -> str:
    rows = [
        f"<tr><td>{escape(name)} {_arrow(d.higher_is_better)}</td>"
        f"<td class='n {d.verdict}'>{_number(d.value, True)}</td>"
        f"<td class=n>{_interval(d.low, d.high, True)}</td><td>{_bar(d.value, d.low, d.high, d.verdict)}</td>"
        f"<td class={d.verdict}>{d.verdict}</td><td class=n>{_number(d.p)}</td>"
        f"<td class=n>{_number(d.detectable)}</td></tr>"
        for name, d in found.items()
    ]
    head = "<tr><th>score</th><th class=n>difference</th><th class=n>95 % interval</th><th></th><th>verdict</th>"
    head += "<th class=n>p</th><th class=n>detectable</th></tr>"
    note = (
        "Paired on the same prompts and seeds. “Detectable” is the smallest true difference found in 4 of 5 such runs."
    )
    return _table("Against the baseline", note, head, rows)


def _prompts(sheet: ScoreSheet, prompts: PromptSet, find: Find, column: str) -> str:
    by_id = prompts.by_id()
    ids = list(dict.fromkeys(sheet.prompt_ids))
    means = prompt_means(sheet.columns[column], sheet.prompt_ids)
    scored = [k for k in np.argsort(means if sheet.higher_is_better[column] else -means) if not np.isnan(means[k])]
    count = min(SHOWN, len(scored) // 2) or len(scored)
    parts = []
    for heading, chosen in (("Worst prompts", scored[:count]), ("Best prompts", scored[: -count - 1 : -1])):
        cards = "".join(_card(sheet, by_id[ids[k]], find, column, means[k]) for k in chosen)
        parts.append(f"<h2>{heading} by {escape(column)}</h2><div class=cards>{cards}</div>")
    return "".join(parts)


def _card(sheet: ScoreSheet, prompt: Prompt, find: Find, column: str, mean: float) -> str:
    rows = [k for k, prompt_id in enumerate(sheet.prompt_ids) if prompt_id == prompt.id][:2]
    shown = [pixels for k in rows if (pixels := find(prompt.id, sheet.seeds[k])) is not None]
    images = "".join(f'<img alt="" src="{_data(pixels)}">' for pixels in shown)
    images = f"<div class=two>{images}</div>" if len(shown) > 1 else images
    others = [n for n in ("tag_recall", "clip_score", "tag_contradiction") if n in sheet.columns and n != column]
    scores = [f"<b>{escape(column)} {_number(mean)}</b>"]
    scores += [f"{escape(n)} {_number(float(sheet.columns[n][rows[0]]))}" for n in others]
    missed = _missed(sheet, prompt.id)
    told = f"<p class='miss small'>not seen: {escape(', '.join(missed))}</p>" if missed else ""
    text = escape(prompt.text if len(prompt.text) < 400 else prompt.text[:400] + " …")
    return (
        f"<div class=card>{images}<p class=small>{' · '.join(scores)}</p>{told}"
        f"<p class='soft small'>{escape(prompt.id)}: {text}</p></div>"
    )


def _missed(sheet: ScoreSheet, prompt_id: str) -> list[str]:
    if "tag_adherence" not in sheet.fingerprints:
        return []
    tables = Tables(sheet)
    row = tables.prompts.index(prompt_id)
    return [tables.tags[k] for k in np.flatnonzero(tables.asked[row] & (tables.hits[row] < tables.pictures[row]))]


def _tags(rows: Sequence[Mapping[str, Any]]) -> str:
    paired = bool(rows) and "difference" in rows[0]
    body = []
    for row in sorted(rows, key=lambda row: (row["recall"], row["tag"])):
        cells = [
            f"<td>{escape(row['tag'])}</td>",
            f"<td class=n>{row['pictures']}</td>",
            f"<td class=n>{_number(row['recall'])}</td>",
            f"<td class=n>{_interval(row['low'], row['high'])}</td>",
            f"<td>{_bar(row['recall'], row['low'], row['high'], tick=row['floor'])}</td>",
            *(f"<td class=n>{_number(row[key])}</td>" for key in ("floor", "auroc", "mean_prob", "corrected")),
        ]
        if paired:
            cells += [f"<td class=n>{_number(row['difference'], True)}</td>", f"<td class=n>{_number(row['q'])}</td>"]
        body.append(f"<tr>{''.join(cells)}</tr>")
    names = ["pictures", "recall", "95 % (Wilson)", "", "floor", "AUROC", "mean p", "corrected"]
    names += ["difference", "q"] if paired else []
    head = "<tr><th>tag</th>" + "".join(f"<th class=n>{name}</th>" for name in names) + "</tr>"
    note = (
        "Weakest first. Floor (the tick): recall if prompts were dealt to pictures at random. Corrected: less the "
        "tagger's own errors."
    )
    return _table("Tags", note, head, body)


def _rating(sheet: ScoreSheet) -> str:
    table = rating_confusion(sheet)
    if table is None:
        return ""
    head = "<tr><th>asked</th>" + "".join(f"<th class=n>seen as {name}</th>" for name in RATINGS) + "</tr>"
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td class=n>{count}</td>" for count in counts) + "</tr>"
        for name, counts in zip(RATINGS, table, strict=True)
    )
    return _table("Rating", "Pictures by asked and by most probable rating.", head, [body])


def _made_of(sheet: ScoreSheet) -> str:
    rows = "".join(
        f"<details><summary>{escape(name)}</summary><dl class=small>"
        + "".join(f"<dt>{escape(key)}</dt><dd><code>{escape(str(value))}</code></dd>" for key, value in made.items())
        + "</dl></details>"
        for name, made in sheet.fingerprints.items()
    )
    about = f"{sheet.n} pictures; sheet <code>{sheet.digest}</code>"
    note = f"<p class='soft small'>{about}. Other fingerprints are not comparable.</p>"
    return f"<h2>What made these numbers</h2>{note}{rows}"


def _table(heading: str, note: str, head: str, rows: Sequence[str]) -> str:
    table = f"<div class=wide><table>{head}{''.join(rows)}</table></div>"
    return f"<h2>{heading}</h2><p class='soft small'>{note}</p>{table}"


def _bar(value: float, low: float, high: float, verdict: str = "", tick: float = math.nan) -> str:
    """An interval as inline SVG: shares on 0 to 1, everything else on its own scale with zero in it."""
    if math.isnan(value) or math.isnan(low) or math.isnan(high):
        return ""
    start, end = (0.0, 1.0) if not verdict and low >= 0 and high <= 1 else (min(low, 0.0), max(high, 0.0))
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
        f'<svg width="160" height="18" role="img" aria-label="{_number(low)} to {_number(high)}">'
        f'<line x1="4" x2="156" y1="9" y2="9" stroke="var(--line)"/>{zero}{floor}'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9" stroke="{colour}" stroke-width="3" '
        f'stroke-linecap="round"/><circle cx="{x(value):.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def _data(pixels: Pixels) -> str:
    """The picture as a data URL: PNG as it is where it is small, else a JPEG of SIDE pixels."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, "JPEG", quality=90)
        kind = "jpeg"
    else:
        image.save(file, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _number(value: float, signed: bool = False) -> str:
    if math.isnan(value):
        return "–"
    digits = 3 if abs(value) < 2 else 2 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _interval(low: float, high: float, signed: bool = False) -> str:
    return "–" if math.isnan(low) else f"{_number(low, signed)} … {_number(high, signed)}"


def _arrow(higher_is_better: bool) -> str:
    return "<span class=soft>↑</span>" if higher_is_better else "<span class=soft>↓</span>"
