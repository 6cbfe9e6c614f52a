"""Digests of model files against torch's reading, hashlib on the whole file, and the definitions of the sites."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ambergrade.door import files as command
from ambergrade.errors import BadInput, MissingObject
from ambergrade.family import digests, sdxl
from ambergrade.family.convert import to_folder
from ambergrade.family.digests import FileHasher, files_digest, listed_digests, model_digests, weights_sha256
from ambergrade.family.files import weights_digest
from ambergrade.store import BUILTIN, Digests


def save_shuffled(tensors: dict[str, Tensor], path: Path, seed: int = 0) -> None:
    """The same tensors as another tool might write them: other metadata, another order of the bytes."""
    names = list(tensors)
    random.Random(seed).shuffle(names)
    header: dict[str, object] = {"__metadata__": {"saved": f"anew {seed}"}}
    data, place = [], 0
    words = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
    for name in names:
        value = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        described = {"dtype": words[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = described | {"data_offsets": [place, place + len(value)]}
        data.append(value)
        place += len(value)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


@pytest.fixture(scope="module")
def odd() -> dict[str, Tensor]:
    """Every kind of shape and several dtypes, one larger than a piece that is read at once."""
    generator = torch.Generator().manual_seed(0)
    return {
        "z.large": torch.randn(1100, 1000, generator=generator),
        "a.half": torch.randn(3, 5, generator=generator).half(),
        "a.bf16": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "mark": torch.empty(0),
        "ids": torch.arange(77)[None],
        "bytes": torch.arange(9, dtype=torch.uint8),
    }


def test_the_weights_digest_is_torchs_whatever_the_order_and_the_metadata(
    odd: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(odd, tmp_path / "a.safetensors")
    save_shuffled(odd, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()
    for name in ("a", "b"):
        assert weights_sha256(tmp_path / f"{name}.safetensors") == weights_digest(odd)
    builtin = BUILTIN / "beta7.safetensors"
    assert weights_sha256(builtin) == sdxl.weights_digest(sdxl.read_checkpoint(builtin))
    odd = {**odd, "scalar": torch.tensor(2.75)}
    save_file(odd, tmp_path / "c.safetensors")
    assert (
        weights_sha256(tmp_path / "c.safetensors") == weights_digest(odd) != weights_sha256(tmp_path / "a.safetensors")
    )


@pytest.mark.parametrize("piece", [1 << 22, 1000, 7])
@pytest.mark.parametrize("seed", range(4))
def test_one_reading_gives_both_digests(
    odd: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, piece: int
) -> None:
    """Whatever the order of the tensors and the pieces; where too much would wait for its turn, the file's alone."""
    file = tmp_path / "a.safetensors"
    small = {name: value for name, value in odd.items() if name != "z.large" or piece > 100}
    save_shuffled({**small, "empty too": torch.empty(3, 0)}, file, seed)
    data = memoryview(file.read_bytes())
    hasher = FileHasher(file)
    for start in range(0, len(data), piece):
        hasher.update(data[start : start + piece])
    assert hasher.hexdigest() == hashlib.sha256(data).hexdigest()
    assert hasher.weights == weights_digest({**small, "empty too": torch.empty(3, 0)})
    monkeypatch.setattr(digests, "MOST_KEPT", 0)
    hasher = FileHasher(file)
    hasher.update(data)
    assert hasher.hexdigest() == hashlib.sha256(data).hexdigest()
    assert hasher.weights in (None, weights_digest({**small, "empty too": torch.empty(3, 0)}))


def test_a_folders_weights_digest_is_that_of_its_single_file(tiny_config: Path, tmp_path: Path) -> None:
    """Stacked and transposed tensors among them; the files' own digest is another."""
    networks = sdxl.from_config(tiny_config, seed=3)
    sdxl.write_checkpoint(tmp_path / "single.safetensors", networks.tensors(), {})
    to_folder(tmp_path / "single.safetensors", tmp_path / "folder", tiny_config)
    known = Digests()
    single, folder = (model_digests(tmp_path / name, known) for name in ("single.safetensors", "folder"))
    assert folder.weights == sdxl.weights_digest(sdxl.read_checkpoint(tmp_path / "folder")) == single.weights
    assert folder.file != single.file
    with pytest.raises(MissingObject, match=r"no \.safetensors file"):
        model_digests(tiny_config, known)


def test_what_is_remembered_is_not_read_again_and_a_change_is_seen(odd: dict[str, Tensor], tmp_path: Path) -> None:
    file, cache = tmp_path / "a.safetensors", tmp_path / "digests.json"
    save_file(odd, file)
    time.sleep(0.1)
    known = Digests(cache)
    first = model_digests(file, known)
    known.save()
    again = Digests(cache)
    assert again.known(file) == first.file == hashlib.sha256(file.read_bytes()).hexdigest()
    assert again.derived("weights", first.file) == first.weights == weights_digest(odd)
    save_file({**odd, "mark": torch.zeros(1)}, file)
    assert model_digests(file, Digests(cache)).weights == weights_digest({**odd, "mark": torch.zeros(1)})
    assert files_digest(file, {file: "x"}) == "x"


def test_sites_digests_are_as_they_define_them(odd: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(odd, file, {"title": "x"})
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = listed_digests(file)
    assert found["AutoV1"] == hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert found["AutoV2"] == hashlib.sha256(data).hexdigest()[:10]
    assert found["AutoV3"] == hashlib.sha256(data[start:]).hexdigest()[:12]
    save_file(odd, file, {"title": "another, and longer"})
    other = listed_digests(file)
    assert other["AutoV3"] == found["AutoV3"]
    assert other["AutoV2"] != found["AutoV2"]
    save_file({"x": torch.ones(2)}, file)
    assert "AutoV1" not in listed_digests(file)


def test_the_command_names_each_digest(
    odd: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.safetensors"
    save_file(odd, file)
    assert command.main(["digest", str(file)]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert rows["file"] == f"sha256 {sha256}"
    assert rows["weights"] == f"sha256 {weights_digest(load_file(file))}"
    assert rows["AutoV2"] == sha256[:10]
    file.write_bytes(b"\x80\x02}q\x00.")
    assert command.main(["digest", str(file), str(tmp_path / "absent.safetensors")]) == 1
    with pytest.raises(BadInput):
        model_digests(file, Digests())
