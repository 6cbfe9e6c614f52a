"""Secrets are masked in all that goes to MLflow: judged by searching every byte that it keeps."""

import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ambergrade.track.journal import Journal
from ambergrade.track.secrets import Secrets, environment_keys, is_secret

pytestmark = pytest.mark.usefixtures("quick_database")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hub.token", "hf_abc"),
        ("HF_TOKEN", "x"),
        ("db.password", 1234),
        ("dbPasswd", "x"),
        ("api_key", "x"),
        ("apiKey", "x"),
        ("openai-api-key", "x"),
        ("aws.secret_access_key", "x"),
        ("credentials", "x"),
        ("key", "x"),
        ("client.secrets", "x"),
    ],
)
def test_a_name_that_looks_like_a_secret_is_one(name: str, value: object) -> None:
    assert is_secret(name, value)
    assert Secrets().value(name, value) == "***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("monkey", "x"),
        ("keyboard", "x"),
        ("tokenizer", "clip"),
        ("max_token_length", 225),
        ("tokens", "225"),
        ("key_scale", 0.5),
        ("password", None),
        ("keyed", True),
        ("turkey", "x"),
    ],
)
def test_other_settings_stay(name: str, value: object) -> None:
    assert not is_secret(name, value)
    assert Secrets().value(name, value) == value


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://kay:hunter2@db:5432/x", "postgresql://kay:***@db:5432/x"),
        ("at http://:pw@h/ and s3://a:b/c@d@e", "at http://:***@h/ and s3://a:b/c@d@e"),
        ("http://host:5000/#/experiments/1?viewStateShareKey=sweep-1", None),
        ("https://h/x?api_key=abc&n=2", "https://h/x?api_key=***&n=2"),
        ("Could not override 'hub.token=abc'", "Could not override 'hub.token=***'"),
        ("tokens=225, monkey=see", None),
        ("postgresql://kay@db/x", None),
        ("\ud800", "?"),
    ],
)
def test_passwords_in_addresses_and_assignments_are_masked_in_text(text: str, masked: str | None) -> None:
    assert Secrets().text(text) == (masked or text)


def test_what_came_from_the_environment_is_known_by_the_unresolved_settings(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STORE", "s3-bucket-of-kay")
    monkeypatch.setenv("ROOT", str(tmp_path))
    cfg = OmegaConf.create(
        {
            "store": "${oc.env:STORE}",
            "also": "at ${store}",
            "root": "${oc.env:ROOT}",
            "a": 1,
            "b": ["x", "${oc.env:NO,n}"],
        }
    )
    keys = environment_keys(OmegaConf.to_container(cfg, resolve=False))
    assert keys == {"store", "also", "root", "b.1"}
    settings = OmegaConf.to_container(cfg, resolve=True)
    secrets = Secrets.of(settings, keys)
    assert secrets.settings(settings) == {
        "store": "***",
        "also": "***",
        "root": str(tmp_path),
        "a": 1,
        "b": ["x", "***"],
    }
    assert secrets.overrides(["store=elsewhere", "+a=2", "x={token: abc, n: 1}", "~hub.token=abc", "a.b=1,2"]) == [
        "store=***",
        "+a=2",
        "x={token: ***, n: 1}",
        "~hub.token=***",
        "a.b=1,2",
    ]
    assert secrets.text("no such bucket: s3-bucket-of-kay") == "no such bucket: ***"
    assert pickle.loads(pickle.dumps(secrets)) == secrets
    assert "bucket" not in repr(secrets)


def test_nothing_that_mlflow_keeps_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    settings = {
        "hub": {"token": "hf_swordfish"},
        "db": "mysql://kay:swordfish@h/x",
        "from_env": "swordfish-env",
        "a": 0.8,
    }
    journal = Journal.open(tmp_path, "gamma", "at http://u:swordfish@h", Secrets.of(settings, ["from_env"]))
    (tmp_path / "m.safetensors").write_bytes(b"w")
    named = {"params": {"hub.token": "hf_swordfish", "a": 0.8}, "tags": {"my_key": "swordfish"}}

    def work() -> None:
        with journal.run("about hf_swordfish", key="k", kind="chain", **named) as run:
            ids.append(run.id)
            run.provenance(settings, ["hub.token=hf_swordfish", "db=mysql://kay:swordfish@h/x", "a=0.8"])
            run.tags({"password": "swordfish", "url": "ftp://a:swordfish@b"})
            run.params({"from_env": "swordfish-env", "words": "x swordfish-env y" * 1000})
            run.note("sent to https://kay:swordfish@h")
            about = {"registered_as": "m", "note": "hf_swordfish", "tags": {"token": "swordfish"}}
            run.model("m", tmp_path / "m.safetensors", "1" * 64, **about)
            raise ValueError("cannot open mysql://kay:swordfish@h/x with hf_swordfish")

    ids: list[str] = []
    with pytest.raises(ValueError, match="swordfish"):
        work()
    assert not journal.troubles
    assert journal.client is not None
    found = journal.client.get_run(ids[0])
    assert found.data.params["a"] == "0.8"
    assert found.data.params["hub.token"] == "***"
    assert found.data.tags["ag.reason"] == "ValueError: cannot open mysql://kay:***@h/x with ***"
    (tmp_path / "mlruns" / "mlflow.db-wal").stat()  # is searched too
    for file in (tmp_path / "mlruns").rglob("*"):
        assert not file.is_file() or b"swordfish" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://ghp_abc@github.example/x", "https://***@github.example/x"),
        ("password: hunter22", "password: ***"),
        ("run --password hunter22", "run --password ***"),
        ("Authorization: Bearer abc123", "Authorization: Bearer ***"),
        ("the password was wrong", "the password was wrong"),
    ],
)
def test_secrets_in_the_words_of_an_error_are_masked(text: str, masked: str) -> None:
    assert Secrets().text(text) == masked


@pytest.mark.parametrize("name", ["sshkey", "hub.pass", "hub.auth", "bearer", "passphrase"])
def test_more_names_of_secrets(name: str) -> None:
    assert is_secret(name, "abc")
