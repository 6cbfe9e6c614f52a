"""Writes a release's model card from the facts of its recipe, training and evaluation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ambergrade.nouns import Measurement, SamplerSettings
from ambergrade.release.contents import Evaluation, ReleaseContents


def card(contents: ReleaseContents) -> str:
    """Write the model card: markdown with YAML front matter as the Hugging Face hub reads it."""
    evaluation, recipe = contents.evaluation, contents.recipe
    sections = [
        front_matter(contents),
        f"# {contents.name} {contents.version}",
        contents.summary,
        _formula(recipe),
        "![Contact sheet](contact_sheet.png)",
        "## Scores\n\n" + _scores(evaluation),
        "![Sweep over the coefficients](heat_map.png)" if contents.heat_map else "",
        "## Winner set\n\n" + _winner_set(evaluation),
        "## Training\n\n" + _facts(contents.training) if contents.training else "",
        "## Captions\n\n" + _facts(contents.captions) if contents.captions else "",
        "## Use\n\n" + _use(contents.file, contents.config, evaluation.sampler),
        "## Limits\n\n" + _limits(evaluation),
        "## Check\n\n`sha256sum -c SHA256SUMS` in this folder checks every file. With the inputs in a folder, under "
        "any names, `ambergrade merge recipe.yaml --models FOLDER --out again.safetensors` merges them again, byte for "
        f"byte, and `ambergrade verify {contents.file} --models FOLDER` compares every byte.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(contents: ReleaseContents) -> str:
    """Write the YAML block that the hub reads."""
    facts = {
        "license": contents.license,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": sorted(contents.recipe["models"]),
        "base_model_relation": "merge",
        "tags": ["ambergrade", "merge", "stable-diffusion-xl", contents.family],
        "model_name": contents.name,
    }
    return "---\n" + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True) + "---"


def substituted(formula: str, coefficients: Mapping[str, float], models: Iterable[str] = ()) -> str:
    """Return the formula with its coefficients' numbers in place of their names; names of models stay.

    >>> substituted("beta7 + a * (anxl3 - base a)", {"a": 0.8}, ["beta7", "anxl3", "base a"])
    'beta7 + 0.8 * (anxl3 - base a)'
    """
    names = sorted([*models, *coefficients], key=lambda name: (-len(name), name))
    pattern = "|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.])" for name in names)
    numbers = {name: repr(value) for name, value in coefficients.items()}
    return re.sub(pattern, lambda found: numbers.get(found[0], found[0]), formula)


def measurement(found: Measurement | None, sign: str = "") -> str:
    """Write `value [low, high]`, or a dash where nothing was measured; `sign="+"` for differences.

    >>> measurement(Measurement(0.5, 0.41, 0.6, 40))
    '0.500 [0.410, 0.600]'
    """
    if found is None or any(math.isnan(number) for number in (found.value, found.low, found.high)):
        return "–"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _formula(recipe: Mapping[str, Any]) -> str:
    lines = []
    for line in recipe["formula"].strip().splitlines():  # the "a" of a name on the left stays
        name = re.match(r"[^(=#]*=", line)
        left = name[0] if name else ""
        lines.append(left + substituted(line.removeprefix(left), recipe["coefficients"], recipe["models"]))
    rows = [
        [f"`{name}`", *(f"`{row[kind]}`" if kind in row else "–" for kind in ("weights", "file"))]
        for name, row in sorted(recipe["models"].items())
    ]
    shown, head = "\n".join(lines), ["input", "sha256 of the weights", "sha256 of the file"]
    return (
        f"```\n{shown}\n```\n\nThe exact value of the formula, rounded once to "
        f"{recipe['dtype'] or 'the precision of its first model'}.\n\n{table(head, rows)}"
    )


def _scores(evaluation: Evaluation) -> str:
    prompts, scores, differences = evaluation.prompts, evaluation.scores, evaluation.differences
    models = list(dict.fromkeys(model for row in scores.values() for model in row))
    others = list(dict.fromkeys(model for row in differences.values() for model in row))
    rows = []
    for metric in sorted(scores):
        better = next(iter(scores[metric].values())).higher_is_better
        cells = [measurement(scores[metric].get(model)) for model in models]
        cells += [measurement(differences.get(metric, {}).get(model), "+") for model in others]
        rows.append([f"{metric} {'↑' if better else '↓'}", *cells])
    head = ["metric", *models, *(f"winner minus {model}" for model in others)]
    return (
        f"On {_counted(prompts.count, 'prompt')} of `{prompts.name}`, one seed per picture, the same for every "
        "model. Brackets are 95 % intervals; differences are paired; ↑ higher is better, ↓ lower.\n\n"
        + table(head, rows)
    )


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


def _facts(facts: Mapping[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            text = ", ".join(_plain(i) if inner == "name" else f"{inner} {_plain(i)}" for inner, i in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str):
            text = "<br>".join(_plain(item) for item in value)
        else:
            text = _plain(value)
        rows.append([key.replace("_", " "), text.replace("|", "\\|")])
    return table(["", ""], rows)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _use(file: str, config: str, sampler: SamplerSettings) -> str:
    if config.startswith("builtin://"):
        where = f'find_file("{config}")'
        lines = ["from ambergrade.store import find_file"]
        arguments = f"config=str({where}), local_files_only=True"
    else:
        lines, arguments = [], f'config="{config}"'
    lines = ["from diffusers import StableDiffusionXLPipeline", *lines, ""]
    lines += ["pipeline = StableDiffusionXLPipeline.from_single_file(", f'    "{file}",', f"    {arguments},", ")"]
    lines += [
        'picture = pipeline(\n    "1girl, …",',
        f"    num_inference_steps={sampler.steps}, guidance_scale={sampler.guidance:g},",
        f"    width={sampler.width}, height={sampler.height},",
        ").images[0]",
    ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    return text + (
        f"\n\nScored with the sampler `{sampler.name}`, {sampler.steps} steps, guidance "
        f"{sampler.guidance:g}, {sampler.width}×{sampler.height} px."
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
