"""A score sheet as one HTML file that needs nothing beside it: numbers with intervals, pictures, tags, fingerprints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.nouns import RATINGS, Measurement, Prompt, PromptSet
from ambergrade.score.adherence import Tables, per_tag, rating_confusion
from ambergrade.score.choice import Choice
from ambergrade.score.comparison import Noise, aggregates, differences, remarks
from ambergrade.score.figures import NO_INTERVAL
from ambergrade.score.html import arrow, bar, data, definitions, interval, number, page, short, table
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import PairedDifference, prompt_means

Pixels = npt.NDArray[np.uint8]
Find = Callable[[str, int], Pixels | None]
"""(prompt id, seed) to the picture, or None where it was not kept."""

SHOWN = 6
"""Best prompts, and worst prompts."""


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
    noise: Mapping[str, Noise] | None = None,
    seed: int = 0,
) -> str:
    """The report's text.

    Args:
        facts: what stands under the title: model, prompts, sampler, …
        primary: the column that orders the best and the worst prompts; left out, the first of the sheet.
        prompts, find: without them no pictures and no prompt texts are shown.
        baseline: adds paired differences, of aggregates and of tags. Raises BadInput where it cannot be paired.
        contrast: the sheet of `control_response`.
        noise: what another batch does to every column (`comparison.kernel_noise`).
    """
    first = primary or next(iter(sheet.columns), "")
    found = aggregates(sheet, seed=seed)
    apart = None if baseline is None else differences(sheet, baseline, seed=seed)
    parts = [f"<h1>{escape(title)}</h1>", _headline(found, apart, first), definitions(facts)]
    if prompts is not None:
        parts.append(_strip(sheet, prompts, find))
    parts.append(_remarks(sheet))
    parts.append(_aggregates("Scores", found))
    if apart is not None:
        parts.append(_differences(apart))
    if prompts is not None and first:
        parts.append(_prompts(sheet, prompts, find, first))
    if "tag_adherence" in sheet.fingerprints:
        parts += [_tags(per_tag(sheet, baseline, seed=seed)), _rating(sheet)]
    if contrast is not None:
        parts.append(_aggregates("Control response", aggregates_of_contrast(contrast, seed), _CONTRAST))
    if noise:
        parts.append(_noise(noise))
    parts.append(_made_of(sheet))
    return page(title, parts)


def headline(found: Mapping[str, Measurement], primary: str = "") -> list[str]:
    """The names of up to three numbers to read first: the primary one, the text's fit, the distance from real pictures.

    >>> one = Measurement(0.5, 0.4, 0.6, 40)
    >>> headline(dict.fromkeys(("clip_cosine", "clip_score", "tag_prob", "fid_corrected", "fid", "kid"), one))
    ['tag_prob', 'clip_score', 'fid_corrected']
    """
    questions = (
        (primary, "tag_prob", "tag_macro_recall"),
        ("clip_score", "tag_auroc", "preference"),
        ("fid_corrected", "mind_corrected", "kid", "cmmd_unbiased"),
    )
    given = (next((name for name in names if name in found), "") for names in questions)
    return list(dict.fromkeys(name for name in given if name))


def aggregates_of_contrast(contrast: ScoreSheet, seed: int) -> dict[str, Measurement]:
    """The responses alone: a mean over both poles says nothing."""
    return {name: m for name, m in aggregates(contrast, seed=seed).items() if name.startswith("response_")}


_CONTRAST = (
    "The same prompts and seeds with one word swapped (masterpiece for worst quality, newest for old, safe for nsfw). "
    "<code>response_</code> is the share of the change that is common to all prompts: 0 is chance. The rest is the "
    "first word's picture less the second's."
)


def _headline(found: Mapping[str, Measurement], apart: Mapping[str, PairedDifference] | None, primary: str) -> str:
    cards = []
    for name in headline(found, primary):
        m, d = found[name], None if apart is None else apart.get(name)
        moved = "" if d is None else f"<p class='small {d.verdict}'>{number(d.value, True)} {d.verdict}</p>"
        cards.append(
            f"<div class=card><p class='soft small'>{escape(name)} {arrow(m.higher_is_better)}</p>"
            f"<p class=big>{number(m.value)}</p><p class='soft small'>{interval(m.low, m.high)}</p>{moved}</div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""


def _remarks(sheet: ScoreSheet) -> str:
    said = remarks(sheet)
    if not said:
        return ""
    return "<h2>To know</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in said) + "</ul>"


def _aggregates(heading: str, found: Mapping[str, Measurement], about: str = "") -> str:
    rows = [
        f"<tr><td>{escape(name)} {arrow(m.higher_is_better)}</td><td class=n>{number(m.value)}</td>"
        f"<td class=n>{interval(m.low, m.high)}</td><td>{bar(m.value, m.low, m.high)}</td><td class=n>{m.n}</td></tr>"
        for name, m in found.items()
    ]
    note = about or "95 % intervals; the unit is the prompt. ↑ higher is better, ↓ lower is better."
    if any(math.isnan(m.low) for m in found.values()):
        note += f" {NO_INTERVAL}."
    head = "<tr><th>score</th><th class=n>value</th><th class=n>95 % interval</th><th></th><th class=n>n</th></tr>"
    return table(heading, note, head, rows)


def _noise(found: Mapping[str, Noise]) -> str:
    moved = {name: n for name, n in found.items() if n.largest > 0}
    rows = [
        f"<tr><td>{escape(name)}</td><td class=n>{short(n.typical)}</td><td class=n>{short(n.largest)}</td>"
        f"<td class=n>{short(n.mean.value)}</td><td class=n>{short(n.mean.low)} … {short(n.mean.high)}</td></tr>"
        for name, n in moved.items()
    ]
    still = ", ".join(name for name in found if name not in moved)
    note = (
        "The same model, prompts and seeds, drawn in another batch: what the kernels' rounding does to every number. "
        "A difference below this is none." + (f" Not moved at all: {escape(still)}." if still else "")
    )
    head = "<tr><th>score</th><th class=n>typical change of a picture</th><th class=n>largest</th>"
    head += "<th class=n>of the mean</th><th class=n>95 % interval</th></tr>"
    return table("Kernel noise (A/A)", note, head, rows)


def _strip(sheet: ScoreSheet, prompts: PromptSet, find: Find) -> str:
    """The first picture of the first prompts, neither chosen nor sorted."""
    text, shown = {prompt.id: prompt.text for prompt in prompts.prompts}, []
    for prompt_id in dict.fromkeys(sheet.prompt_ids):
        pixels = find(prompt_id, sheet.seeds[sheet.prompt_ids.index(prompt_id)])
        if pixels is not None:
            label = escape(text[prompt_id][:300], quote=True)
            shown.append(f'<img title="{label}" alt="{label}" src="{data(pixels)}">')
        if len(shown) == 2 * SHOWN:
            break
    return f"<div class=strip>{''.join(shown)}</div>" if shown else ""


def html_choice(
    choice: Choice,
    apart: Mapping[str, PairedDifference],
    *,
    facts: Mapping[str, str],
    primary: str,
    margins: Mapping[str, float],
) -> str:
    """Many points against one baseline: `apart` are their simultaneous differences in the primary metric."""
    known = [d for d in apart.values() if not math.isnan(d.low)]
    ends = min(0.0, *(d.low for d in known), 0.0), max(0.0, *(d.high for d in known), 0.0)
    rows = [
        f"<tr><td>{escape(name)}{' ★' if name in choice.winners else ''}</td>"
        f"<td class='n {d.verdict}'>{number(d.value, True)}</td><td class=n>{interval(d.low, d.high, True)}</td>"
        f"<td>{bar(d.value, d.low, d.high, d.verdict, ends=ends)}</td><td class=n>{number(d.p)}</td>"
        f"<td>{'yes' if name in choice.front else ''}</td>"
        f"<td>{escape('misses ' + ', '.join(choice.failed[name])) if name in choice.failed else 'kept'}</td></tr>"
        for name, d in apart.items()
    ]
    head = f"<tr><th>point</th><th class=n>{escape(primary)}</th><th class=n>95 %, all at once</th><th></th>"
    head += "<th class=n>adjusted p</th><th>Pareto front</th><th>margins</th></tr>"
    kept = ", ".join(f"{name} by at most {margin:g}" for name, margin in margins.items()) or "none declared"
    note = (
        f"★ not significantly different from the best by {escape(primary)} among the points that keep every margin. "
        f"Margins (losses that are still none): {escape(kept)}. Intervals and p hold for all points at once."
    )
    title = "Points against the baseline"
    return page(title, [f"<h1>{title}</h1>", definitions(facts), table("Choice", note, head, rows)])


def _differences(found: Mapping[str, PairedDifference]) -> str:
    rows = [
        f"<tr><td>{escape(name)} {arrow(d.higher_is_better)}</td>"
        f"<td class='n {d.verdict}'>{number(d.value, True)}</td>"
        f"<td class=n>{interval(d.low, d.high, True)}</td><td>{bar(d.value, d.low, d.high, d.verdict)}</td>"
        f"<td class={d.verdict}>{d.verdict}</td><td class=n>{number(d.p)}</td>"
        f"<td class=n>{number(d.detectable)}</td></tr>"
        for name, d in found.items()
    ]
    head = "<tr><th>score</th><th class=n>difference</th><th class=n>95 % interval</th><th></th><th>verdict</th>"
    head += "<th class=n>p</th><th class=n>detectable</th></tr>"
    note = (
        "Paired on the same prompts and seeds. “Detectable” is the smallest true difference found in 4 of 5 such runs."
        + (f" {NO_INTERVAL}." if any(math.isnan(d.low) for d in found.values()) else "")
    )
    return table("Against the baseline", note, head, rows)


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
    images = "".join(f'<img alt="" src="{data(pixels)}">' for pixels in shown)
    images = f"<div class=two>{images}</div>" if len(shown) > 1 else images
    others = [n for n in ("tag_recall", "clip_score", "tag_contradiction") if n in sheet.columns and n != column]
    scores = [f"<b>{escape(column)} {number(mean)}</b>"]
    scores += [f"{escape(n)} {number(float(sheet.columns[n][rows[0]]))}" for n in others]
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
    tables = Tables(sheet.rows(sheet.sound))
    row = tables.prompts.index(prompt_id)
    return [tables.tags[k] for k in np.flatnonzero(tables.asked[row] & (tables.hits[row] < tables.pictures[row]))]


def _tags(rows: Sequence[Mapping[str, Any]]) -> str:
    paired = bool(rows) and "difference" in rows[0]
    body = []
    for row in sorted(rows, key=lambda row: (row["recall"], row["tag"])):
        cells = [
            f"<td>{escape(row['tag'])}</td>",
            f"<td class=n>{row['pictures']}</td>",
            f"<td class=n>{number(row['recall'])}</td>",
            f"<td class=n>{interval(row['low'], row['high'])}</td>",
            f"<td>{bar(row['recall'], row['low'], row['high'], tick=row['floor'])}</td>",
            *(f"<td class=n>{number(row[key])}</td>" for key in ("floor", "auroc", "mean_prob", "corrected")),
        ]
        if paired:
            cells += [f"<td class=n>{number(row['difference'], True)}</td>", f"<td class=n>{number(row['q'])}</td>"]
        body.append(f"<tr>{''.join(cells)}</tr>")
    names = ["pictures", "recall", "95 % (Wilson)", "", "floor", "AUROC", "mean p", "corrected"]
    names += ["difference", "q"] if paired else []
    head = "<tr><th>tag</th>" + "".join(f"<th class=n>{name}</th>" for name in names) + "</tr>"
    note = (
        "Weakest first. Floor (the tick): recall if prompts were dealt to pictures at random. Corrected: less the "
        "tagger's own errors."
    )
    return table("Tags", note, head, body)


def _rating(sheet: ScoreSheet) -> str:
    confusion = rating_confusion(sheet)
    if confusion is None:
        return ""
    head = "<tr><th>asked</th>" + "".join(f"<th class=n>seen as {name}</th>" for name in RATINGS) + "</tr>"
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td class=n>{count}</td>" for count in counts) + "</tr>"
        for name, counts in zip(RATINGS, confusion, strict=True)
    )
    return table("Rating", "Pictures by asked and by most probable rating.", head, [body])


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
