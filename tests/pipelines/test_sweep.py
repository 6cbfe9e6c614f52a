"""pipelines/sweep.py on the embedded world: what it sweeps over, what it does once, and what it tells.

Most of it runs in this process, as Hydra's own tests do, so that torch is imported once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ambergrade import config
from ambergrade.family import sdxl
from ambergrade.identity import random_seed
from ambergrade.nouns import PromptSet
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
    "method": ("beta7 + a * (ties(beta7, anxl2, anxl3, density=0.3) - beta7)", {"a": 0.5}),
}
Sweep = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root, four prompts, and a folder of the user's own merges."""
    folder = tmp_path_factory.mktemp("sweep")
    prompts = [world_prompt(grammar.sample(5, k, clean=True), f"{k}", random_seed(5, k) % 2**32) for k in range(4)]
    PromptSet("p", tuple(prompts)).write(folder / "prompts.jsonl")
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


@pytest.fixture
def sweep(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """The command in this process; returns what it printed. `fails`: exit code 1, and what it told."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "pipelines"))
    import sweep as pipeline

    def run(*overrides: str, root: Path = place / "root", fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments(place, root), "hydra.sweeper.apart=false", *overrides])
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
    """How often checkpoints were read and texts encoded."""
    counted = {"read": 0, "encoded": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*given: Any, **named: Any) -> Any:
            counted[name] += 1
            return function(*given, **named)

        return counted_call

    monkeypatch.setattr(sdxl, "read_checkpoint", counting("read", sdxl.read_checkpoint))
    monkeypatch.setattr(sdxl, "encode_tokens", counting("encoded", sdxl.encode_tokens))
    return counted


@pytest.mark.slow
def test_models_are_read_once_and_no_checkpoint_is_written(sweep: Sweep, calls: dict[str, int], place: Path) -> None:
    told = sweep("merge=plain", "coefficients.a=range(0,3)")
    assert {row["status"] for row in outcomes(told).values()} == {"done"}
    assert set(outcomes(told)) == {"a 0", "a 1", "a 2"}
    read = calls["read"]
    assert sweep("merge=plain", "coefficients.a=choice(0.25,0.75)").count("a 0.25") >= 1
    assert calls["read"] == read  # the process had them in memory
    assert not list((place / "root").rglob("*.safetensors"))


@pytest.mark.slow
def test_prompts_are_encoded_again_only_where_the_text_encoders_changed(
    sweep: Sweep, calls: dict[str, int], place: Path
) -> None:
    sweep("merge=unet_only", "coefficients.a=0.0")
    once = calls["encoded"]
    assert once > 0
    told = sweep("merge=unet_only", "coefficients.a=0.3,0.6,0.9")
    assert calls["encoded"] == once
    sweep("merge=plain", "coefficients.a=0.31")  # another formula
    before = calls["encoded"]
    sweep("merge=plain", "coefficients.a=0.32,0.33")
    assert calls["encoded"] == before + 2 * once
    import sweeping

    sweeping._live.clear()  # the same scores to the bit as of a process that remembers nothing
    (only,) = outcomes(sweep("merge=unet_only", "coefficients.a=0.6", root=place / "alone")).values()
    assert only["value"]["sheet"] == outcomes(told)["a 0.6"]["value"]["sheet"]


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
    assert len({row["value"]["sheet"] for row in outcomes(told).values()}) == 4
    told = sweep("merge=unet_only", "sampler=glob(euler*)", "coefficients.a=0.3")
    assert set(outcomes(told)) == {f"sampler {path.stem}" for path in (config.CONF / "sampler").glob("euler*.yaml")}
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
    assert before["merge lora"]["value"]["sheet"] != after["merge lora"]["value"]["sheet"]
    assert before["merge unet_only"]["value"]["sheet"] == after["merge unet_only"]["value"]["sheet"]
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
    blocks = [json.loads(file.read_text()) for file in folder_of(told).glob("*/outcome-*.json")]
    assert sum(len(row["value"]["rows"]) for row in blocks) == int(pictures[1])
    # Rungs are joined to what a full evaluation gives; in other batches only last bits differ.
    whole = table(sweep("merge=unet_only", "coefficients.a=0.0,0.8,1.6", "sampler.batch=2"))
    assert table(told)
    assert all(row == pytest.approx(whole[label], abs=2e-3) for label, row in table(told).items())
    before = {file: file.stat().st_mtime_ns for file in folder_of(told).glob("*/outcome-*.json")}
    assert "pictures drawn" in sweep(*race)
    assert f"at most {12 - int(pictures[1])} pictures" in sweep(*race, "dry=true")
    assert {file: file.stat().st_mtime_ns for file in folder_of(told).glob("*/outcome-*.json")} == before


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
    assert re.search(r"sampler\.guidance: 3\.5 \(nearest finished point: [47]\.0\)", told)  # euler, or euler_tiny
    assert "is no point of this sweep" in sweep("merge=unet_only", "coefficients.a=0.3,0.6", "why='a 9'", fails=True)


@pytest.mark.slow
def test_points_of_unlike_prompts_get_a_leaderboard_and_no_winner(sweep: Sweep, place: Path) -> None:
    from mlflow import MlflowClient

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
    assert "leaves the range" in told or "BadInput" in told


@pytest.mark.slow
def test_from_a_shell_with_points_in_a_process_of_their_own(place: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "pipelines/sweep.py",
        *arguments(place, tmp_path),
        "merge=plain",
        "coefficients.a=0.4,0.8",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert set(outcomes(done.stdout)) == {"a 0.4", "a 0.8"}
    assert "leaderboard" not in done.stderr
    assert (folder_of(done.stdout) / "leaderboard.txt").exists()


@pytest.mark.slow
def test_a_sweep_ends_in_a_review_on_disk_and_in_mlflow_and_its_winner_is_a_model(sweep: Sweep, place: Path) -> None:
    from mlflow import MlflowClient

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
    from mlflow import MlflowClient

    search = ["merge=blocks", "search=qmc", "coefficients.inner=interval(0,1)", "coefficients.outer=interval(0,1)"]
    for trials in (3, 5):
        told = sweep(*search, f"search.trials={trials}")
        about = json.loads((folder_of(told) / "sweep.json").read_text())
        run = MlflowClient(database_of(place)).get_run(about["id"])
        assert (run.info.status, run.data.metrics["points"]) == ("FINISHED", trials)
        page = (folder_of(told) / "review.html").read_text()
        assert f"{trials} done, 0 failed" in page
        assert "<h2>Contour</h2>" in page
