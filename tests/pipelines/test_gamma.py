"""The whole chain at its smallest, run as a user runs it: twice, killed in between, and in two places."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "pipelines/gamma.py", "experiment=gamma_smoke"]
NAME = "kohaku-xl-gamma-smoke-rev1"


def gamma(root: Path, *more: str) -> str:
    done = subprocess.run([*COMMAND, f"root={root}", *more], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def manifest(root: Path) -> bytes:
    return (root / "mlruns" / "releases" / NAME / "MANIFEST.json").read_bytes()


def cpu_seconds() -> float:
    """Give the CPU seconds of all commands so far: a busy machine does not stretch them as it does the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("gamma")
    return root, gamma(root)


def test_first_run_ends_in_a_release_that_sha256sum_accepts(first: tuple[Path, str]) -> None:
    root, told = first
    folder = root / "mlruns" / "releases" / NAME
    assert "finished before" not in told
    assert str(folder) in told
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder).returncode == 0
    recipe = (folder / "recipe.yaml").read_text()
    assert "beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)" in recipe


def test_second_run_finds_every_stage_finished(first: tuple[Path, str]) -> None:
    root, told = first
    before, start = manifest(root), cpu_seconds()
    again = gamma(root)
    lines = [line.rstrip() for line in told.splitlines() if line.startswith("  ")]
    stages = [line for line in lines if line.endswith(tuple("0123456789abcdef")) and " s " in line]
    points = [line for line in stages if line.startswith("  a ")]
    assert (len(stages) >= 8, len(points)) == (True, 4)
    assert "4 of 4 points finished before" in again
    assert again.count("finished before") == len(stages) - len(points) + 1
    assert manifest(root) == before
    assert cpu_seconds() - start < 40


def test_mlflow_holds_the_chain(first: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{first[0]}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("gamma_smoke")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    kinds = [run.data.tags["ag.kind"] for run in runs]
    assert kinds.count("chain") == 1
    assert kinds.count("point") == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    point = next(run for run in runs if run.data.tags["ag.kind"] == "point")
    assert {"a", "b"} <= point.data.params.keys()
    assert {"tag_balance", "tag_balance_lo", "tag_balance_hi", "clip_score", "fid"} <= point.data.metrics.keys()
    version = client.get_model_version_by_alias("kohaku-xl-gamma-smoke", "candidate")
    assert str(version.version) == "1"
    gates = {tag.removeprefix("gate."): said for tag, said in version.tags.items() if tag.startswith("gate.")}
    compared = {"pairing", "better_than_base", "not_worse_than_champion", "mosaic", "rating_leak"}
    assert gates.keys() == {"no_tiny_scorers", "licence", "veto", *compared}
    assert gates["licence"].startswith("pass: apache-2.0")
    assert gates["pairing"] == "pass: the same prompts, seeds and sampler as base"
    aliases = client.get_registered_model("kohaku-xl-gamma-smoke").aliases
    assert ("champion" in aliases) == all(said.startswith("pass: ") for said in gates.values())
    chain = next(run for run in runs if run.data.tags["ag.kind"] == "chain")
    assert {"config.yaml", "overrides.yaml"} <= {file.path for file in client.list_artifacts(chain.info.run_id)}


def test_released_file_is_the_live_merge_and_loads_in_stock_diffusers(first: tuple[Path, str]) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    from ambergrade.family import sdxl
    from ambergrade.store import find_file

    folder = first[0] / "mlruns" / "releases" / NAME
    file = next(folder.glob("*.safetensors"))
    config = find_file("builtin://sdxl_tiny")
    pipeline = StableDiffusionXLPipeline.from_single_file(str(file), config=str(config), local_files_only=True)
    ours = sdxl.load(file, config)
    for key, value in ours.unet.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[key].float(), value), key


def test_the_release_s_recipe_gives_the_release_s_bytes(first: tuple[Path, str], tmp_path: Path) -> None:
    from ambergrade.store import BUILTIN

    root, _ = first
    (record,) = (root / "mlruns" / "records" / "train").glob("*.json")
    trained = json.loads(record.read_text())["files"]["checkpoint"]
    models = tmp_path / "models"
    models.mkdir()
    shutil.copyfile(root / "mlruns" / "store" / "sha256" / trained[:2] / trained[2:], models / "one.safetensors")
    for number, alias in enumerate(("beta7", "anxl2", "anxl3")):
        shutil.copyfile(BUILTIN / f"{alias}.safetensors", models / f"renamed-{number}.safetensors")
    released = root / "mlruns" / "releases" / NAME
    out = tmp_path / "again.safetensors"
    line = [sys.executable, "-m", "ambergrade.door.command", "merge", str(released / "recipe.yaml")]
    done = subprocess.run([*line, "--models", str(models), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = released.glob("*.safetensors")
    assert out.read_bytes() == file.read_bytes()


def test_the_release_rebuilds_from_itself(first: tuple[Path, str], tmp_path: Path) -> None:
    released, out = first[0] / "mlruns" / "releases" / NAME, tmp_path / "again.safetensors"
    line = [sys.executable, "-m", "ambergrade.door.command", "merge", "recipe.yaml", "--models", "parents"]
    done = subprocess.run([*line, "--out", str(out)], cwd=released, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (released / f"{NAME}.safetensors").read_bytes()


def test_papers_follow_from_the_facts_and_numbers_from_the_sheets(first: tuple[Path, str], tmp_path: Path) -> None:
    from ambergrade.chain.numbers import unequal
    from ambergrade.release.facts import read_facts
    from ambergrade.release.papers import papers
    from ambergrade.score.sheet import ScoreSheet

    released = tmp_path / "release"
    shutil.copytree(first[0] / "mlruns" / "releases" / NAME, released)
    facts = read_facts(released)
    assert {name: (released / name).read_text() for name in papers(facts)} == papers(facts)
    assert unequal(facts.evaluation, released) == []
    assert facts.evaluation.scores["tag_prob"].keys() == facts.evaluation.sheets.keys()
    assert facts.evaluation.differences["tag_prob"].keys() == {*facts.evaluation.sheets} - {facts.evaluation.released}
    file = released / facts.evaluation.sheets["beta7"]
    sheet = ScoreSheet.read(file)
    sheet.columns["tag_prob"][0] += 0.01
    sheet.write(file)
    changed = unequal(facts.evaluation, released)
    assert {"scores.tag_prob.beta7", "differences.tag_prob.beta7"} <= {line.partition(":")[0] for line in changed}


def test_a_stranger_draws_with_diffusers_alone(first: tuple[Path, str]) -> None:
    released = first[0] / "mlruns" / "releases" / NAME
    (snippet,) = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)
    alone = "import sys; sys.modules['ambergrade'] = None\n" + snippet + "\nassert picture.size == (128, 128)\n"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", alone], cwd=released, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_named_point_of_its_sweep_is_released(first: tuple[Path, str]) -> None:
    from ambergrade.release.facts import read_facts

    root = first[0]
    (best,) = (root / "mlruns" / "sweeps").glob("*/best.json")
    told = subprocess.run(
        [
            *(
                sys.executable,
                "pipelines/release.py",
                f"root={root}",
                f"sweep={best.parent}",
                "point={a: 0.8, b: 0.25}",
            ),
            *("release.name=swept", "release.version=2", "release.dtype=bf16", "release.diffusers=true"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-4000:]
    released = root / "mlruns" / "releases" / "swept-2"
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=released).returncode == 0
    facts = read_facts(released)
    assert facts.recipe is not None
    assert (facts.recipe.coefficients, facts.recipe.dtype) == ({"a": 0.8, "b": 0.25}, "bf16")
    assert facts.license == "apache-2.0"
    assert {*facts.evaluation.sheets} == {"released: a 0.8, b 0.25", "beta7", "anxl3", "anxl2", "base7"}
    assert (released / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (released / "parents").exists()
    wrong = [sys.executable, "pipelines/release.py", f"root={root}", f"sweep={best.parent}", "release.version=3"]
    for more, says in (
        (["release.name=../x"], "cannot be part of a file name"),
        (["release.name=x", "point={c: 1}"], "point 'c' is not known"),
        (["release.name=x", "release.license=gpl"], "license 'gpl' is not known"),
        (["release.name=x", "origins.beta7.license=cc-by-nc-nd-4.0"], "nothing that is made of it"),
        (["release.name=x", "model=x.safetensors"], "not both"),
    ):
        done = subprocess.run([*wrong, *more], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert says in done.stderr
    assert not (root / "mlruns" / "releases" / "x-3").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_release(first: tuple[Path, str], tmp_path: Path) -> None:
    for after in (6, 11, 16, 22):
        process = subprocess.Popen(
            [*COMMAND, f"root={tmp_path}"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    gamma(tmp_path)
    assert manifest(tmp_path) == manifest(first[0])
    records = list((tmp_path / "mlruns" / "records").rglob("*.json"))
    assert all(json.loads(record.read_text())["identity"] == record.stem for record in records)
    assert not list((tmp_path / "mlruns" / "work").rglob("*.safetensors"))


def test_people_vote_on_a_release_and_on_its_sweep(first: tuple[Path, str], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from ambergrade.chain.vote import find_ballot
    from ambergrade.store import Ledger

    root = first[0]
    (best,) = (root / "mlruns" / "sweeps").glob("*/best.json")
    vote = [sys.executable, "-m", "ambergrade.door.command", "vote", "--root", str(root)]
    for subject, kind in ((str(root / "mlruns" / "releases" / NAME), "release"), (best.parent.name[:8], "chain")):
        page, result = tmp_path / f"{kind}.html", tmp_path / f"{kind}.json"
        subprocess.run([*vote, subject, "--out", str(page)], check=True, cwd=REPOSITORY)
        asked = json.loads(page.read_text().partition('id="asked">')[2].partition("</script>")[0])
        ballot = find_ballot(Ledger(root / "mlruns"), asked["ballot"])
        labels = list(ballot.contestants)
        assert len(asked["pairs"]) == len(ballot.pairs) == (4 if kind == "release" else 12)  # of 4 held-out prompts
        wins = ["left" if labels.index(pair.left) < labels.index(pair.right) else "right" for pair in ballot.pairs]
        answers = {"format": asked["format"], "ballot": asked["ballot"], "voter": "Kay", "answers": wins}
        result.write_text(json.dumps(answers))
        told = subprocess.run(
            [*vote, "--result", str(result)], check=True, cwd=REPOSITORY, capture_output=True, text=True
        )
        assert f"{labels[0]} over {labels[1]}: 4 to 0, 0 ties; 100% of the decided [40%, 100%]" in told.stdout
        client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
        experiment = client.get_experiment_by_name("gamma_smoke")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id], f"tags.\"ag.kind\" = '{kind}'")
        if kind == "release":
            assert labels == [NAME, "beta7"]
            assert run.data.metrics["preferred_over/beta7"] == 1
            assert run.data.metrics["preferred_over/beta7_lo"] == pytest.approx(0.3976, abs=1e-4)
        else:
            strengths = [run.data.metrics[f"vote_strength/{label.replace(',', '_')}"] for label in labels]
            assert strengths == sorted(strengths, reverse=True)
        assert run.info.status == "FINISHED"


def test_a_release_that_a_gate_refuses_ends_with_1_and_is_kept(first: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    root, release = first[0], manifest(first[0])
    left_out = [f"~gates.{gate}" for gate in ("better_than_base", "mosaic", "rating_leak")]  # of too few prompts
    more = [f"root={root}", "insist=true", *left_out, "+gate@gates.approval=approval"]
    more += ["+gate@gates.preferred=preferred", "gates.preferred.share=0.3"]

    def ended() -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *more], cwd=REPOSITORY, capture_output=True, text=True)

    refused = ended()
    assert refused.returncode == 1
    won = "preferred 1.000 [0.398, 1.000], n 4 decided, over base"
    assert "stays a candidate: 1 of 7 gates did not pass." in refused.stderr
    assert f"approval: {won}, is no clear win; set the tag approved_by" in refused.stderr
    assert f"{won}; > 0.3 is asked" in refused.stdout
    assert "Traceback" not in refused.stderr
    assert str(root / "mlruns" / "releases" / NAME) in refused.stdout  # all that was made is told, and there
    assert manifest(root) == release

    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    (version,) = client.search_model_versions("name = 'kohaku-xl-gamma-smoke'")
    client.set_model_version_tag(version.name, version.version, "approved_by", "a person")
    approved = ended()
    assert approved.returncode == 0, approved.stderr
    assert "version 1 is the champion now" in approved.stdout
    assert manifest(root) == release


# last: it runs another chain in the same root
def test_points_that_fail_are_told_and_left_out_and_a_race_may_decide(first: tuple[Path, str]) -> None:
    more = ["search.values.a=[0.4,0.8,1e9]", "search.values.b=[0.25,0.5]", "race=[2,4]", "release.version=raced"]
    told = gamma(first[0], *more)
    assert "2 of 6 points failed:" in told
    assert "rung 1, 2 prompts: 6 points drawn" in told
    (page,) = {line.split()[1] for line in told.splitlines() if line.startswith("review ")}
    assert "<h2>2 failed</h2>" in Path(page).read_text()
    (failures,) = (first[0] / "mlruns" / "sweeps").glob("*/failures.txt")
    assert failures.read_text().count("a 1e+09, b ") == 2
