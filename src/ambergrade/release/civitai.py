"""Writes a release's description as HTML, for sites that take some: a few plain tags, everything escaped."""

from __future__ import annotations

import re
from html import escape

from ambergrade.release.card import UNKNOWN_ORIGIN, measured, with_numbers
from ambergrade.release.facts import ReleaseFacts

_LINK = re.compile(r"\[([^\]\n]+)\]\(([^)\s]+)\)")
_SAFE = ("https://", "http://")


def description(facts: ReleaseFacts) -> str:
    """Return the HTML. A link to anything but a web address is left out, and its words stay."""
    evaluation, sampler, license = facts.evaluation, facts.evaluation.sampler, facts.licenses[facts.license]
    parts = [f"<h2>{escape(facts.name)} {escape(facts.version)}</h2>"]
    parts += [f"<p>{linked(text)}</p>" for text in re.split(r"\n\s*\n", facts.summary.strip()) if text.strip()]
    if facts.recipe:
        parts += ["<h3>Formula</h3>", f"<pre><code>{escape(with_numbers(facts.recipe))}</code></pre>"]
        parts.append(_list([_parent(alias, facts) for alias in sorted(facts.parents)]))
    else:
        parts += ["<h3>Origin</h3>", f"<p>{UNKNOWN_ORIGIN}</p>"]
    parts += ["<h3>Scores</h3>", f"<p>On {evaluation.prompts.count:,} prompts, with 95 % intervals:</p>"]
    shown = {
        name: evaluation.scores[name][evaluation.released] for name in evaluation.columns if name in evaluation.scores
    }
    parts.append(_list([f"{escape(name)}: {measured(score)}" for name, score in shown.items()]))
    if any(scorer.tiny for scorer in evaluation.scorers.values()):
        parts.append("<p>Tiny scorers of an embedded world judged it: the numbers say nothing about real models.</p>")
    if facts.training:
        captions = facts.training.captions
        words = [f"{rating}: {', '.join(tags)}" for rating, tags in captions.rating.items()]
        words += [f"quality, better to worse: {', '.join(captions.quality)}"] if captions.quality else []
        words += [f"year, new to old: {', '.join(captions.year)}"] if captions.year else []
        parts += ["<h3>Prompts</h3>", f"<p>Tags in this order: {escape(', '.join(captions.order))}.</p>"]
        parts.append(_list([escape(one) for one in words]))
    size = f"{sampler.width}×{sampler.height} px"
    parts += [
        "<h3>Use</h3>",
        f"<p>Sampler {escape(sampler.name)}, {sampler.steps} steps, guidance {sampler.guidance:g}, ",
    ]
    parts[-1] += f"{size}, clip skip {sampler.clip_skip}.</p>"
    parts += ["<h3>Licence</h3>", f"<p>{_anchor(license.title, license.url)}: {escape(facts.license_why)}.</p>"]
    notices = [notice for one in facts.licenses.values() for notice in one.notices]
    parts.append(_list([escape(notice) for notice in dict.fromkeys(notices)]))
    digests = {"sha256": facts.weights.file, **facts.weights.listed}
    parts += [
        "<h3>Digests</h3>",
        _list([f"{escape(name)}: <code>{escape(text)}</code>" for name, text in digests.items()]),
    ]
    return "\n".join(filter(None, parts)) + "\n"


def linked(text: str) -> str:
    """Escape a text, and make anchors of its markdown links to web addresses; of other links only the words stay.

    >>> linked("see [this](https://x.org/a?b=1&c) & [that](javascript:alert(1)) <b>")
    'see <a href="https://x.org/a?b=1&amp;c">this</a> &amp; that) &lt;b&gt;'
    """
    found, place = [], 0
    for link in _LINK.finditer(text):
        found += [escape(text[place : link.start()]), _anchor(link[1], link[2])]
        place = link.end()
    return "".join([*found, escape(text[place:])])


def _anchor(words: str, url: str | None) -> str:
    if not (url and url.lower().startswith(_SAFE)):
        return escape(words)
    return f'<a href="{escape(url)}">{escape(words)}</a>'


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def _parent(alias: str, facts: ReleaseFacts) -> str:
    origin = facts.parents[alias].origin
    url = f"https://huggingface.co/{origin.hub}" if origin.hub else origin.url
    return (
        _anchor(alias, url) + (f" by {escape(origin.author)}" if origin.author else "") + f" ({escape(origin.license)})"
    )
