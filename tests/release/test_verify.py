"""Releases as a stranger checks them: a whole one holds at every level, and whatever is changed is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from ambergrade.chain.verification import LEVELS, Asked, Finding, verify_release
from ambergrade.chain.versions import compare_releases
from ambergrade.door import command
from ambergrade.errors import BadSetting, UnknownName
from ambergrade.identity import file_digest
from ambergrade.release.facts import Draft, Scorer, read_facts
from ambergrade.release.papers import papers
from ambergrade.release.sums import MANIFEST, SUMS, Listed, read_manifest, sums_text, walk

EXIT = {level.name: level.code for level in LEVELS}
ALLOWED = {"ambergrade", "numpy", "llvmlite", "safetensors", "yaml", "_yaml", "tqdm"}
"""What a machine needs that checks a release but neither draws nor reads score sheets."""


@pytest.fixture
def release(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def first_wrong(folder: Path, **asked: object) -> Finding | None:
    """What the first level says that does not hold; the levels after it are not asked."""
    return next((found for found in verify_release(folder, Asked(**asked)) if found.wrong), None)  # type: ignore[arg-type]


def reseal(folder: Path) -> None:
    """Make the manifest and the sums again, as a forger would."""
    before = read_manifest(folder)
    files = {
        name: Listed(file_digest(folder / name), (folder / name).stat().st_size)
        for name, told in walk(folder)
        if name not in (MANIFEST, SUMS) and not told
    }
    (folder / MANIFEST).write_text(replace(before, files=files).text, "utf-8")
    digests = {name: one.sha256 for name, one in files.items()} | {MANIFEST: file_digest(folder / MANIFEST)}
    (folder / SUMS).write_text(sums_text(digests), "utf-8")


@contextmanager
def kept(folder: Path, *names: str) -> Iterator[None]:
    """Put these files, the manifest and the sums back in the end, whatever became of them."""
    before = {name: (folder / name).read_bytes() for name in (*names, MANIFEST, SUMS)}
    yield
    for name, data in before.items():
        (folder / name).write_bytes(data)


def test_a_whole_release_holds_at_every_level(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["verify", str(sound), "--rebuild"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sums", "headers", "papers", "scores", "inputs", "rebuild"]
    assert "none is missing or added" in lines[0]
    assert "the header's recipe is recipe.yaml" in lines[1]
    assert "numbers with their intervals follow from 2 score sheets" in lines[3]
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", SUMS], cwd=sound, check=True)


def test_no_level_but_scores_needs_more_than_five_packages(sound: Path) -> None:
    program = f"""
import sys, sysconfig
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {ALLOWED | {*sys.stdlib_module_names}!r} and "." not in name:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from ambergrade.door import files
sys.exit(files.main(["verify", sys.argv[1], "--rebuild", "--skip", "scores"]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(sound)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bytes are what the recipe gives" in done.stdout


def test_one_flipped_bit_in_any_file_is_caught(release: Path) -> None:
    names = [name for name, _ in walk(release)]
    assert len(names) > 20
    for name in names:
        with kept(release, name):
            data = bytearray((release / name).read_bytes())
            data[len(data) // 2] ^= 1
            (release / name).write_bytes(data)
            found = first_wrong(release)
            assert found is not None, name
            assert found.level.name == "sums", name
            assert any(name in line for line in found.wrong), (name, found.wrong)
            if name not in (MANIFEST, SUMS):  # a forger makes those anew
                reseal(release)
                found = first_wrong(release)
                assert found is not None, name
                assert found.level.name in ("headers", "papers"), name
                assert any(name in line for line in found.wrong), (name, found.wrong)
    assert first_wrong(release) is None


def test_every_file_that_is_renamed_or_missing_is_named(release: Path) -> None:
    for name in [name for name, _ in walk(release)]:
        moved = (release / name).rename(release / f"{name}.bak")
        found = first_wrong(release)
        assert found is not None, name
        assert any(name in line for line in found.wrong), (name, found.wrong)
        if name not in (MANIFEST, SUMS):
            assert any(f"{name}.bak is not listed" in line for line in found.wrong), (name, found.wrong)
        moved.rename(release / name)
    assert first_wrong(release) is None


ADDED: dict[str, Callable[[Path], object]] = {
    "extra.txt": lambda path: path.write_text("x"),
    "samples/extra.png": lambda path: path.write_text("x"),
    ".hidden": lambda path: path.write_text("x"),
    "empty": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "folder link": lambda path: path.symlink_to("/etc"),
    "pipe": lambda path: os.mkfifo(path),
    "line\nbreak": lambda path: path.write_text("x"),
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("sums_redone", [False, True])
def test_whatever_is_added_is_named(release: Path, name: str, sums_redone: bool) -> None:
    ADDED[name](release / name)
    if sums_redone:
        reseal(release)
    found = first_wrong(release)
    assert found is not None
    assert any(name.partition("\n")[0] in line for line in found.wrong), found.wrong


def test_what_a_hostile_manifest_names_cannot_reach_the_terminal(release: Path) -> None:
    manifest = read_manifest(release)
    odd = {"\x1b[2Jgone.txt": Listed("ab" * 32, 1), "x" * 5000: Listed("ab" * 32, 1)}
    (release / MANIFEST).write_text(replace(manifest, files={**manifest.files, **odd}).text, "utf-8")
    found = first_wrong(release)
    assert found is not None
    assert any("\\x1b[2Jgone.txt is missing" in line for line in found.wrong)
    assert all(line.isprintable() and len(line) < 700 for line in found.wrong)


def test_a_file_that_became_a_link_is_named(release: Path, tmp_path: Path) -> None:
    (release / "contact_sheet.png").rename(tmp_path / "elsewhere.png")
    (release / "contact_sheet.png").symlink_to(tmp_path / "elsewhere.png")
    found = first_wrong(release)
    assert found is not None
    assert "contact_sheet.png is a link" in found.wrong


def test_one_changed_number_in_any_text_is_caught_with_its_file_though_sums_are_redone(release: Path) -> None:
    texts = [name for name, _ in walk(release) if name.endswith((".md", ".json", ".jsonl", ".html", ".yaml", ".txt"))]
    for name in set(texts) - {MANIFEST}:
        with kept(release, name):
            text = (release / name).read_text("utf-8")
            place = next((k for k in range(len(text) // 2, len(text)) if text[k].isdecimal()), None)
            if place is None:  # a config without a number
                continue
            changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
            (release / name).write_text(changed, "utf-8")
            reseal(release)
            found = first_wrong(release)
            assert found is not None, name
            assert any(name in line for line in found.wrong), (name, found.wrong)


def test_a_changed_number_of_the_card_is_shown_beside_the_true_one(release: Path) -> None:
    card = (release / "README.md").read_text("utf-8")
    score = f"{read_facts(release).evaluation.scores['mosaic']['gamma'].value:.3f}"
    assert score in card
    (release / "README.md").write_text(card.replace(score, "0.001"), "utf-8")
    reseal(release)
    found = first_wrong(release)
    assert found is not None
    assert found.level.name == "papers"
    (line,) = found.wrong
    assert line.startswith("README.md, line")
    assert "0.001" in line
    assert score in line


def test_a_number_is_named_by_its_keys_where_facts_and_papers_were_forged_together(release: Path) -> None:
    values = json.loads((release / "release.json").read_text("utf-8"))
    values["evaluation"]["scores"]["mosaic"]["gamma"]["value"] /= 2
    (release / "release.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, text in papers(read_facts(release)).items():
        (release / name).write_text(text, "utf-8")
    reseal(release)
    found = first_wrong(release)
    assert found is not None
    assert found.level.name == "scores"
    assert any("scores.mosaic.gamma" in line for line in found.wrong)


def test_a_changed_score_sheet_is_caught_though_sums_and_facts_are_redone(release: Path) -> None:
    file = release / "scores" / "released.parquet"
    table = pq.read_table(file)
    place = table.column_names.index("mosaic")
    table = table.set_column(place, "mosaic", pc.add(table.column("mosaic"), pa.scalar(1e-3)))
    pq.write_table(table, file, compression="zstd")
    reseal(release)
    found = first_wrong(release)
    assert found is not None
    assert "scores/released.parquet is not the file that release.json names" in found.wrong
    values = json.loads((release / "release.json").read_text("utf-8"))
    values["files"]["scores/released.parquet"] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
    (release / "release.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, text in papers(read_facts(release)).items():
        (release / name).write_text(text, "utf-8")
    reseal(release)
    found = first_wrong(release)
    assert found is not None
    assert found.level.name == "scores"


def test_other_weights_below_the_same_header_are_told_in_ulp_by_a_rebuild(release: Path) -> None:
    file = release / "gamma-rev1.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1  # of the last number, float16
    file.write_bytes(data)
    levels = {found.level.name: found for found in verify_release(release, Asked(rebuild=True))}
    assert levels["headers"].wrong
    assert levels["rebuild"].told.startswith("not tried")
    skipped = Asked(rebuild=True, skip=("sums", "headers", "papers"))
    rebuilt = {found.level.name: found for found in verify_release(release, skipped)}["rebuild"]
    assert rebuilt.wrong[1] == "  w: 1 numbers, at most 1 ulp"


def test_exit_codes_are_those_of_the_first_level_that_does_not_hold(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (release / "parents" / "beta7.safetensors").unlink()
    assert command.main(["verify", str(release)]) == EXIT["sums"]
    reseal(release)
    assert command.main(["verify", str(release)]) == EXIT["headers"]
    assert command.main(["verify", str(release), "--skip", "headers"]) == EXIT["papers"]
    assert command.main(["verify", str(release), "--skip", "headers", "--skip", "papers"]) == EXIT["inputs"]
    assert "beta7: sha256" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["verify", "--help"])
    told = capsys.readouterr().out
    assert all(str(level.code) in told and level.name in told for level in LEVELS)


def test_mistakes_are_told_in_a_few_lines(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, told in [
        ([str(tmp_path)], "is no release"),
        ([str(tmp_path / "nowhere")], "Nothing at"),
        ([str(sound), "--skip", "sum"], "Did you mean 'sums'"),
        ([str(sound), *(word for name in EXIT for word in ("--skip", name))], "nothing would be checked"),
        ([str(sound), "--key", "x"], "Give both"),
        ([str(sound / "gamma-rev1.safetensors")], "--models DIR"),
    ]:
        assert command.main(["verify", *line]) == 1
        assert told in capsys.readouterr().err
    with pytest.raises(UnknownName):
        Asked(skip=("rebuilt",))
    with pytest.raises(BadSetting):
        Asked(signature=Path("x"))


def test_parents_that_were_saved_anew_are_equal_by_their_weights(release: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for number, path in enumerate(sorted((release / "parents").iterdir())):
        save_file(load_file(path), models / f"{number}.safetensors", metadata={"saved": "anew"})
    found = {one.level.name: one for one in verify_release(release, Asked(models=models, rebuild=True))}
    assert "equal weights" in found["inputs"].told
    assert not found["inputs"].wrong
    assert not found["rebuild"].wrong, found["rebuild"].wrong


ENVIRONMENTS = [
    {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "USER": "x", "HOME": "/nonexistent"},
    {"ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "NPY_DISABLE_CPU_FEATURES": "X86_V3", "PYTHONUTF8": "0"},
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_release_is_rebuilt_to_the_bit_by_anybody(
    sound: Path, tmp_path: Path, environment: dict[str, str], threads: int
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "another name"))
    verify = f"{sys.executable} -m ambergrade.door.command verify --rebuild --threads {threads} --skip scores"
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", "-c", f"umask 077; exec {verify} '{folder}'"],
        cwd="/",
        env={**os.environ, **cache, **environment},
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert b"bytes are what the recipe gives" in done.stdout


def test_a_signature_is_checked_or_the_package_is_named(sound: Path, tmp_path: Path) -> None:
    for name in ("model.sig", "key.pem"):
        (tmp_path / name).write_text("x")
    found = first_wrong(sound, signature=tmp_path / "model.sig", key=tmp_path / "key.pem")
    assert found is not None
    assert found.level.name == "signature"
    try:
        import model_signing  # noqa: F401
    except ImportError:
        assert "model-signing" in " ".join(found.wrong)
    else:
        assert "no signature of this folder" in " ".join(found.wrong)


def test_a_release_that_is_signed_holds_and_another_key_does_not(release: Path, tmp_path: Path) -> None:
    signing = pytest.importorskip("model_signing.signing")
    for name in ("mine", "other"):
        private = tmp_path / f"{name}.key"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
        subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", tmp_path / f"{name}.pub"], check=True)
    signature = tmp_path / "model.sig"
    signing.Config().use_elliptic_key_signer(private_key=tmp_path / "mine.key").sign(release, signature)
    assert first_wrong(release, signature=signature, key=tmp_path / "mine.pub") is None
    found = first_wrong(release, signature=signature, key=tmp_path / "other.pub")
    assert found is not None
    assert found.level.name == "signature"
    (release / "README.md").write_text("forged")
    reseal(release)
    found = first_wrong(release, signature=signature, key=tmp_path / "mine.pub", skip=("papers",))
    assert found is not None
    assert found.level.name == "signature"


def test_two_releases_are_compared_line_by_line(release: Path, draft: Draft, tmp_path: Path) -> None:
    told = compare_releases(release, release, tmp_path / "side.png").splitlines()
    assert told[:2] == ["A  gamma rev1", "B  gamma rev1"]
    assert any(line.startswith("formula") and "A B" in line for line in told)
    (row,) = [line for line in told if line.startswith("mosaic ↓")]
    assert "+0.000 [+0.000, +0.000]" in row
    assert (tmp_path / "side.png").stat().st_size > 1000


def test_releases_of_other_prompts_are_not_paired(
    sound: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = release / "scores" / "released.parquet"
    table = pq.read_table(file)
    header = json.loads(table.schema.metadata[b"ambergrade.score_sheet"])
    header["prompts_digest"] = "ab" * 32
    pq.write_table(table.replace_schema_metadata({b"ambergrade.score_sheet": json.dumps(header)}), file)
    assert command.main(["compare", str(sound), str(release)]) == 0
    told = capsys.readouterr().out
    assert "Not paired" in told
    assert "prompts: equal ids, but other text" in told


def test_a_rescore_of_what_no_library_loads_is_told_and_not_raised(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_facts(sound)
    scorers = {"clip_score": Scorer("x", settings={"model": 5, "device": "cuda"})}
    forged = replace(facts, evaluation=replace(facts.evaluation, scorers=scorers))
    monkeypatch.setattr("ambergrade.chain.verification.read_facts", lambda folder: forged)
    asked = Asked(rescore=True, skip=("headers", "papers", "scores"))
    *_, found = verify_release(sound, asked)
    assert found.level.name == "rescore"
    assert "cannot be loaded" in found.wrong[0]
