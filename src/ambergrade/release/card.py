"""Writes a release's model card from its facts: markdown with front matter as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from ambergrade.release.facts import Captions, Evaluation, Parent, Recipe, ReleaseFacts, Score

UNKNOWN_ORIGIN = (
    "Nobody recorded how these weights were made. Their digests say which file this is, and the scores what it draws."
)

_ADDRESS = re.compile(r"https?://[^\s<>()|\\]+")


def card(facts: ReleaseFacts) -> str:
    """Write the model card."""
    training = facts.training
    sections = [
        front_matter(facts),
        f"# {facts.name} {facts.version}",
        facts.summary.strip(),
        "## Formula\n\n" + _formula(facts.recipe) if facts.recipe else f"## Origin\n\n{UNKNOWN_ORIGIN}",
        "![Contact sheet](contact_sheet.png)" if "contact_sheet.png" in facts.files else "",
        "## Scores\n\n" + _scores(facts.evaluation),
        _mosaic(facts.evaluation),
        "![Sweep over the coefficients](heat_map.png)" if "heat_map.png" in facts.files else "",
        "## Winner set\n\n" + _winner_set(facts.evaluation) if facts.evaluation.winner_set else "",
        f"## Training of {cell(training.name)}\n\n" + _shown(training.shown) if training else "",
        "## Prompts\n\n" + _vocabulary(training.captions) if training else "",
        "## Samples\n\n" + _samples(facts) if facts.samples else "",
        "## Use\n\n" + _use(facts),
        "## Limits\n\n" + _limits(facts.evaluation),
        "## Licence\n\n" + _license(facts),
        "## Check\n\n" + _check(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(facts: ReleaseFacts) -> str:
    """Write the YAML block that the hub reads: licence, base models by hub id, results."""
    found = facts.licenses[facts.license]
    about: dict[str, Any] = {"license": found.hub}
    if found.hub == "other":
        about |= {"license_name": facts.license, "license_link": found.url}
    about |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if hubs := sorted({parent.origin.hub for parent in facts.parents.values() if parent.origin.hub}):
        about |= {"base_model": hubs, "base_model_relation": "merge"}
    about["tags"] = ["ambergrade", *(["merge"] if facts.recipe else []), facts.architecture, facts.family]
    if facts.samples:
        about["widget"] = [{"text": one.text, "output": {"url": one.file}} for one in facts.samples]
    about["model-index"] = [{"name": f"{facts.name} {facts.version}", "results": [_results(facts.evaluation)]}]
    return "---\n" + yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=120) + "---"


def _results(evaluation: Evaluation) -> dict[str, Any]:
    """The released model's scores in the form of the hub's `model-index`."""
    prompts, scores = evaluation.prompts, evaluation.scores
    found = {metric: scores[metric][evaluation.released] for metric in evaluation.columns if metric in scores}
    return {
        "task": {"type": "text-to-image", "name": "Text to image"},
        "dataset": {"type": "prompts", "name": f"{prompts.name} ({_counted(prompts.count, 'prompt')})"},
        "metrics": [
            {"type": metric, "name": metric, "value": score.value}
            for metric, score in found.items()
            if score.value is not None
        ],
    }


def substituted(formula: str, coefficients: Mapping[str, float], models: Iterable[str] = ()) -> str:
    """Return the formula with its coefficients' numbers in place of their names; names of models stay.

    >>> substituted("beta7 + a * (anxl3 - base a)", {"a": 0.8}, ["beta7", "anxl3", "base a"])
    'beta7 + 0.8 * (anxl3 - base a)'
    """
    names = sorted([*models, *coefficients], key=lambda name: (-len(name), name))
    pattern = "|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.])" for name in names)
    numbers = {name: repr(value) for name, value in coefficients.items()}
    return re.sub(pattern, lambda found: numbers.get(found[0], found[0]), formula) if names else formula


def with_numbers(recipe: Recipe) -> str:
    """Return a recipe's formula with its numbers, line by line as it was written."""
    lines = []
    for line in recipe.formula.strip().splitlines():  # the "a" of a name on the left stays
        name = re.match(r"[^(=#]*=", line)
        left = name[0] if name else ""
        lines.append(left + substituted(line.removeprefix(left), recipe.coefficients, recipe.models))
    return "\n".join(lines)


def measured(found: Score | None, sign: str = "") -> str:
    """Write `value [low, high]`, the value alone where there are too few pictures for an interval, a dash for nothing.

    `sign="+"` is for differences.

    >>> measured(Score(0.5, 0.41, 0.6, 40))
    '0.500 [0.410, 0.600]'
    """
    if found is None or found.value is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.value:{sign}.3f}"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Return a text that stays in its cell: one line, neither a column nor HTML begins in it.

    >>> cell("a|b <i>")
    'a\\\\|b &lt;i&gt;'
    """
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def link(words: str, address: str) -> str:
    """Return a markdown link; the words alone where the address is none of the web, or would end the link early.

    >>> link("a", "https://x.org/b"), link("a", "javascript:b"), link("a", "https://x.org/) <b>")
    ('[a](https://x.org/b)', 'a', 'a')
    """
    return f"[{cell(words)}]({address})" if _ADDRESS.fullmatch(address) else cell(words)


def _formula(recipe: Recipe) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe.formula)), default=0))
    rows = [[cell(alias), _source(parent), *_digests(parent)] for alias, parent in sorted(recipe.models.items())]
    head = ["input", "from", "licence", "sha256 of the weights", "sha256 of the file"]
    return (
        f"{fence}\n{with_numbers(recipe)}\n{fence}\n\nThe exact value of the formula, rounded once to "
        f"{recipe.dtype or 'the precision of its first model'}.\n\n{table(head, rows)}"
    )


def _source(parent: Parent) -> str:
    origin = parent.origin
    where = link(origin.hub, f"https://huggingface.co/{origin.hub}") if origin.hub else ""
    if not where and origin.url and _ADDRESS.fullmatch(origin.url):
        where = f"<{origin.url}>"
    told = [where, cell(f"by {origin.author}") if origin.author else "", cell(origin.note or "")]
    return ", ".join(filter(None, told)) or "–"


def _digests(parent: Parent) -> list[str]:
    return [cell(parent.origin.license), *(f"`{text}`" if text else "–" for text in (parent.weights, parent.file))]


def _scores(evaluation: Evaluation) -> str:
    prompts, scores, differences = evaluation.prompts, evaluation.scores, evaluation.differences
    models = list(evaluation.sheets)
    others = [model for model in models if any(model in row for row in differences.values())]
    rows = []
    for metric in evaluation.columns:
        if metric not in scores:
            continue
        better = scores[metric][evaluation.released].higher_is_better
        cells = [measured(scores[metric].get(model)) for model in models]
        cells += [measured(differences.get(metric, {}).get(model), "+") for model in others]
        rows.append([f"{cell(metric)} {'↑' if better else '↓'}", *cells])
    head = ["metric", *map(cell, models), *(f"this minus {cell(model)}" for model in others)]
    return (
        f"On {_counted(prompts.count, 'prompt')} of `{prompts.name}`, one seed per picture, the same for every "
        "model. Brackets are 95 % intervals; differences are paired; ↑ higher is better, ↓ lower. All numbers follow "
        f"from the score sheets in `scores/`.\n\n{table(head, rows)}"
    )


def _mosaic(evaluation: Evaluation) -> str:
    row = evaluation.scores.get("mosaic", {})
    found = row.get(evaluation.released)
    if found is None or found.value is None:
        return ""
    others = [f"{measured(score)} in those of {cell(model)}" for model, score in row.items() if score is not found]
    told = f"The 8 × 8 mosaic in its pictures measures {measured(found)} grey levels"
    return told + (f", {', '.join(others)}" if others else "") + "; about 0.1 is none."


def _winner_set(evaluation: Evaluation) -> str:
    points = [", ".join(f"{key} = {value:g}" for key, value in point.items()) for point in evaluation.winner_set]
    if len(points) == 1:
        told = "One point of the sweep: every other is worse"
    else:
        told = f"{len(points):,} points of the sweep, of which none is significantly different from the best"
    return f"{told} by `{evaluation.objective}` (95 %, all comparisons at once).\n\n" + "\n".join(
        f"- {point}" for point in points
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _shown(facts: Mapping[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            text = ", ".join(_word(i) if inner == "name" else f"{inner} {_word(i)}" for inner, i in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str):
            text = ", ".join(_word(item) for item in value)
        else:
            text = _word(value)
        rows.append([cell(key.replace("_", " ")), cell(text)])
    return table(["", ""], rows)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _vocabulary(captions: Captions) -> str:
    """The words that prompts are made of, in the order of the captions that were trained on."""
    rows = [["order", cell(", ".join(captions.order))]]
    rows += [[f"rating: {cell(rating)}", cell(", ".join(words))] for rating, words in captions.rating.items()]
    rows += [["quality, better to worse", cell(", ".join(captions.quality))]] if captions.quality else []
    rows += [["year, new to old", cell(", ".join(captions.year))]] if captions.year else []
    rows += [["captions", f"`{captions.recipe}`, {captions.pictures:,} pictures, manifest `{captions.manifest}`"]]
    return "Tags with commas between them, as the captions had them:\n\n" + table(["part", "words"], rows)


def _samples(facts: ReleaseFacts) -> str:
    rows = []
    for sample in facts.samples:
        told = cell(sample.text) + (f"<br>negative: {cell(sample.negative)}" if sample.negative else "")
        rows.append([f"![{sample.seed}]({sample.file})", told, str(sample.seed)])
    return table(["picture", "prompt", "seed"], rows)


def _use(facts: ReleaseFacts) -> str:
    sampler = facts.evaluation.sampler
    where = ', config="config", local_files_only=True' if "config/model_index.json" in facts.files else ""
    prompt = facts.samples[0].text if facts.samples else "1girl"
    lines = [
        f"from diffusers import {facts.pipeline}",
        "",
        f'pipeline = {facts.pipeline}.from_single_file("{facts.file}"{where})',
        "picture = pipeline(",
        f"    {prompt!r},",
        f"    num_inference_steps={sampler.steps}, guidance_scale={sampler.guidance:g},",
        f"    width={sampler.width}, height={sampler.height},",
        ").images[0]",
    ]
    text = "In this folder, with diffusers and transformers installed:\n\n```python\n" + "\n".join(lines) + "\n```"
    if any(name.startswith("diffusers/") for name in facts.files):
        text += f'\n\nOr as a folder: `{facts.pipeline}.from_pretrained("diffusers")`.'
    return text + (
        f"\n\nScored with the sampler `{sampler.name}`, {sampler.steps} steps, guidance "
        f"{sampler.guidance:g}, {sampler.width}×{sampler.height} px, clip skip {sampler.clip_skip}."
    )


def _limits(evaluation: Evaluation) -> str:
    rows = [
        [f"`{name}`", f"`{scorer.fingerprint}`", "tiny" if scorer.tiny else "full size"]
        for name, scorer in sorted(evaluation.scorers.items())
    ]
    text = "Scores hold for these scorers only:\n\n" + table(["scorer", "fingerprint", "size"], rows)
    if any(scorer.tiny for scorer in evaluation.scorers.values()):
        text += (
            "\n\n**Tiny scorers of the embedded world judged this model. Their numbers compare models of that world "
            "with each other; they say nothing about real models, and cannot be set beside numbers from real scorers.**"
        )
    return text


def _license(facts: ReleaseFacts) -> str:
    found = facts.licenses[facts.license]
    told = [f"{link(found.title, found.url)}: {cell(facts.license_why)}."]
    if found.commercial is not None:
        told.append("Commercial use is allowed within its terms." if found.commercial else "**No commercial use.**")
    if found.share_alike:
        told.append("What is made of this model bears the same licence.")
    notices = []
    for name, one in facts.licenses.items():
        bearers = [alias for alias, parent in facts.parents.items() if parent.origin.license == name]
        whose = f" (of {', '.join(map(cell, bearers))})" if bearers else ""
        notices += [f"- {cell(one.title)}{whose}: {cell(notice)}" for notice in one.notices]
    return "\n\n".join(filter(None, [" ".join(told), "\n".join(notices)]))


def _check(facts: ReleaseFacts) -> str:
    weights = facts.weights
    rows = [["sha256", f"`{weights.file}`"], ["sha256 of the weights", f"`{weights.weights}`"]]
    rows += [[name, f"`{text}`"] for name, text in weights.listed.items()]
    inputs = "parents" if any(name.startswith("parents/") for name in facts.files) else "FOLDER"
    again = f"`ambergrade merge recipe.yaml --models {inputs} --out again.safetensors` merges it again, byte for byte. "
    how = {"FOLDER": "With the inputs in a folder, under any names, ", "parents": "With the inputs in `parents`, "}
    return (
        f"{table(['digest of ' + cell(facts.file), ''], rows)}\n\n"
        "`sha256sum -c SHA256SUMS` in this folder checks every file. `ambergrade verify .` checks more: that nothing "
        "was added, that every paper follows from `release.json`, and every number from the score sheets. "
        + (how[inputs] + again if facts.recipe else "")
        + f"Pictures and training depend on the processor's kernels (here {facts.environment.isa}); merges do not."
    )
