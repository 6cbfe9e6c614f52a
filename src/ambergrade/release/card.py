"""Writes a release's model card from the facts of its recipe, training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ambergrade.errors import BadInput

REQUIRED = {
    "recipe": ("formula", "coefficients", "models", "family", "dtype"),
    "evaluation": ("prompts", "sampler", "scores", "objective", "winner_set", "scorers"),
}


def card(
    *,
    name: str,
    version: str,
    license: str,
    config: str,
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    captions: Mapping[str, Any] | None = None,
    summary: str = "",
) -> str:
    """Markdown with YAML front matter as the Hugging Face hub reads it.

    `config` is what diffusers' `from_single_file(config=…)` needs: a hub id or `builtin://<family>`.
    The other arguments are described at `release.build.build`. Raises BadInput that lists every missing key.
    """
    check(recipe, evaluation)
    sections = [
        front_matter(name, license, recipe),
        f"# {name} {version}",
        summary,
        _formula(recipe),
        "![Contact sheet](contact_sheet.png)",
        "## Scores\n\n" + _scores(evaluation),
        "![Sweep over the coefficients](heat_map.png)" if len(recipe["coefficients"]) == 2 else "",
        "## Winner set\n\n" + _winner_set(evaluation),
        "## Training\n\n" + _facts(training) if training else "",
        "## Captions\n\n" + _facts(captions) if captions else "",
        "## Use\n\n" + _use(f"{name}-{version}.safetensors", config, evaluation["sampler"]),
        "## Limits\n\n" + _limits(evaluation),
        "## Check\n\n`sha256sum -c SHA256SUMS` in this folder checks every file. `recipe.yaml` names every input by "
        f"its digest, and with the inputs in a folder `ambergrade verify {name}-{version}.safetensors --models FOLDER` "
        "merges them again and compares every byte.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def check(recipe: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    """Raise BadInput naming every key that the card needs and the facts lack."""
    given = {"recipe": recipe, "evaluation": evaluation}
    missing = [f"{what}.{key}" for what, keys in REQUIRED.items() for key in keys if key not in given[what]]
    if missing:
        raise BadInput(f"The model card needs {', '.join(missing)}.\nGive them to release.build.build.")


def front_matter(name: str, license: str, recipe: Mapping[str, Any]) -> str:
    """The YAML block that the hub reads."""
    tags = ["ambergrade", "merge", "stable-diffusion-xl", recipe["family"]]
    facts = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": sorted(recipe["models"]),
        "base_model_relation": "merge",
        "tags": tags,
        "model_name": name,
    }
    return "---\n" + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True) + "---"


def substituted(formula: str, coefficients: Mapping[str, float], models: Iterable[str] = ()) -> str:
    """The formula with its coefficients' numbers in place of their names; names of models stay.

    >>> substituted("beta7 + a * (anxl3 - base a)", {"a": 0.8}, ["beta7", "anxl3", "base a"])
    'beta7 + 0.8 * (anxl3 - base a)'
    """
    names = sorted([*models, *coefficients], key=lambda name: (-len(name), name))
    pattern = "|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.])" for name in names)
    numbers = {name: repr(value) for name, value in coefficients.items()}
    return re.sub(pattern, lambda found: numbers.get(found[0], found[0]), formula)


def measurement(row: Mapping[str, Any], sign: str = "") -> str:
    """`value [low, high]`, or a dash where nothing was measured; `sign="+"` for differences.

    >>> measurement({"value": 0.5, "low": 0.41, "high": 0.6})
    '0.500 [0.410, 0.600]'
    """
    if any(row.get(key) is None or row[key] != row[key] for key in ("value", "low", "high")):
        return "–"
    return f"{row['value']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _formula(recipe: Mapping[str, Any]) -> str:
    # Only the right side has coefficients; the "a" of a name on the left stays.
    left, _, right = recipe["formula"].strip().partition("=")
    numbers = substituted(
        right, recipe["coefficients"], recipe["models"]
    ).strip()  # the name on the left keeps its letters
    rows = [[f"`{name}`", f"`{row['sha256']}`"] for name, row in sorted(recipe["models"].items())]
    return (
        f"```\n{left.strip()} = {numbers}\n```\n\n"
        f"Merged in fp32, rounded once to {recipe['dtype']}.\n\n{table(['input', 'sha256 of the weights'], rows)}"
    )


def _scores(evaluation: Mapping[str, Any]) -> str:
    prompts = evaluation["prompts"]
    scores: Mapping[str, Mapping[str, Any]] = evaluation["scores"]
    differences: Mapping[str, Mapping[str, Any]] = evaluation.get("differences", {})
    models = list(dict.fromkeys(model for row in scores.values() for model in row))
    others = list(dict.fromkeys(model for row in differences.values() for model in row))
    rows = []
    for metric in sorted(scores):
        better = next(iter(scores[metric].values())).get("higher_is_better", True)
        cells = [measurement(scores[metric].get(model, {})) for model in models]
        cells += [measurement(differences.get(metric, {}).get(model, {}), "+") for model in others]
        rows.append([f"{metric} {'↑' if better else '↓'}", *cells])
    head = ["metric", *models, *(f"winner minus {model}" for model in others)]
    return (
        f"On {_counted(prompts['count'], 'prompt')} of `{prompts['name']}`, one seed per picture, the same for every "
        "model. Brackets are 95 % intervals; differences are paired; ↑ higher is better, ↓ lower.\n\n"
        + table(head, rows)
    )


def _winner_set(evaluation: Mapping[str, Any]) -> str:
    points = [", ".join(f"{key} = {value:g}" for key, value in point.items()) for point in evaluation["winner_set"]]
    if len(points) == 1:
        told = "One point of the sweep: every other is worse"
    else:
        told = f"{len(points):,} points of the sweep, of which none can be told from the best"
    return f"{told} by `{evaluation['objective']}` (95 %, all comparisons at once).\n\n" + "\n".join(
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


def _use(file: str, config: str, sampler: Mapping[str, Any]) -> str:
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
        f"    num_inference_steps={sampler['steps']}, guidance_scale={sampler['guidance']:g},",
        f"    width={sampler['width']}, height={sampler['height']},",
        ").images[0]",
    ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    return text + (
        f"\n\nScored with the sampler `{sampler['name']}`, {sampler['steps']} steps, guidance "
        f"{sampler['guidance']:g}, {sampler['width']}×{sampler['height']} px."
    )


def _limits(evaluation: Mapping[str, Any]) -> str:
    scorers: Mapping[str, Mapping[str, Any]] = evaluation["scorers"]
    rows = [
        [f"`{name}`", f"`{row['fingerprint']}`", "tiny" if row.get("tiny") else "full size"]
        for name, row in sorted(scorers.items())
    ]
    text = "Scores hold for these scorers only:\n\n" + table(["scorer", "fingerprint", "size"], rows)
    if any(row.get("tiny") for row in scorers.values()):
        text += (
            "\n\n**Tiny scorers of the embedded world judged this model. Their numbers compare models of that world "
            "with each other; they say nothing about real models, and cannot be set beside numbers from real scorers.**"
        )
    return text
