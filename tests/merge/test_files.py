"""Recipe files through the engine: the same bytes however it is run, exact, rebuilt from the header, refusals."""

import fcntl
import json
import os
import random
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ambergrade.door import files as command
from ambergrade.errors import AmbergradeError, BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.family import digests, sdxl
from ambergrade.merge import batches, engine, reading, writing
from ambergrade.merge.comparing import Differing
from ambergrade.merge.engine import merge
from ambergrade.merge.files import read_recipe, verify
from ambergrade.merge.formula import Formula
from ambergrade.merge.header import ITEM, read_header
from ambergrade.merge.inputs import Digests
from ambergrade.merge.job import open_job
from ambergrade.merge.resident import ResidentMerge
from ambergrade.store import BUILTIN

CARD = "gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
MBW = '"0,0.1,0.1,0,0.1,0.1,0,0.1,0.1,0,0,0,0,0,0.05,0.05,0.05,0.05,0.05,0.05", dialect="supermerger"'
ALIASES = ("beta7", "anxl3", "anxl2", "base7")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four related files of no known family, one of each float dtype; adversarial values among them."""
    folder = tmp_path_factory.mktemp("plain")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40_000, generator=generator) * torch.logspace(-6, 1, 40_000)
    base[:64] = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 1.0, -1.0, 2048.5, 0.1]).repeat(8)
    made = {}
    dtypes = {"beta7": torch.float16, "anxl3": torch.bfloat16, "anxl2": torch.float32, "base7": torch.float16}
    for alias, dtype in dtypes.items():
        near = base + 1e-3 * torch.randn(len(base), generator=generator) * base.abs()
        tensors = {"model.w": near.reshape(200, 200).to(dtype), "model.b": near[:77].clone().to(dtype)}
        save_file(tensors, folder / f"{alias}.safetensors")
        made[alias] = folder / f"{alias}.safetensors"
    return made


def merged(paths: dict[str, Path], out: Path, formula: str = CARD, **how: object) -> Path:
    job = open_job(Formula.parse(formula, paths), paths, coefficients={})
    merge(job, out, **how)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def once(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merged(plain, tmp_path_factory.mktemp("once") / "out.safetensors", threads=1)


@pytest.mark.parametrize("how", [{"threads": 8}, {"batch": 1000}, {"batch": 77_777, "threads": 3}])
def test_threads_and_batches_change_no_byte(plain: dict[str, Path], once: Path, tmp_path: Path, how: dict) -> None:
    assert merged(plain, tmp_path / "out.safetensors", **how).read_bytes() == once.read_bytes()


@pytest.mark.parametrize(("digests", "cached"), [(False, False), (True, False), (False, True)])
def test_going_past_the_page_cache_changes_no_byte(
    plain: dict[str, Path], once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: bool, cached: bool
) -> None:
    """As with inputs that memory cannot hold; stretches begin and end anywhere in a page, and at the file's end."""
    try:
        os.close(os.open(once, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system cannot go past the page cache")
    filled: list[int] = []
    direct: list[int] = []
    past_cache, write = reading._FileReader.past_cache, writing._write

    def counted(self: reading._FileReader, *where: Any) -> int:
        filled.append(past_cache(self, *where))
        return filled[-1]

    def seen(descriptor: int, data: memoryview, offset: int) -> None:
        direct.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and len(data))
        write(descriptor, data, offset)

    monkeypatch.setattr(reading._FileReader, "past_cache", counted)
    monkeypatch.setattr(writing, "_write", seen)
    for module in (reading, writing):
        monkeypatch.setattr(module, "DIRECT_LEAST", 1)
    monkeypatch.setattr(reading, "_memory", lambda: 0)
    cache = Digests(tmp_path / "sha256.json")
    for path in plain.values():
        if digests:
            cache.of_file(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached:
                file.read()
    job = open_job(Formula.parse(CARD, plain), plain)
    report = merge(job, tmp_path / "out.safetensors", batch=50_000, threads=2, digests=cache)
    assert (tmp_path / "out.safetensors").read_bytes() == once.read_bytes()
    assert sum(direct) > 0.5 * once.stat().st_size
    assert (sum(filled) > 0) != cached
    if not digests:
        inputs = sum(path.stat().st_size for path in plain.values())
        assert inputs <= report.bytes_read < inputs + batches.PAGE * len(plain)  # one page holds header and weights


def test_the_order_in_which_inputs_are_given_changes_no_byte(
    plain: dict[str, Path], once: Path, tmp_path: Path
) -> None:
    shuffled = dict(sorted(plain.items(), reverse=True))
    assert merged(shuffled, tmp_path / "out.safetensors").read_bytes() == once.read_bytes()


@pytest.mark.parametrize("environment", [{"PYTHONHASHSEED": "7"}, {"ATEN_CPU_CAPABILITY": "default"}])
def test_another_process_and_another_processor_write_the_same(
    plain: dict[str, Path], once: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    files = {alias: str(path) for alias, path in plain.items()}
    recipe.write_text(json.dumps({"formula": CARD, "models": files, "out": "out.safetensors"}))
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    line = [sys.executable, "-m", "ambergrade.door.files", "merge", str(recipe)]
    subprocess.run(line, env={**os.environ, **environment, **cache}, check=True, capture_output=True)
    assert (tmp_path / "out.safetensors").read_bytes() == once.read_bytes()


def test_every_element_is_the_exact_value_rounded_once(plain: dict[str, Path], once: Path) -> None:
    """Against fractions: the nearest fp16, and of two equally near the even one."""
    inputs = {alias: load_file(path) for alias, path in plain.items()}
    found = load_file(once)["model.w"].reshape(-1)
    assert found.dtype == torch.float16
    values = {alias: tensors["model.w"].reshape(-1).double().tolist() for alias, tensors in inputs.items()}
    wrong = 0
    for place in [*range(256), *range(256, 40_000, 13)]:
        x = {alias: Fraction(values[alias][place]) for alias in ALIASES}
        exact = x["beta7"] + Fraction(4, 5) * (x["anxl3"] - x["anxl2"]) + Fraction(1, 2) * (x["base7"] - x["beta7"])
        wrong += found[place].item() != _rounded(exact)
    assert wrong == 0


def _rounded(exact: Fraction) -> float:
    """The nearest fp16, ties to even, from the two candidates around a float64 guess."""
    guess = np.float16(float(exact))
    near = [guess, np.nextafter(guess, np.float16(np.inf)), np.nextafter(guess, np.float16(-np.inf))]
    return float(min(near, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint16)) & 1)))


@pytest.mark.parametrize("formula", ["beta7", "0.3 * beta7 + 0.7 * beta7", "beta7 + 0 * (anxl3 - anxl2)"])
def test_a_model_with_itself_gives_its_own_bits(plain: dict[str, Path], tmp_path: Path, formula: str) -> None:
    found = load_file(merged(plain, tmp_path / "out.safetensors", formula))
    for name, tensor in load_file(plain["beta7"]).items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_the_file_holds_what_the_live_merge_gives_and_stock_diffusers_loads_it(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    paths = {alias: BUILTIN / f"{alias}.safetensors" for alias in ("beta7", "anxl2", "anxl3")}
    text = f"tuned = beta7 + a * (anxl3 - anxl2)\nout = mbw(tuned, anxl3, {MBW})"
    formula = Formula.parse(text, paths)
    merge(open_job(formula, paths, coefficients={"a": 0.7}), tmp_path / "out.safetensors")
    inputs = {alias: sdxl.read_checkpoint(path) for alias, path in paths.items()}
    live, written = ResidentMerge(formula, inputs).at({"a": 0.7}), load_file(tmp_path / "out.safetensors")
    assert live.keys() == written.keys()
    assert all(torch.equal(live[name], written[name]) for name in live)
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(BUILTIN / "sdxl_tiny"), local_files_only=True
    )
    ours = sdxl.load(tmp_path / "out.safetensors", BUILTIN / "sdxl_tiny").unet.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in pipe.unet.float().state_dict().items())


def test_a_merge_is_rebuilt_from_its_own_header_under_any_names(plain: dict[str, Path], tmp_path: Path) -> None:
    out = merged(plain, tmp_path / "out.safetensors")
    renamed = tmp_path / "inputs"
    renamed.mkdir()
    for number, path in enumerate(plain.values()):
        (renamed / f"{number}.safetensors").write_bytes(path.read_bytes())
    found = verify(out, renamed, cache=tmp_path / "sha256.json")
    assert found.same
    assert found.bytes_compared == out.stat().st_size

    data = bytearray(out.read_bytes())
    place = read_header(out).entries["model.w"].start + 12
    data[place] ^= 1
    out.write_bytes(data)
    spoilt = verify(out, renamed, cache=tmp_path / "sha256.json")
    assert not spoilt.same
    assert f"{place:,}" in spoilt.first_difference
    assert "model.w" in spoilt.first_difference
    assert spoilt.differing == (Differing("model.w", 1, 1),)

    (renamed / "2.safetensors").unlink()
    with pytest.raises(MissingObject, match=r"anxl2: sha256 [0-9a-f]{64}"):
        verify(out, renamed, cache=tmp_path / "sha256.json")


@pytest.mark.parametrize("batch", [1000, 1 << 20])
def test_a_file_of_other_values_is_told_tensor_by_tensor_in_ulp(
    plain: dict[str, Path], once: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, header = load_file(once), read_header(once)
    flat, steps = tensors["model.w"].reshape(-1), [1, -3, 40]
    flat.view(torch.int16)[[5, 700, 39_999]] += torch.tensor(steps, dtype=torch.int16)
    tensors["model.b"][9] = -tensors["model.b"][9]
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, metadata={**header.metadata, "note": "another header, so that all bytes lie elsewhere"})
    monkeypatch.setattr(engine.run, "__kwdefaults__", {**engine.run.__kwdefaults__, "batch": batch})
    found = verify(other, plain["beta7"].parent, threads=2, cache=tmp_path / "cache.json")
    assert not found.same
    apart = {one.tensor: (one.numbers, one.ulp) for one in found.differing}
    bits = int(load_file(once)["model.b"].view(torch.int16)[9]) & 0x7FFF
    assert apart == {"model.w": (3, 40), "model.b": (1, 2 * bits + 1)}


def test_the_header_tells_where_it_came_from_and_of_no_machine(once: Path, plain: dict[str, Path]) -> None:
    header = read_header(once)
    models = json.loads(header.metadata["sd_merge_models"])
    assert {about["name"] for about in models.values()} == set(ALIASES)
    assert set(models) == {Digests().of_file(path) for path in plain.values()}
    assert str(once.parent.parent) not in str(header.metadata)
    assert read_header_length(once) % 8 == 0
    assert all(entry.start % ITEM[entry.dtype] == 0 for entry in header.entries.values())


def test_each_input_is_read_once(plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the merge and for both of its digests."""

    def read_again(path: Path) -> str:
        raise AssertionError(f"{path} is read a second time for its weights' digest")

    monkeypatch.setattr(digests, "weights_sha256", read_again)
    job = open_job(Formula.parse(CARD, plain), plain, coefficients={})
    report = merge(job, tmp_path / "out.safetensors")
    data = sum(path.stat().st_size - read_header_length(path) for path in plain.values())
    assert data <= report.bytes_read <= sum(path.stat().st_size for path in plain.values())


def read_header_length(path: Path) -> int:
    return int(struct.unpack("<Q", path.read_bytes()[:8])[0]) + 8


def recipe(folder: Path, **changed: object) -> Path:
    values = {"formula": "beta7 + a * (anxl3 - anxl2)", "coefficients": {"a": 0.5}, "out": "out.safetensors"}
    values["models"] = {alias: f"builtin://{alias}.safetensors" for alias in ("beta7", "anxl2", "anxl3")}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**values, **changed}))
    return file


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"formla": "x"}, UnknownName, "formula"),
        ({"formula": "beta7 + a * anxl3"}, BadSetting, "sum to"),
        ({"formula": "beta8 + a * (anxl3 - anxl2)"}, BadSetting, "beta7"),
        ({"formula": "__import__('os')"}, BadSetting, "Expected"),
        ({"formula": "(" * 10_000 + "beta7" + ")" * 10_000}, BadSetting, "50 levels"),
        ({"coefficients": {"a": "much"}}, BadSetting, "number"),
        ({"models": {"beta7": "nowhere.safetensors"}}, AmbergradeError, "anxl3"),
        ({"policies": {"vea": "base"}}, UnknownName, "vae"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told(tmp_path: Path, changed: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_recipe(recipe(tmp_path, **changed)).job()
    assert list(tmp_path.glob("*.safetensors")) == []


def test_the_command_merges_verifies_and_tells_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = recipe(tmp_path)
    assert command.main(["merge", str(file), "--dry-run"]) == 0
    assert not (tmp_path / "out.safetensors").exists()
    assert "bytes of 3 inputs" in capsys.readouterr().out
    assert command.main(["merge", str(file), "a=0.25"]) == 0
    assert command.main(["verify", str(tmp_path / "out.safetensors"), "--models", str(BUILTIN)]) == 0
    assert "verified" in capsys.readouterr().out
    assert command.main(["merge", str(file), "a=lots"]) == 1
    assert command.main(["merge", str(tmp_path / "none.yaml")]) == 1
    assert "No recipe" in capsys.readouterr().err


def test_outputs_replace_only_models_and_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe is a stranger's text: its `out` may not reach for what is ours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "recipes"
    (folder / "folder.safetensors").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / "thesis.safetensors").write_text("precious")
    (folder / "link.safetensors").symlink_to(folder / "precious.txt")
    (folder / "mine.safetensors").write_bytes((BUILTIN / "beta7.safetensors").read_bytes())
    os.mkfifo(folder / "pipe.safetensors")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    mine = {"models": {"beta7": "mine.safetensors", **{a: f"builtin://{a}.safetensors" for a in ("anxl2", "anxl3")}}}
    odd = ("precious.txt", "thesis.safetensors", "link.safetensors", "folder.safetensors", "pipe.safetensors")
    for out in (*odd, "mine.safetensors", "recipe.yaml", "../x", "/dev/null", "x" * 300 + ".safetensors"):
        file = recipe(folder, out=out, overwrite=True, **mine)
        for line in ([str(file)], [str(file), "--out", str(folder / out)]):
            assert command.main(["merge", *line]) == 1, out
            told = capsys.readouterr().err
            assert 0 < len(told.splitlines()) <= 6, out
            assert "Traceback" not in told
    for name, data in before.items():
        assert (folder / name).read_bytes() == data
    assert not (tmp_path / "x").exists()

    file = recipe(folder)  # a model that was merged before
    assert command.main(["merge", str(file)]) == 0
    first = (folder / "out.safetensors").read_bytes()
    assert command.main(["merge", str(file), "a=0.25"]) == 1
    assert (folder / "out.safetensors").read_bytes() == first
    assert command.main(["merge", str(file), "a=0.25", "--overwrite"]) == 0
    assert (folder / "out.safetensors").read_bytes() != first
    assert command.main(["merge", str(recipe(folder, overwrite=True))]) == 0
    assert (folder / "out.safetensors").read_bytes() == first
    with pytest.raises(BadSetting, match="overwrite is true or false"):
        read_recipe(recipe(folder, overwrite="yes"))


def test_mistakes_on_the_command_line_are_told_in_a_few_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, long = str(recipe(tmp_path)), "x" * 300
    for line in (["--threads", "-3"], ["--threads", "0"], ["--threads", "1.5"], ["--threads", "9" * 400]):
        with pytest.raises(SystemExit):
            command.main(["merge", file, *line])
        assert "is no count" in capsys.readouterr().err
    for line in (
        ["merge", long],
        ["merge", file, "--out", f"{long}/{long}.safetensors"],
        ["merge", file, f"a={'9' * 400}"],
        ["merge", file, "a=nan"],
        ["merge", file, "a=0.1", "a=0.2"],
        ["merge", file, "\ud800=0.1"],
        ["verify", long, "--models", str(tmp_path)],
        ["verify", str(BUILTIN / "beta7.safetensors"), "--models", long],
        ["digest", long],
    ):
        assert command.main(line) == 1, line
        told = capsys.readouterr().err
        assert 0 < len(told.splitlines()) <= 6, line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("where", ["name", "metadata", "value"])
def test_half_a_character_in_a_header_is_refused(plain: dict[str, Path], tmp_path: Path, where: str) -> None:
    """JSON can spell it and no file can hold it: `\\ud800` alone."""
    half = "\ud800"
    header: dict[str, Any] = {
        half if where == "name" else "model.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    }
    header["__metadata__"] = {half: "x"} if where == "metadata" else {"x": half} if where == "value" else {}
    text = json.dumps(header).encode()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(BadInput, match=r"bad\.safetensors"):
        read_header(bad)
    whole = json.dumps({"__metadata__": {"x": "\U0001f600"}}).encode()  # the escapes of a whole one are fine
    bad.write_bytes(struct.pack("<Q", len(whole)) + whole)
    assert read_header(bad).metadata == {"x": "\U0001f600"}


def test_an_inputs_own_recipe_that_no_header_can_hold_counts_as_none(plain: dict[str, Path], tmp_path: Path) -> None:
    for number, text in enumerate(("[" * 100_000, "NaN", '{"x": 1e999}', '"\\ud800"', "9" * 5000, "{")):
        paths = dict(plain)
        for key in ("sd_merge_recipe", "sd_merge_models"):
            paths["beta7"] = tmp_path / f"{number}.safetensors"
            save_file(load_file(plain["beta7"]), paths["beta7"], {key: text})
            out = merged(paths, tmp_path / f"out-{number}-{key}.safetensors")
            models = json.loads(read_header(out).metadata["sd_merge_models"])
            assert {entry["sd_merge_recipe"] for entry in models.values()} == {None}


def test_a_place_that_cannot_be_written_is_told_before_the_work(plain: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "out.safetensors", "cannot be made")):
        with pytest.raises(BadSetting, match=says):
            merged(plain, out)


def test_not_a_number_is_refused_by_name_and_leaves_nothing(plain: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(plain["anxl3"])
    tensors["model.b"][5] = float("nan")
    save_file(tensors, tmp_path / "anxl3.safetensors")
    paths = {**plain, "anxl3": tmp_path / "anxl3.safetensors"}
    with pytest.raises(BadInput, match=r"model\.b"):
        merged(paths, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["anxl3.safetensors"]


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with something wrong, or at least odd, about it."""
    length = struct.unpack("<Q", data[:8])[0]
    kind = rng.randrange(8)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return struct.pack("<Q", rng.choice([0, 1, 2**33, 10**11, 2**63, length - 1, length + 1])) + data[8:]
    if kind == 2:
        place = rng.randrange(8 + length)
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 3:
        return rng.randbytes(rng.randrange(200))
    if kind == 4:
        return b"\x80\x02}q\x00." + data[rng.randrange(20) :]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind == 5:
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + rng.randrange(-9, 9), end + rng.randrange(-9, 9)]
    elif kind == 6:
        header[name]["shape"] = rng.choice([[-1], [2**62, 2**62], [1.5], "x", [[]], header[name]["shape"][::-1]])
    else:
        header[name] = rng.choice([[], {}, None, {**header[name], "dtype": rng.choice(["F16", "F4", 3])}])
    text = json.dumps(header).encode()
    if kind == 7 and rng.random() < 0.3:
        text = text[:-1] + b"," + text[1:]  # every key twice
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.slow
def test_ten_thousand_spoilt_files_end_in_an_error_or_in_a_merge(tmp_path: Path) -> None:
    """Never a traceback of ours, nothing under the output's name after an error, no memory taken on a file's word."""
    import resource

    rng = random.Random(3)
    tensors = {"model.w": torch.arange(24.0).reshape(4, 6).half(), "model.b": torch.ones(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    good, out, bad = (tmp_path / "x.safetensors").read_bytes(), tmp_path / "out.safetensors", tmp_path / "y.safetensors"
    paths = {"x": tmp_path / "x.safetensors", "y": bad}
    formula = Formula.parse("x + 0.5 * (y - x)", paths)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(10_000):
        bad.write_bytes(spoilt(good, rng))
        out.unlink(missing_ok=True)
        try:
            merge(open_job(formula, paths), out, threads=1)
        except AmbergradeError:
            refused += 1
            assert not out.exists()
    assert refused > 8000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert {path.name for path in tmp_path.iterdir()} <= {"x.safetensors", "y.safetensors", "out.safetensors"}
