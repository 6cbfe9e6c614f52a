"""What pipelines/sweep.py does: one point in any process, and, in the parent, what goes before and after the points."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from recording import record

from ambergrade import config
from ambergrade.errors import BadSetting
from ambergrade.identity import digest
from ambergrade.merge.formula import Formula
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.nouns import PromptSet
from ambergrade.score.comparison import aggregates
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import prompt_means, winner_set
from ambergrade.search.explain import why_new
from ambergrade.store import Ledger, find_file, write_json
from ambergrade.track.journal import Journal, Run
from ambergrade.track.relay import Message, Relayed, Scribe
from hydra_plugins.ambergrade_sweeper import _reports

if TYPE_CHECKING:  # the networks' libraries take seconds to import: only the process that draws does
    from stages import Chain, Merger

FREE = ("block", "dry", "why", "race", "screen", "search", "leaderboard", "write_winner")
"""Settings that may differ between two points of one loaded merge; so may the coefficients."""

LOADED = ("models", "family", "compute", "root")
"""Settings that decide, with the merge's formula, dtype and policies, what lies in memory for a merge."""

_live: dict[str, tuple[Chain, Merger]] = {}
_settled = False


def point(settings: dict[str, Any]) -> dict[str, Any]:
    """Score one point: `score`, `rows` (one a prompt, in their order), pictures drawn now, and where the sheet lies.

    The point is a run below the sweep's, named by its folder, and its stage a run below that: what fails or is killed
    is taken up again in the same runs.
    """
    import stages

    journal = journal_of(settings)
    sweep, place = _parent(journal), Path(HydraConfig.get().runtime.output_dir).name
    label, key = label_of(settings), f"{sweep.key[:16]}-{place}{_rung(settings)}"
    params = {**coefficients(settings), **_swept()}
    with journal.run(label, key=key, kind=_kind(settings), parent=sweep, params=params) as run:
        chain, merger = live(settings)
        chain = _told_to(chain, journal, run)
        prompts = prompts_of(chain, settings)
        done = stages.evaluate(chain, merger, coefficients(settings), prompts, "draw and score", label, pictured=False)
        sheet = ScoreSheet.read(done.files["scores"])
        _show(run, chain, done, sheet, prompts)
    if _reports.send:
        _settle()
    return _told(settings, done, sheet)


def _settle() -> None:
    """After a first point: Python need not look for garbage among torch and the models, which takes half a second."""
    global _settled
    if not _settled:
        gc.freeze()
        _settled = True


def journal_of(settings: Mapping[str, Any]) -> Journal:
    """The journal of a process that draws: its parent's, where that listens."""
    root = Path(settings["root"])
    return Relayed(_reports.send, root) if _reports.send else Journal.open(root, settings["name"])


def _told_to(chain: Chain, journal: Journal, run: Run) -> Chain:
    """The chain for one point. What was loaded once, the scorers above all, goes along; `replace` would leave it."""
    assert chain.scorers
    point = copy.copy(chain)
    point.journal, point.parent = journal, run
    return point


def _show(run: Run, chain: Chain, done: Any, sheet: ScoreSheet, prompts: PromptSet) -> None:
    """Scores and pictures on the point's own page, where the UI lays points side by side."""
    if run.done:
        return
    run.tags({"ag.cache": "miss" if done.fresh else "hit", "ag.sheet": done.digests["scores"]})
    run.metrics(aggregates(sheet))
    for prompt, pixels in zip(prompts.prompts, common.cut(done.files["pictures"], chain.sampler.width), strict=False):
        run.picture(f"sweep/{prompt.id}", Image.fromarray(pixels))


def _told(settings: Mapping[str, Any], done: Any, sheet: ScoreSheet) -> dict[str, Any]:
    objective = settings["search"]["objective"]
    if objective not in sheet.columns:
        raise BadSetting(
            f"search.objective={objective} is not scored per picture here.\nScored: {', '.join(sorted(sheet.columns))}"
        )
    rows = prompt_means(sheet.columns[objective], sheet.prompt_ids)
    return {
        "score": float(np.nanmean(rows)) if not np.isnan(rows).all() else float("nan"),
        "rows": [float(row) for row in rows],
        "pictures": sheet.n if done.fresh else 0,
        "seconds": done.seconds,
        "sheet": done.digests["scores"],
        "identity": done.identity,
    }


def live(settings: dict[str, Any]) -> tuple[Chain, Merger]:
    """The chain and the merge with its models in memory: loaded once a process, whatever the coefficients."""
    global _settled
    import stages

    free = {**settings["merge"], "coefficients": None}
    key = digest({**{name: value for name, value in settings.items() if name not in FREE}, "merge": free})
    if key not in _live:
        gc.unfreeze()  # what is replaced is to be found
        _settled = False
        stages.use_threads(settings["compute"])
        journal = Journal(None, "", "", Path(settings["root"]))  # a point brings its own
        chain = stages.Chain(settings, journal, Run(journal, "", "", "", done=False, resumed=False))
        models = settings["models"]
        named = Formula.parse(settings["merge"]["formula"], models).models
        missing = [alias for alias in named if not models[alias]]
        if missing:
            raise BadSetting(
                f"The formula needs {', '.join(missing)}.\nName the file: models.{missing[0]}=PATH, "
                "for example the one that pipelines/train.py wrote."
            )
        family = settings["family"]["name"]
        before = next(iter(_live.values()), None)
        _live.clear()  # one merge in memory
        if before is not None and _loaded(before[0].settings) == _loaded(settings):
            merger = before[1].handed_to(chain)
            if before[0].settings["suite"] == settings["suite"]:
                chain.metrics = before[0].metrics
        else:
            opened = {alias: stages.open_checkpoint(find_file(models[alias]), family) for alias in named}
            merger = stages.Merger(chain, opened)
        _live[key] = (chain, merger)
    return _live[key]


def prepares(settings: dict[str, Any]) -> None:
    """Import and read what every point needs, while the parent opens the record."""
    chain, merger = live(settings)
    assert chain.scorers
    assert merger.resident


def writes(settings: dict[str, Any], about: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Write the merge of one point as a file: what the sweep's run (`about` it: id, name, key) enters as its model.

    Called in the process that drew the points, where that is there: it has the libraries in memory.
    """
    import stages

    chain, merger = live(settings)
    journal = journal_of(settings)
    chain = replace(chain, journal=journal, parent=journal.attached(**about))
    point = coefficients(settings)
    merged, _ = stages.write_merge(chain, merger, point, folder)
    return {
        "name": merger.formula.name or "winner",
        "path": merged.path,
        "digest": merged.digest,
        "parents": merger.inputs,
        "tags": {"recipe": merger.recipe(point).to_json()},
        "params": point,
    }


def _loaded(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: settings[name] for name in LOADED}, "merge": {**settings["merge"], "coefficients": None}}


def _about() -> dict[str, Any]:
    """What the sweeper says of this job's point; nothing for a point that is drawn alone."""
    file = Path(HydraConfig.get().runtime.output_dir) / "point.json" if HydraConfig.initialized() else None
    return dict(json.loads(file.read_text())) if file is not None and file.exists() else {}


def _swept() -> dict[str, Any]:
    return {key.rpartition(".")[2]: value for key, value in _about().get("point", {}).items()}


def coefficients(settings: Mapping[str, Any]) -> dict[str, float]:
    return dict(settings["merge"]["coefficients"])


def prompts_of(chain: Chain, settings: Mapping[str, Any]) -> PromptSet:
    """The sweep's prompts, or the part of them that a rung adds."""
    import stages

    prompts = stages.read_prompts(chain, "sweep")
    if settings["block"] is None:
        return prompts
    start, stop = settings["block"]
    if not 0 <= start < stop <= len(prompts.prompts):
        raise BadSetting(
            f"Prompts {start} to {stop} are asked for, the set has {len(prompts.prompts)}.\n"
            f"End the race there: race=[…,{len(prompts.prompts)}]."
        )
    return PromptSet("rung", prompts.prompts[start:stop])


def label_of(settings: Mapping[str, Any]) -> str:
    block = settings["block"]
    label = _about()["label"] if _swept() else common.label_of(coefficients(settings))
    return label + (f", prompts {block[0]}–{block[1]}" if block else "")


def _kind(settings: Mapping[str, Any]) -> str:
    return "rung" if settings["block"] else "point"


def _rung(settings: Mapping[str, Any]) -> str:
    return f"-{settings['block'][0]}-{settings['block'][1]}" if settings["block"] else ""


def _parent(journal: Journal) -> Run:
    """The sweep's run, opened by the parent process; nothing for a point that is drawn alone."""
    about = Path(HydraConfig.get().runtime.output_dir).parent / "sweep.json" if HydraConfig.initialized() else None
    if about is None or not about.exists():
        return Run(journal, "", "", "", done=False, resumed=False)
    return journal.attached(**json.loads(about.read_text()))


# --- in the parent, around the points ---------------------------------------------------------------------------


def inputs(cfg: Any) -> dict[str, str]:
    """Digest of every file of a model or LoRA that is there."""
    known, models = Digests(default_cache()), {name: source for name, source in cfg.models.items() if source}
    named = Formula.parse(cfg.merge.formula, cfg.models).lora_paths
    files = {alias: Path(find_file(source)) for alias, source in {**models, **named}.items()}
    found = {
        alias: digest(
            {str(part.relative_to(file)): known.of_file(part) for part in sorted(file.rglob("*.safetensors"))}
        )
        if file.is_dir()
        else known.of_file(file)
        for alias, file in files.items()
    }
    known.save()
    return found


def holds(cfg: Any, value: Mapping[str, Any]) -> bool:
    """Whether a finished point's sheet is still in the store."""
    return Ledger(Path(config.plain(cfg)["root"]) / "mlruns").store.holds(value["sheet"])


@contextmanager
def opens(cfg: Any, sweep: Any) -> Iterator[tuple[Run, Journal, Scribe]]:
    """The sweep's own run, and everything that many jobs must not make at once: database, experiment, prompts."""
    settings = config.plain(cfg)
    root = Path(settings["root"])
    print(f"sweep {sweep.key[:12]}, {len(sweep.search)} points, {sweep.folder}", flush=True)
    if settings["data"]["draw"]:
        common.draw_world(settings)
    journal = Journal.open(root, settings["name"])
    swept = ", ".join(key.rpartition(".")[2] for key in sweep.plan.axes)
    params = {"formula": settings["merge"]["formula"], "objective": settings["search"]["objective"], "swept": swept}
    params |= {f"values.{key.rpartition('.')[2]}": sweep.plan.spec(key) for key in sweep.plan.axes}
    try:
        with journal.run(f"sweep {sweep.key[:8]}: {swept}", key=sweep.key, kind="sweep", params=params) as run:
            write_json(sweep.folder / "sweep.json", {"id": run.id, "name": run.name, "key": run.key})
            record(run, settings)
            chosen = settings["prompts"]
            drawn = PromptSet.read(find_file(chosen["sweep"]), "sweep").first(chosen["sweep_count"])
            run.datasets({"prompts": drawn.digest})
            threading.Thread(target=importlib.import_module, args=("reviewing",)).start()  # a second of matplotlib
            yield run, journal, Scribe(journal)
    except BaseException:
        Journal.open(root, settings["name"])  # closes the runs of workers that were killed
        raise
    for trouble in journal.troubles:
        print(f"not journaled: {trouble}")


def hears(sweep: Any, message: Message | None) -> None:
    """What the process that draws says to the journal; None: it is gone."""
    _, _, scribe = sweep.around
    if message is None:
        scribe.lose()
    else:
        scribe.hear(message)


def judge(scores: Any, alive: Sequence[int], error: float, higher_is_better: bool) -> tuple[int, ...]:
    """The points of a rung that cannot be told from the best (search/racing.py: Judge)."""
    return winner_set(np.asarray(scores), higher_is_better=higher_is_better, error=error, alive=alive).members


def previews(cfg: Any) -> bool:
    return bool(cfg.dry or cfg.why)


def preview(sweep: Any, points: Sequence[tuple[Any, Any]]) -> None:
    """Hit or miss and cost of every point; with `why` what told a point from the finished one most like it."""
    import stages

    total, hours, known_as, settings = 0, 0.0, set(), config.plain(points[0][1])
    if settings["data"]["draw"]:
        common.draw_world(settings)
    for trial, cfg in points:
        settings = config.plain(cfg)
        chain, merger = live(settings)
        sets = [prompts_of(chain, {**settings, "block": block}) for block in _blocks(settings["race"])]
        filed = [(stages.filed_under(chain, merger, coefficients(settings), prompts), prompts) for prompts in sets]
        new = [one for one in filed if not chain.ledger.find(one[0][0], Ledger.identity(one[0][0], 1, *one[0][1:]))]
        pictures = sum(len(prompts.prompts) for _, prompts in new)
        total += pictures
        hours += pictures * _seconds_a_picture(chain, *filed[0][0]) / 3600
        print(f"  {trial.label:<34}{f'miss   {pictures} pictures' if new else 'hit'}", flush=True)
        names = {trial.label, common.label_of(coefficients(settings))}
        known_as |= names
        if settings["why"] in names:
            _explain(chain, *filed[0][0])
    if settings["why"] and settings["why"] not in known_as:
        raise BadSetting(
            f"why={settings['why']} is no point of this sweep: {', '.join(t.label for t, _ in points[:6])}."
        )
    time = (
        f"about {f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'} on this device"
        if hours or not total
        else "unknown time: nothing like it was drawn yet"
    )
    base = Path(find_file(settings["models"][merger.formula.models[0]]))
    size = sum(file.stat().st_size for file in ([base] if base.is_file() else base.rglob("*.safetensors")))
    written = f"{size / 1e9:.2f} GB for the winner" if settings["write_winner"] else "no checkpoint"
    print(f"{'at most ' if settings['race'] else ''}{total} pictures, {time}, {written}")


def _blocks(rungs: Sequence[int] | None) -> list[list[int] | None]:
    """The prompts of every rung; None for all of them at once."""
    return [list(pair) for pair in zip((0, *rungs), rungs, strict=False)] if rungs else [None]


def _explain(chain: Chain, kind: str, about: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    wanted = {"settings": about, "inputs": inputs}
    for key, now, then in why_new(wanted, ({name: row[name] for name in wanted} for row in _records(chain, kind))):
        print(f"    {key}: {_short(now)} (nearest finished point: {_short(then)})")


def _records(chain: Chain, kind: str) -> Iterator[dict[str, Any]]:
    return (json.loads(file.read_text()) for file in sorted((chain.ledger.root / "records" / kind).glob("*.json")))


_rates: dict[str, float] = {}


def _seconds_a_picture(chain: Chain, kind: str, about: Mapping[str, Any], inputs: Mapping[str, str]) -> float:
    """Median over what was drawn by this sampler and scored by this suite; 0 where there is none."""
    key = digest([str(chain.ledger.root), kind, about["sampler"], inputs["scorers"]])
    if key not in _rates:
        like = [
            row["seconds"] / max(value["n"] for value in row["values"]["aggregates"].values())
            for row in _records(chain, kind)
            if row["settings"]["sampler"] == about["sampler"] and row["inputs"]["scorers"] == inputs["scorers"]
        ]
        _rates[key] = float(np.median(like)) if like else 0.0
    return _rates[key]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def closes(cfg: Any, sweep: Any) -> None:
    """The review of a sweep that is over."""
    import reviewing

    reviewing.closes(config.plain(cfg), sweep, writes)
