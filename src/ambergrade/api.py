"""Names what may be used from Python: `import ambergrade` offers these functions, loaded when they are first asked for.

docs/api.md shows them at work. Everything else in the package may change between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ambergrade.chain.verification import Finding
    from ambergrade.merge.files import Verdict
    from ambergrade.merge.formula import Formula
    from ambergrade.nouns import Picture, PromptSet
    from ambergrade.score.sheet import ScoreSheet
    from ambergrade.score.statistics import PairedDifference
    from ambergrade.search.driver import Swept

__all__ = [
    *("compare_releases", "compare_sheets", "merge_files", "parse_formula"),
    *("score_pictures", "sweep", "verify_file", "verify_release"),
]


def parse_formula(text: str, models: Iterable[str]) -> Formula:
    """Parse a merge as a model card prints it; free names are coefficients. Raises BadSetting where it cannot be read.

    >>> formula = parse_formula("gamma = beta7 + a * (anxl3 - anxl2)", ["beta7", "anxl2", "anxl3"])
    >>> formula.name, formula.models, formula.coefficients
    ('gamma', ('beta7', 'anxl3', 'anxl2'), ('a',))
    """
    from ambergrade.merge.formula import Formula

    return Formula.parse(text, list(models))


def merge_files(
    formula: str,
    models: Mapping[str, Path],
    out: Path,
    *,
    coefficients: Mapping[str, float] | None = None,
    dtype: str | None = None,
) -> Path:
    """Merge model files into one, streamed: the same bytes on every machine. It needs no torch.

    formula: as in `parse_formula`. models: alias to a safetensors file or diffusers folder. dtype: fp32, fp16 or bf16;
    None keeps the base's. Raises AmbergradeError for what cannot be merged.

    >>> import tempfile, numpy as np
    >>> from safetensors.numpy import load_file, save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, value in {"x": 1.0, "y": 3.0}.items():
    ...     save_file({"w": np.full((2, 2), value, np.float32)}, folder / f"{name}.safetensors")
    >>> files = {name: folder / f"{name}.safetensors" for name in ("x", "y")}
    >>> made = merge_files("z = x + a * (y - x)", files, folder / "z.safetensors", coefficients={"a": 0.25})
    >>> load_file(made)["w"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    from ambergrade.merge.engine import merge
    from ambergrade.merge.job import open_job

    job = open_job(parse_formula(formula, models), models, coefficients=coefficients or {}, dtype=dtype)
    merge(job, out)
    return out


def verify_file(model: Path, models: Path) -> Verdict:
    """Make a merged file again from its header and inputs in the folder `models`, and compare every byte.

    >>> import tempfile, numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"w": np.ones((2, 2), np.float32)}, folder / "x.safetensors")
    >>> made = merge_files("z = 2 * x - x", {"x": folder / "x.safetensors"}, folder / "z.safetensors")
    >>> verify_file(made, folder).same
    True
    """
    from ambergrade.merge.files import verify

    return verify(model, models)


def verify_release(folder: Path, models: Path | None = None, *, rebuild: bool = False) -> list[Finding]:
    """Check a release; return what each level found, `wrong` empty where it holds.

    models: the folder that holds the parents, under any names; None takes those that the release bundles. rebuild:
    merge again and compare every byte. Raises BadInput for a folder that is no release.

    >>> import tempfile
    >>> verify_release(Path(tempfile.mkdtemp()))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ambergrade.errors.BadInput: … is no release: it has no release.json.
    """
    from ambergrade.chain import verification

    return list(verification.verify_release(folder, verification.Asked(models=models, rebuild=rebuild)))


def compare_releases(one: Path, other: Path, out: Path | None = None) -> str:
    """Compare two releases; return plain text, and write the pictures that both drew from the same prompts to `out`.

    Raises BadInput for a folder that is no release.

    >>> import tempfile
    >>> compare_releases(*[Path(tempfile.mkdtemp())] * 2)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ambergrade.errors.BadInput: … is no release: it has no release.json.
    """
    from ambergrade.chain import versions

    return versions.compare_releases(one, other, out)


def score_pictures(
    pictures: Iterable[Picture], prompts: PromptSet, metrics: Mapping[str, Mapping[str, Any]], *, device: str = "cpu"
) -> ScoreSheet:
    """Score pictures by their prompts: one row a picture, aggregates with intervals from the rows.

    metrics: name of a yaml in conf/metric to its settings, as `{"mosaic": {}}`. Raises BadInput for pictures without a
    prompt.

    >>> import numpy as np
    >>> from ambergrade.nouns import Picture, Prompt, PromptSet
    >>> prompts = PromptSet("two", (Prompt("a", "a cat", 0), Prompt("b", "a dog", 1)))
    >>> noise = np.random.default_rng(0)
    >>> drawn = [Picture(p.id, p.seed, noise.integers(0, 256, (64, 64, 3), np.uint8)) for p in prompts.prompts]
    >>> sheet = score_pictures(drawn, prompts, {"mosaic": {}})
    >>> sheet.n, sorted(sheet.fingerprints)
    (2, ['mosaic'])
    """
    from ambergrade.score.scoring import load_metric, score

    return score(pictures, prompts, [load_metric(name, **given, device=device) for name, given in metrics.items()])


def compare_sheets(sheet: ScoreSheet, baseline: ScoreSheet) -> dict[str, PairedDifference]:
    """Compare two sheets of the same prompts and seeds: metric to the paired difference with its 95 % interval.

    Raises BadInput where they cannot be paired.

    >>> import numpy as np
    >>> from ambergrade.nouns import Picture, Prompt, PromptSet
    >>> prompts = PromptSet("few", tuple(Prompt(str(k), "a cat", k) for k in range(8)))
    >>> smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    >>> sheet = score_pictures([Picture(p.id, p.seed, smooth) for p in prompts.prompts], prompts, {"mosaic": {}})
    >>> {difference.value for difference in compare_sheets(sheet, sheet).values()}
    {0.0}
    """
    from ambergrade.score.comparison import differences
    from ambergrade.score.sheet import refuse_unlike

    refuse_unlike(sheet, baseline)
    return differences(sheet, baseline)


def sweep(
    values: Mapping[str, Sequence[float]],
    evaluate: Callable[[Mapping[str, float]], float],
    *,
    higher_is_better: bool = True,
) -> Swept:
    """Evaluate every point of a grid in this process; a point that raises has failed, and the others go on.

    >>> swept = sweep({"a": [0.0, 0.5, 1.0]}, lambda point: 2 - point["a"])
    >>> swept.best
    ({'a': 0.0}, 2.0)
    """
    from ambergrade.search.driver import Driver, Job, in_process
    from ambergrade.search.load import search

    grid = search("grid", values=values, objective="score", higher_is_better=higher_is_better)

    def label(point: Mapping[str, float | str | bool]) -> str:
        return ", ".join(f"{name} {value}" for name, value in point.items())

    def score(job: Job) -> float:
        return evaluate({name: float(value) for name, value in job.point.items()})

    return Driver(grid, in_process(score), label).sweep()
