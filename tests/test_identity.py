"""Digests and seeds are the same everywhere, and differ where the things differ."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambergrade.errors import AmbergradeError, UnknownName, nearest
from ambergrade.identity import canonical_json, digest, file_digest, random_seed


@dataclasses.dataclass(frozen=True)
class Size:
    width: int
    scale: float


def test_a_digest_is_sha256_of_the_canonical_text() -> None:
    value = {"b": (Size(3, 0.5), None), "a": Path("x/y"), "é": {"t", "s"}, "flag": True}
    text = '{"a":"x/y","b":[{"scale":0.5,"width":3},null],"flag":true,"é":["s","t"]}'
    assert canonical_json(value) == text
    assert digest(value) == hashlib.sha256(text.encode()).hexdigest()


scalars = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.booleans(), st.none()
)


@given(st.dictionaries(st.text(), scalars))
def test_the_order_of_keys_does_not_matter(values: dict[str, object]) -> None:
    backwards = dict(reversed(values.items()))
    assert digest(values) == digest(backwards)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(one: float, other: float) -> None:
    assert (digest(one) == digest(other)) == (repr(one) == repr(other))


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"loss": float("nan")})


def test_a_file_digest_is_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert file_digest(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_seeds_depend_on_seed_purpose_and_item_alone() -> None:
    seeds = [random_seed(s, p, i) for s in range(3) for p in ("noise", "crop") for i in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert random_seed(1, "noise", 2, "x") == random_seed(1, "noise", 2, "x") != random_seed(1, "noise", "x", 2)
    ones = sum(seed >> 62 for seed in seeds) / len(seeds)
    assert 0.45 < ones < 0.55  # the highest bit is a fair coin


def test_another_process_agrees() -> None:
    code = (
        "from ambergrade.identity import digest, random_seed;"
        "print(digest({'tags': {'b', 'a', 'c'}, 'x': 0.1}), random_seed(7, 'crop', 3))"
    )
    for hash_seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.split() == [digest({"tags": {"a", "b", "c"}, "x": 0.1}), str(random_seed(7, "crop", 3))]


def test_an_unknown_name_tells_the_nearest() -> None:
    error = UnknownName("Sampler", "eular", ["euler", "ddim", "dpmpp_2m"], "See conf/sampler.")
    assert isinstance(error, AmbergradeError)
    lines = str(error).splitlines()
    assert lines[0] == "Sampler 'eular' is not known."
    assert lines[1] == "Did you mean 'euler'?"
    assert lines[2:] == ["Known: ddim, dpmpp_2m, euler", "See conf/sampler."]
    assert "Did you mean" not in str(UnknownName("Sampler", "zzz", ["euler"]))
    assert nearest("beta8", [f"x{n}" for n in range(50)]) == []
    many = str(UnknownName("Tag", "qqq", [f"name{n:03}" for n in range(90)]))
    assert many.endswith("name023, …")
