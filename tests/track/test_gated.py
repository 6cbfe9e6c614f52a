"""Who is champion: decided by gates alone, on MLflow's real registry."""

import pytest

from ambergrade.track.database import MlflowClient
from ambergrade.track.journal import Journal

PASS, FAIL = {"floor": (True, "0.9"), "veto": (True, "no tag veto")}, {"floor": (False, "0.1")}
SHA = {number: f"{number:064x}" for number in range(1, 4)}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory, quick_database: None) -> Journal:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Journal.open(tmp_path_factory.mktemp("gated"), "gamma")


@pytest.fixture
def name(journal: Journal, request: pytest.FixtureRequest) -> str:
    """A registered model with three versions."""
    found = request.node.name.replace("_", "-")
    for number, digest in SHA.items():
        file = journal.root / f"{number}.safetensors"
        file.write_bytes(bytes([number]))
        with journal.run(f"{found} {number}", key=f"{found} {number}", kind="release") as run:
            run.model(f"m{number}", file, digest, registered_as=found, aliases=["candidate"])
    return found


def champion(journal: Journal, name: str) -> int | None:
    found = MlflowClient(journal.uri).get_registered_model(name).aliases.get("champion")
    return None if found is None else int(found)


def test_the_alias_moves_only_when_every_gate_passes(journal: Journal, name: str) -> None:
    client = MlflowClient(journal.uri)
    assert journal.gated(name, SHA[1], {**PASS, **FAIL}) == "there is no champion"
    assert champion(journal, name) is None
    assert client.get_model_version(name, "1").tags["gate.floor"] == "fail: 0.1"
    assert journal.gated(name, SHA[1], {}) == "there is no champion"  # without a gate nothing has been shown
    assert champion(journal, name) is None
    assert "gate.floor" not in client.get_model_version(name, "1").tags
    assert journal.rival(name, SHA[1]) is None
    assert journal.gated(name, SHA[1], PASS) == "version 1 is the champion now"
    assert journal.rival(name, SHA[1]) is None
    assert journal.gated(name, SHA[2], FAIL) == "version 1 stays the champion"
    assert journal.gated(name, SHA[2], PASS) == "version 2 is the champion now, before it was version 1"
    assert champion(journal, name) == 2
    tags = client.get_model_version(name, "2").tags
    assert (tags["gate.floor"], tags["gate.veto"]) == ("pass: 0.9", "pass: no tag veto")
    assert journal.champion(name).digest == SHA[2]
    assert journal.rival(name, SHA[3]).number == 2
    assert journal.rival(name, SHA[2]).number == 1  # the one it replaced
    assert journal.champion(name).path.read_bytes() == b"\2"


def test_said_twice_it_changes_nothing_and_an_older_version_never_takes_the_place(journal: Journal, name: str) -> None:
    for digest in (SHA[1], SHA[3]):
        journal.gated(name, digest, PASS)
    client = MlflowClient(journal.uri)
    before = client.get_model_version(name, "3").tags
    assert journal.gated(name, SHA[3], PASS) == "version 3 is the champion"
    assert client.get_model_version(name, "3").tags == before
    assert journal.gated(name, SHA[1], PASS) == journal.gated(name, SHA[2], PASS) == "version 3 stays the champion"
    assert champion(journal, name) == 3


def test_a_veto_hands_back_to_the_version_before_if_that_passed(journal: Journal, name: str) -> None:
    for digest in (SHA[1], SHA[2]):
        journal.gated(name, digest, PASS)
    vetoed = {**PASS, "veto": (False, "veto: six fingers")}
    assert journal.gated(name, SHA[2], vetoed) == "version 2 is the champion no more, version 1 is again"
    assert champion(journal, name) == 1
    assert journal.gated(name, SHA[1], vetoed) == "version 1 is the champion no more; there is none"
    assert champion(journal, name) is None


def test_a_candidate_that_is_not_registered_is_told(journal: Journal, name: str) -> None:
    assert journal.gated(name, "f" * 64, PASS) == "not registered, so no champion"
    assert journal.version(name, "f" * 64) is None


def test_what_people_wrote_on_a_version_is_kept_for_a_rebuild(journal: Journal, name: str) -> None:
    from ambergrade.track import lines

    MlflowClient(journal.uri).set_model_version_tag(name, "1", "veto", "hands")
    journal.gated(name, SHA[1], FAIL)
    last = lines.read(lines.folder(journal.root) / "registry.jsonl")[-1]
    assert (last["model"], last["digest"], last["tags"]) == (name, SHA[1], {"veto": "hands"})
    assert last["gates"] == {"floor": [False, "0.1"]}


def test_the_same_weights_entered_another_way_are_another_version_that_gates_judge(journal: Journal) -> None:
    client = MlflowClient(journal.uri)
    file = journal.root / "same.safetensors"
    file.write_bytes(b"same")

    def enter(key: str, **about: object) -> None:
        with journal.run(key, key=f"twice {key}", kind="release") as run:
            given = {"aliases": ["candidate"], "note": "1.0", "params": {"a": 0.8}, **about}
            run.model(str(given.pop("name", "m")), file, SHA[1], registered_as="twice", **given)

    for key in ("one", "again"):
        enter(key)
    assert [one.version for one in client.search_model_versions("name = 'twice'")] == [1]
    assert journal.gated("twice", SHA[1], PASS) == "version 1 is the champion now"
    ways = {"note": "1.1"}, {"name": "other"}, {"aliases": ["rel-2"]}, {"params": {"a": 0.7}}, {"tags": {"recipe": "x"}}
    for number, way in enumerate(ways, start=2):
        enter(f"way {number}", **way)
        assert len(client.search_model_versions("name = 'twice'")) == number
    assert not journal.troubles
    assert client.get_model_version("twice", "2").description == "1.1"
    assert client.get_model_version("twice", "1").description == "1.0"
    assert journal.version("twice", SHA[1]).number == 6
    assert journal.rival("twice", SHA[1]) is None  # never measured against its own weights
    assert journal.gated("twice", SHA[1], PASS) == "version 6 is the champion now, before it was version 1"
    assert journal.champion("twice").path.read_bytes() == b"same"
    assert journal.rival("twice", SHA[1]) is None
