"""`ambergrade vote` on folders of pictures: page, result, record, MLflow, and what gates see of it."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ambergrade.chain.vote import VOTE, find_ballot, votes_between
from ambergrade.door import command, vote
from ambergrade.errors import AmbergradeError, BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.score.vote_page import FORMAT
from ambergrade.score.votes import Preference
from ambergrade.store import Ledger

PROMPTS = 8
NASTY = "</script><b>1girl</b>"


def pictures(folder: Path, level: int) -> Path:
    """A folder of pictures, each of its own colour, with prompts beside them."""
    folder.mkdir(parents=True)
    rows = [{"id": f"p{k}", "text": f"{NASTY} {k}", "seed": k} for k in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k in range(PROMPTS):
        Image.fromarray(np.full((24, 24, 3), level + k, np.uint8)).save(folder / f"p{k}.png")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vote")
    for name, level in (("gamma", 10), ("beta", 90), ("delta", 170)):
        pictures(root / name, level)
    return root


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def asked(root: Path, names: Sequence[str], *more: str) -> str:
    """Make a page; returns the ballot's identity."""
    out = root / f"{'-'.join(names)}.html"
    line = [*(str(root / name) for name in names), "--root", str(root), "--out", str(out), *more]
    assert vote.main(line) == 0
    return str(json.loads(out.read_text().partition('id="asked">')[2].partition("</script>")[0])["ballot"])


def answered(root: Path, ballot: str, choose: Callable[[str, str], str], voter: str = "Kay", most: int = 99) -> Path:
    """A result file; `choose` gets the labels on the left and on the right, which the page does not tell."""
    pairs = find_ballot(Ledger(root / "mlruns"), ballot).pairs
    wanted = [choose(pair.left, pair.right) for pair in pairs[:most]]
    sides = [
        "tie" if not won else "left" if won == pair.left else "right" for pair, won in zip(pairs, wanted, strict=False)
    ]
    file = root / f"{voter}.json"
    file.write_text(json.dumps({"format": FORMAT, "ballot": ballot, "voter": voter, "answers": sides}))
    return file


def test_a_page_is_answered_counted_and_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ballot = asked(root, ["gamma", "beta"])
    assert asked(root, ["gamma", "beta"]) == ballot  # the same question is the same page
    page = (root / "gamma-beta.html").read_text()
    assert not any(name in page.partition('id="asked">')[2] for name in ("gamma", "beta"))  # blind
    result = answered(root, ballot, lambda one, other: "gamma")
    capsys.readouterr()
    assert command.main(["vote", "--result", str(result), "--root", str(root)]) == 0
    told = capsys.readouterr().out
    assert "gamma over beta: 8 to 0, 0 ties; 100% of the decided [63%, 100%], p 0.008" in told
    assert command.main(["vote", "--result", str(result), "--root", str(root)]) == 0  # twice is once
    assert "8 to 0, 0 ties" in capsys.readouterr().out
    assert len(list(Ledger(root / "mlruns").records(VOTE.kind))) == 1

    contestants = find_ballot(Ledger(root / "mlruns"), ballot).contestants
    ours, theirs = contestants["gamma"], contestants["beta"]
    assert votes_between(Ledger(root / "mlruns"), ours, theirs) == Preference(8, 0, 0)
    assert votes_between(Ledger(root / "mlruns"), theirs, ours) == Preference(0, 8, 0)
    assert votes_between(Ledger(root / "mlruns"), ours, "0" * 64) is None
    again = answered(root, ballot, lambda one, other: "beta", voter="Ada", most=3)
    assert command.main(["vote", "--result", str(again), "--root", str(root)]) == 0
    assert "gamma over beta: 5 to 0, 3 ties" in capsys.readouterr().out  # two people of two minds on three prompts
    assert votes_between(Ledger(root / "mlruns"), ours, theirs) == Preference(5, 0, 3)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("vote")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.\"ag.kind\" = 'vote'")
    shown = {run.data.tags["vote.by"]: run.data.metrics for run in runs}
    assert shown["Kay"]["preferred_over/beta"] == 1
    assert shown["Kay"]["preferred_over/beta_lo"] == pytest.approx(0.025 ** (1 / 8))
    assert shown["Ada"]["preferred_over/beta_n"] == 3


def test_three_are_ranked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ballot = asked(root, ["gamma", "beta", "delta"], "--question", "Which follows the prompt?")
    order = ["gamma", "beta", "delta"]
    result = answered(root, ballot, lambda *two: min(two, key=order.index), voter="rank")
    capsys.readouterr()
    assert command.main(["vote", "--result", str(result), "--root", str(root)]) == 0
    told = capsys.readouterr().out
    assert told.count(" over ") == 3
    ranked = [line.split()[0] for line in told.partition("Bradley")[2].splitlines()[1:]]
    assert ranked == order


def test_what_cannot_be_voted_on_is_told(root: Path, tmp_path: Path) -> None:
    gamma, beta = str(root / "gamma"), str(root / "beta")
    end = ["--root", str(root)]
    with pytest.raises(BadSetting, match="What is voted on"):
        vote.main(end)
    with pytest.raises(MissingObject):
        vote.main([str(tmp_path / "nowhere"), beta, *end])
    with pytest.raises(BadSetting, match="pairs is 0"):
        vote.main([gamma, beta, "--pairs", "0", *end])
    with pytest.raises(BadSetting, match="html"):
        vote.main([gamma, beta, "--out", str(tmp_path / "page.txt"), *end])
    other = tmp_path / "other"
    shutil.copytree(root / "beta", other)
    (other / "p3.png").unlink()
    with pytest.raises(BadInput, match="p3"):
        vote.main([gamma, str(other), *end])
    (other / "p3.png").write_bytes(b"no picture")
    with pytest.raises(BadInput):
        vote.main([gamma, str(other), *end])
    with pytest.raises(AmbergradeError, match="alone"):
        vote.main([gamma, "builtin://beta7.safetensors", *end])


@pytest.mark.parametrize(
    "change",
    [
        {"ballot": "0" * 64},
        {"ballot": "../../etc"},
        {"answers": ["left"] * 99},
        {"answers": ["up"]},
        {"more": "x" * 2**20},
    ],
)
def test_a_foreign_or_damaged_result_changes_nothing(root: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    ballot = asked(root, ["gamma", "delta"])
    records = len(list(Ledger(root / "mlruns").records(VOTE.kind)))
    file = tmp_path / "result.json"
    good = {"format": FORMAT, "ballot": ballot, "voter": "", "answers": ["left"]}
    file.write_text(json.dumps({**good, **change}))
    assert command.main(["vote", "--result", str(file), "--root", str(root)]) == 1
    assert len(list(Ledger(root / "mlruns").records(VOTE.kind))) == records


def test_the_served_page_brings_its_own_result(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = threading.Event()
    address: list[str] = []

    def voter() -> None:
        while not address:
            told = capsys.readouterr().out
            address.extend(word for word in told.split() if word.startswith("http://127.0.0.1:"))
            said.wait(0.05)
        host, _, path = address[0].removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("GET", f"/{path}")
        page = connection.getresponse().read().decode()
        ballot = json.loads(page.partition('id="asked">')[2].partition("</script>")[0])["ballot"]
        for sent in ({"ballot": "0" * 64}, {"ballot": ballot}):
            body = json.dumps({"format": FORMAT, "voter": "Bo", "answers": ["left", "tie"], **sent})
            connection.request("POST", f"/{path}result", body)
            statuses.append(connection.getresponse().read().decode())

    statuses: list[str] = []
    thread = threading.Thread(target=voter, daemon=True)
    thread.start()
    names = [str(root / name) for name in ("beta", "delta")]
    assert vote.main([*names, "--root", str(root), "--serve"]) == 0
    thread.join(30)
    assert statuses == ["These are not the answers to this page.", "Thank you. You may close this page."]
    assert "1 ties" in capsys.readouterr().out


def test_an_unknown_sweep_comes_back_with_the_nearest(root: Path) -> None:
    folder = root / "mlruns" / "sweeps" / "abcdef0123456789"
    folder.mkdir(parents=True)
    (folder / "best.json").write_text("{}")
    with pytest.raises(UnknownName, match="abcdef0123456789"):
        vote.main(["abcdef9", "--root", str(root)])
