"""pipelines/sweep.py on the embedded world: what it sweeps over, what it does once, and what it tells.

Most of it runs in this process, as Hydra's own tests do, so that torch is imported once.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from ambergrade.chain import point as chain_point
from ambergrade.chain import sweep_command
from ambergrade.chain.context import Context
from ambergrade.chain.points import PointScorer
from ambergrade.chain.sweep import SweepPlan
from ambergrade.family import sdxl
from ambergrade.identity import random_seed
from ambergrade.nouns import PromptSet
from ambergrade.places import CONF
from ambergrade.search.driver import Evaluator, in_process
from ambergrade.store import find_file
from ambergrade.world import grammar
from ambergrade.world.booru import prompt as world_prompt

REPOSITORY = Path(__file__).parents[2]
FORMULAS = {
    "plain": ("beta7 + a * (anxl3 - anxl2)", {"a": 0.5}),
    "unet_only": ("beta7 + unet(a * (anxl3 - anxl2))", {"a": 0.5}),
    "blocks": (
        'beta7 + at("model.diffusion_model.input_blocks*", inner * (anxl3 - anxl2))'
        ' + at("model.diffusion_model.output_blocks*", outer * (anxl3 - anxl2))',
        {"inner": 0.0, "outer": 0.0},
    ),
    "lora": ('beta7 + a * lora("{folder}/style.safetensors")', {"a": 0.5}),
    "another": ("base8 + a * (anxl3 - anxl2)", {"a": 0.5}),
    "method": ("beta7 + a * (ties(beta7, anxl2, anxl3, density=0.3) - beta7)", {"a": 0.5}),
}
Sweep = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root, four prompts, and a folder of the user's own merges."""
    folder = tmp_path_factory.mktemp("sweep")
    write_prompts(folder / "prompts.jsonl", 5)
    (folder / "mine" / "merge").mkdir(parents=True)
    write_lora(folder / "style.safetensors", 1)
    policies = {"vae": "base", "cosmetic": "refuse", "missing": "refuse", "nonfinite": "refuse", "ema": "drop"}
    for name, (formula, coefficients) in FORMULAS.items():
        values = {
            "formula": formula.format(folder=folder),
            "coefficients": coefficients,
            "dtype": None,
            "policies": policies,
        }
        (folder / "mine" / "merge" / f"{name}.yaml").write_text(json.dumps(values))
    return folder


def write_prompts(file: Path, seed: int) -> None:
    prompts = [world_prompt(grammar.sample(seed, k, clean=True), f"{k}", random_seed(seed, k)) for k in range(4)]
    PromptSet("p", tuple(prompts)).write(file)


def write_lora(file: Path, seed: int) -> None:
    """A LoRA of rank 2 on one attention of beta7."""
    layer = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    weight = sdxl.read_checkpoint(find_file("builtin://beta7.safetensors"))[f"model.diffusion_model.{layer}.weight"]
    random = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=random) for shape in ((weight.shape[0], 2), (2, weight.shape[1])))
    name = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, file)


def arguments(place: Path, root: Path) -> list[str]:
    small = ["sampler.width=64", "sampler.height=64", "sampler.steps=2", "sampler.batch=4", "write_winner=false"]
    prompts = ["data.draw=null", f"prompts.sweep={place}/prompts.jsonl", "prompts.sweep_count=4"]
    return ["--multirun", "--config-dir", str(place / "mine"), f"root={root}", *prompts, *small]


@pytest.fixture(scope="module")
def memory() -> PointScorer:
    """What the commands of this module have loaded."""
    return PointScorer()


@pytest.fixture
def sweep(
    place: Path, memory: PointScorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Sweep:
    """The command in this process; returns what it printed. `fails`: exit code 1, and what it told."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "pipelines"))
    pipeline = importlib.import_module("sweep")

    @contextmanager
    def in_this_process(context: Context, plan: SweepPlan, workers: int) -> Iterator[Evaluator]:
        yield in_process(lambda job: memory.score(context, plan.settings_of(job), job))

    monkeypatch.setattr(sweep_command, "pool", in_this_process)
    monkeypatch.setattr(sweep_command, "PointScorer", lambda: memory)

    def run(*overrides: str, root: Path = place / "root", fails: bool = False, draw: bool = False) -> str:
        given = [one for one in arguments(place, root) if not (draw and one.startswith(("data.draw", "prompts.sweep")))]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *given, *overrides])
        code = 0
        try:
            pipeline.main()
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        assert code == int(fails), told.out[-2000:] + told.err[-4000:]
        return str(told.out + told.err)

    return run


def database_of(place: Path) -> str:
    return f"sqlite:///{place / 'root' / 'mlruns' / 'mlflow.db'}"


def folder_of(told: str) -> Path:
    found = re.search(r"^sweep [0-9a-f]{12}, \d+ points, (\S+)$", told, re.MULTILINE)
    assert found, told
    return Path(found[1])


def outcomes(told: str) -> dict[str, dict[str, Any]]:
    """Label to outcome of every point, as its folder holds them."""
    found = {}
    for file in folder_of(told).glob("*/point.json"):
        found[json.loads(file.read_text())["label"]] = json.loads(file.with_name("outcome.json").read_text())
    return found


def table(told: str) -> dict[str, list[float]]:
    """Label to the leaderboard's values and their intervals."""
    lines = (folder_of(told) / "leaderboard.txt").read_text().splitlines()
    found = [re.match(r"[*=]? *(a \S+) +(.*)", line) for line in lines]
    return {line[1]: [float(x) for x in re.findall(r"-?\d+\.\d+", line[2])] for line in found if line}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a formula's models were read, and prompts encoded."""
    counted = {"read": 0, "encoded": 0}

    def counting(name: str, cls: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*given: Any, **named: Any) -> Any:
            counted[name] += 1
            return cls(*given, **named)

        return counted_call

    monkeypatch.setattr(chain_point, "ResidentMerge", counting("read", chain_point.ResidentMerge))
    monkeypatch.setattr(chain_point, "TextEncoder", counting("encoded", chain_point.TextEncoder))
    return counted


def test_two_points_are_drawn_kept_and_drawn_anew_when_the_prompts_are_edited(sweep: Sweep, tmp_path: Path) -> None:
    """A finished point counts only while its identity, computed now, is its record's: for sweep and preview alike."""
    root, prompts = tmp_path / "root", tmp_path / "prompts.jsonl"
    write_prompts(prompts, 5)
    two = ["merge=unet_only", "coefficients.a=0.3,0.6", f"prompts.sweep={prompts}", "prompts.sweep_count=2"]
    first = sweep(*two, root=root)
    assert [row["value"]["pictures"] for row in outcomes(first).values()] == [2, 2]
    assert set(table(first)) == {"a 0.3", "a 0.6"}
    assert (folder_of(first) / "review.html").exists()
    again = sweep(*two, root=root)
    assert "2 of 2 points finished before" in again
    assert outcomes(again) == outcomes(first)
    assert len(re.findall(r"hit$", sweep(*two, "dry=true", root=root), re.MULTILINE)) == 2

    write_prompts(prompts, 6)
    assert len(re.findall(r"miss +2 pictures$", sweep(*two, "dry=true", root=root), re.MULTILINE)) == 2
    edited = sweep(*two, root=root)
    assert "finished before" not in edited
    assert [row["value"]["pictures"] for row in outcomes(edited).values()] == [2, 2]
    assert table(edited) != table(first)
    assert [row["value"]["pictures"] for row in outcomes(sweep(*two, root=root)).values()] == [2, 2]


def test_a_record_that_is_gone_is_drawn_anew_and_the_preview_agrees(sweep: Sweep, tmp_path: Path) -> None:
    one = ["merge=unet_only", "coefficients.a=0.3", "prompts.sweep_count=2"]
    first = sweep(*one, root=tmp_path)
    (record,) = (tmp_path / "mlruns" / "records" / "point").glob("*.json")
    record.unlink()
    assert re.search(r"miss +2 pictures$", sweep(*one, "dry=true", root=tmp_path), re.MULTILINE)
    again = sweep(*one, root=tmp_path)
    assert "finished before" not in again
    assert outcomes(again)["the point"]["value"] | {"seconds": 0} == outcomes(first)["the point"]["value"] | {
        "seconds": 0
    }


def test_points_drawn_while_mlflow_was_down_are_journaled_by_the_same_command_later(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ["merge=unet_only", "coefficients.a=0.3,0.6", "prompts.sweep_count=2"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = sweep(*two, root=tmp_path)
    assert "not journaled" in told
    assert "/#/experiments" not in told  # no link to where nothing is
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "2 of 2 points finished before" in sweep(*two, root=tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    (experiment,) = (one.experiment_id for one in client.search_experiments() if one.name == "sweep")
    runs = {run.data.tags["ag.kind"]: run for run in client.search_runs([experiment])}
    points = client.search_runs([experiment], "tags.\"ag.kind\" = 'point'")
    assert len(points) == 2
    assert {run.data.tags["mlflow.parentRunId"] for run in points} == {runs["sweep"].info.run_id}
    assert {run.info.status for run in points} == {"FINISHED"}
    assert all("tag_prob" in run.data.metrics for run in points)
    assert runs["sweep"].data.metrics["points"] == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["merge=gamma_rev1", "coefficients.a=0.3,0.6"], "models.base7=PATH"),
        (["merge=plain", "coefficients.a=0.3,0.6", "search.objective=tag_prb"], "tag_prob"),
        (["merge=plain", "coefficients.a=0.3,inf"], "coefficients.a: a finite number is needed"),
        (["merge=plain", "sampler=glob(eulr*)"], "matches nothing"),
        (["merge=plain,plane", "coefficients.a=0.3"], "'plane' is not known"),
        (["merge=unet_only", "coefficients.a=0.3,0.6", "models.anxl3=/nowhere.safetensors"], "No file or folder at"),
        (["merge=unet_only", "coefficients.a=0.3,0.6", "family=sd15"], "networks of family sd15 cannot be loaded"),
    ],
)
def test_what_would_fail_every_point_is_told_once_and_before_the_first(
    sweep: Sweep, tmp_path: Path, overrides: list[str], told: str
) -> None:
    found = sweep(*overrides, root=tmp_path, fails=True, draw=True)
    assert found.count(told) == 1, found
    assert "points failed" not in found
    assert not (tmp_path / "mlruns").exists()  # nor is a world drawn for it


def test_a_preview_draws_nothing(sweep: Sweep, tmp_path: Path) -> None:
    two = ["merge=unet_only", "coefficients.a=0.3,0.6", "data.draw.prompts=7"]
    found = sweep(*two, "dry=true", root=tmp_path, draw=True)
    assert found.count("miss   7 pictures") == 2
    assert "14 pictures, unknown time" in found
    assert "not drawn yet" in sweep(*two, "why='a 0.3'", root=tmp_path, draw=True)
    assert not (tmp_path / "mlruns").exists()


def test_models_of_ones_own_can_be_named(sweep: Sweep, place: Path, tmp_path: Path) -> None:
    another = ["merge=another", "models.base8=builtin://anxl3.safetensors", "coefficients.a=0.3,0.6", "dry=true"]
    assert sweep(*another, root=tmp_path).count("miss") == 2


def test_a_world_drawn_otherwise_lies_beside_the_first(sweep: Sweep, place: Path, tmp_path: Path) -> None:
    """Two sweeps with different `data.draw` on one root, and the first again: its points are still its own."""
    world = ["data.draw.count=4", "data.draw.references=2", "merge=unet_only", "coefficients.a=0.3,0.6"]
    for prompts in (2, 3, 2):
        told = sweep(*world, f"data.draw.prompts={prompts}", root=tmp_path, draw=True)
        assert "No winner set" not in told
    assert "2 of 2 points finished before" in told


@pytest.mark.slow
def test_models_are_read_once_and_no_checkpoint_is_written(sweep: Sweep, calls: dict[str, int], place: Path) -> None:
    told = sweep("merge=plain", "coefficients.a=range(0,3)")
    assert {row["status"] for row in outcomes(told).values()} == {"done"}
    assert set(outcomes(told)) == {"a 0", "a 1", "a 2"}
    assert calls["read"] == 1
    assert sweep("merge=plain", "coefficients.a=choice(0.25,0.75)").count("a 0.25") >= 1
    assert calls["read"] == 1  # the process had them in memory
    assert not list((place / "root").rglob("*.safetensors"))


@pytest.mark.slow
def test_prompts_are_encoded_again_only_where_the_text_encoders_changed(
    sweep: Sweep, calls: dict[str, int], place: Path, memory: PointScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep("merge=unet_only", "coefficients.a=0.0")
    assert calls["encoded"] == 1
    told = sweep("merge=unet_only", "coefficients.a=0.3,0.6,0.9")
    assert calls["encoded"] == 1
    sweep("merge=plain", "coefficients.a=0.31")  # another formula
    assert calls["encoded"] == 2
    sweep("merge=plain", "coefficients.a=0.32,0.33")
    assert calls["encoded"] == 4
    alone = PointScorer()  # the same scores to the bit as of a process that remembers nothing
    monkeypatch.setattr(memory, "score", alone.score)
    (only,) = outcomes(sweep("merge=unet_only", "coefficients.a=0.6", root=place / "alone")).values()
    assert only["value"]["rows"] == outcomes(told)["a 0.6"]["value"]["rows"]


@pytest.mark.slow
def test_what_a_method_makes_without_coefficients_is_made_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    from ambergrade.merge.methods import ties as module

    made = []

    def counting(*given: Any, **named: Any) -> torch.Tensor:
        made.append(named["context"].name)
        return plain(*given, **named)

    plain = module.ties
    monkeypatch.setattr(module, "ties", counting)
    told = sweep("merge=method", "coefficients.a=0.2,0.4,0.6")
    assert len(outcomes(told)) == 3
    assert len(made) == len(set(made)) > 100


@pytest.mark.slow
def test_blocks_samplers_and_merges_are_swept_like_coefficients(sweep: Sweep) -> None:
    told = sweep("merge=blocks", "coefficients.inner=0,1", "coefficients.outer=0,1")
    assert set(outcomes(told)) == {f"inner {i}, outer {o}" for i in (0, 1) for o in (0, 1)}
    assert len({tuple(row["value"]["rows"]) for row in outcomes(told).values()}) == 4
    told = sweep("merge=unet_only", "sampler=glob(euler*)", "coefficients.a=0.3")
    assert set(outcomes(told)) == {f"sampler {path.stem}" for path in (CONF / "sampler").glob("euler*.yaml")}
    told = sweep("merge=plain,unet_only", "coefficients.a=0.3")
    assert set(outcomes(told)) == {"merge plain", "merge unet_only"}


@pytest.mark.slow
def test_a_swept_merge_whose_file_was_edited_is_drawn_anew(sweep: Sweep, place: Path) -> None:
    merges = ["merge=lora,unet_only", "coefficients.a=0.4"]
    first = sweep(*merges)
    write_lora(place / "style.safetensors", 2)
    second = sweep(*merges)
    assert folder_of(first) != folder_of(second)
    before, after = outcomes(first), outcomes(second)
    assert before["merge lora"]["value"]["identity"] != after["merge lora"]["value"]["identity"]
    assert before["merge unet_only"]["value"]["identity"] == after["merge unet_only"]["value"]["identity"]
    assert [after[label]["value"]["pictures"] for label in ("merge lora", "merge unet_only")] == [4, 0]


@pytest.mark.slow
def test_a_search_counts_in_all_and_the_same_command_draws_nothing(sweep: Sweep) -> None:
    search = ["merge=unet_only", "search=tpe", "coefficients.a=interval(0,1.6)"]
    first = outcomes(sweep(*search, "search.trials=3"))
    assert len(first) == 3
    again = sweep(*search, "search.trials=3")
    assert "3 of 3 points finished before" in again
    assert outcomes(again) == first
    assert len(outcomes(sweep(*search, "search.trials=4"))) == 4


@pytest.mark.slow
def test_a_race_draws_the_rungs_and_continues(sweep: Sweep) -> None:
    race = ["merge=unet_only", "coefficients.a=0.0,0.8,1.6", "race=[2,4]", "sampler.batch=2"]
    told = sweep(*race)
    pictures = re.search(r"(\d+) pictures drawn, a full evaluation takes 12", told)
    assert pictures
    assert 6 <= int(pictures[1]) <= 12
    blocks = [json.loads(file.read_text()) for file in folder_of(told).glob("*/prompts-*/outcome.json")]
    assert sum(len(row["value"]["rows"]) for row in blocks) == int(pictures[1])
    # Rungs are joined to what a full evaluation gives; in other batches only last bits differ.
    whole = table(sweep("merge=unet_only", "coefficients.a=0.0,0.8,1.6", "sampler.batch=2"))
    assert table(told)
    assert all(row == pytest.approx(whole[label], abs=2e-3) for label, row in table(told).items())
    before = {file: file.stat().st_mtime_ns for file in folder_of(told).glob("*/prompts-*/outcome.json")}
    assert "pictures drawn" in sweep(*race)
    assert f"at most {12 - int(pictures[1])} pictures" in sweep(*race, "dry=true")
    assert {file: file.stat().st_mtime_ns for file in folder_of(told).glob("*/prompts-*/outcome.json")} == before


@pytest.mark.slow
def test_dry_tells_hits_and_cost_and_why_what_made_a_point_new(sweep: Sweep) -> None:
    sweep("merge=unet_only", "coefficients.a=0.3,0.6")
    told = sweep("merge=unet_only", "coefficients.a=0.3,0.7", "dry=true")
    assert re.search(r"a 0\.3 +hit", told)
    assert re.search(r"a 0\.7 +miss +4 pictures", told)
    assert "4 pictures, about" in told
    told = sweep("merge=unet_only", "coefficients.a=0.3,0.7", "why='a 0.7'")
    assert "coefficients.a: 0.7 (nearest finished point:" in told
    told = sweep("merge=unet_only", "coefficients.a=0.3", "sampler.guidance=3.5", "why='a 0.3'")
    assert re.search(r"sampler\.guidance: 3\.5 \(nearest finished point: \d\.0\)", told)  # by whichever sampler
    assert "is no point of this sweep" in sweep("merge=unet_only", "coefficients.a=0.3,0.6", "why='a 9'", fails=True)


@pytest.mark.slow
def test_points_of_unlike_prompts_get_a_leaderboard_and_no_winner(sweep: Sweep, place: Path) -> None:
    told = sweep("merge=unet_only", "coefficients.a=0.3", "prompts.sweep_count=3,4")
    assert "No winner set" in told
    assert "viewStateShareKey=" in told
    text = (folder_of(told) / "leaderboard.txt").read_text()
    assert text in told + "\n"
    means = {row["value"]["score"]: label for label, row in outcomes(told).items()}
    best_first = [means[score] for score in sorted(means, reverse=True)]
    assert re.findall(r"^ *(sweep_count \d)", text, re.MULTILINE) == best_first
    assert not re.search(r"^[*=]", text, re.MULTILINE)
    run = MlflowClient(database_of(place)).get_run(json.loads((folder_of(told) / "sweep.json").read_text())["id"])
    assert run.info.status == "FINISHED"
    assert "No winner set" in run.data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_a_point_that_cannot_be_merged_is_told_and_the_others_are_drawn(sweep: Sweep) -> None:
    told = sweep("merge=unet_only", "coefficients.a=0.3,1e9", fails=True)
    found = outcomes(told)
    assert [label for label, row in found.items() if row["status"] == "done"] == ["a 0.3"]
    assert len(found) == 2
    assert "1 of 2 points failed" in told
    reason = found["a 1000000000.0"]["reason"]
    assert "BadInput" in reason
    assert reason.splitlines()[0] in told
    assert reason in (folder_of(told) / "failures.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["compute.workers=1"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]])
def test_from_a_shell_with_points_in_processes_of_their_own(place: Path, tmp_path: Path, more: list[str]) -> None:
    command = [
        sys.executable,
        "pipelines/sweep.py",
        *arguments(place, tmp_path),
        "merge=plain",
        "coefficients.a=0.4,0.8",
        *more,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert set(outcomes(done.stdout)) == {"a 0.4", "a 0.8"}
    assert "leaderboard" not in done.stderr
    assert (folder_of(done.stdout) / "leaderboard.txt").exists()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    kinds = {run.info.run_id: run.data.tags["ag.kind"] for run in runs}
    assert sorted(kinds.values()) == ["point", "point", "sweep"]
    points = [run for run in runs if run.data.tags["ag.kind"] == "point"]
    assert {kinds[run.data.tags["mlflow.parentRunId"]] for run in points} == {"sweep"}
    assert {(run.info.status, len(run.data.params)) for run in points} == {("FINISHED", 1)}
    assert "leaked" not in done.stderr


@pytest.mark.slow
def test_a_sweep_ends_in_a_review_on_disk_and_in_mlflow_and_its_winner_is_a_model(sweep: Sweep, place: Path) -> None:
    told = sweep("merge=plain", "coefficients.a=0.2,0.6,1e9", "write_winner=true", fails=True)
    folder = folder_of(told)
    page = (folder / "review.html").read_text()
    assert f"review  {folder}/review.html" in told
    assert "<h2>1 failed</h2>" in page
    assert "a 1000000000.0" in page
    assert page.count("data:image/") == 2  # the curve and the contact sheet
    client = MlflowClient(database_of(place))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    key = json.loads((folder / "sweep.json").read_text())["key"]
    (found,) = client.search_runs(experiments, f"tags.\"ag.key\" = '{key}' and tags.\"ag.kind\" = 'sweep'")
    run = client.get_run(found.info.run_id)
    assert {"review.html", "recipe.yaml"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    winner = float(run.data.tags["winner"].removeprefix("a "))
    (made,) = run.outputs.model_outputs
    model = client.get_logged_model(made.model_id)
    weights = {name: sdxl.read_checkpoint(find_file(f"builtin://{name}.safetensors")) for name in ("beta7", "anxl2")}
    assert len(run.inputs.model_inputs) == 3
    assert json.loads(model.tags["recipe"])["coefficients"] == {"a": winner}
    merged = sdxl.read_checkpoint(folder / "merged.safetensors")
    assert model.tags["sha256"] == sdxl.weights_digest(merged)
    three = sdxl.read_checkpoint(find_file("builtin://anxl3.safetensors"))
    name = "model.diffusion_model.out.2.weight"
    base, two = (weights[alias][name].double() for alias in ("beta7", "anxl2"))
    expected = base + winner * (three[name].double() - two)
    torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_finished_sweep_that_grows_shows_its_new_review(sweep: Sweep, place: Path) -> None:
    search = ["merge=blocks", "search=qmc", "coefficients.inner=interval(0,1)", "coefficients.outer=interval(0,1)"]
    for trials in (3, 5):
        told = sweep(*search, f"search.trials={trials}")
        about = json.loads((folder_of(told) / "sweep.json").read_text())
        run = MlflowClient(database_of(place)).get_run(about["id"])
        assert (run.info.status, run.data.metrics["points"]) == ("FINISHED", trials)
        page = (folder_of(told) / "review.html").read_text()
        assert f"{trials} done, 0 failed" in page
        assert "<h2>Contour</h2>" in page
