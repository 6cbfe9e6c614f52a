"""Canonical safetensors bytes, read back by the safetensors library itself."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family.files import entries, weight_files, weights_digest, write_tensors

TENSORS = {
    "b.scalar": torch.tensor(2.5),
    "a.half": torch.arange(5, dtype=torch.float16).reshape(1, 5),
    "d.brain": torch.tensor([1.0, -3.0, 7.0], dtype=torch.bfloat16),
    "c.long": torch.arange(3),
    "e.transposed": torch.arange(6.0).reshape(2, 3).T,
    "f.flags": torch.tensor([True, False, True]),
}


def test_the_library_reads_every_dtype_back(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"z": "1", "ä": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"z": "1", "ä": "é"}


def test_bytes_do_not_depend_on_the_order_of_arguments(tmp_path):
    one = write_tensors(tmp_path / "1", TENSORS, {"p": "1", "q": "2"})
    two = write_tensors(tmp_path / "2", dict(reversed(TENSORS.items())), {"q": "2", "p": "1"})
    assert one == two
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_header_is_sorted_and_every_tensor_is_aligned(tmp_path):
    write_tensors(tmp_path / "x", TENSORS, {"note": "odd length"})
    data = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert list(header)[1:] == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_the_digest_covers_names_dtypes_shapes_and_bytes():
    base = {"w": torch.tensor([1.0, 2.0])}
    variants = [
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"w": torch.tensor([[1.0, 2.0]])},
        {"w": torch.tensor([1.0, 2.5])},
    ]
    assert len({weights_digest(tensors) for tensors in [base, *variants]}) == 5


def component(folder: Path, *names: str, index: dict[str, str] | None = None) -> Path:
    for number, name in enumerate(names):
        write_tensors(folder / name, {f"w{number}": torch.full((2,), float(number))}, {})
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_one_file_of_a_component_is_chosen_by_rule_or_none(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"w0": shards[0], "w1": shards[1]}
    plain = component(tmp_path / "plain", "model.fp16.safetensors", "model.safetensors")
    assert [file.name for file in weight_files(plain)] == ["model.safetensors"]
    assert [file.name for file in weight_files(component(tmp_path / "shards", *shards))] == shards
    stale = component(tmp_path / "stale", *shards, "model.safetensors", index=index)  # the whole file is an old one
    assert [file.name for file in weight_files(stale)] == shards
    for number, names in enumerate(
        [
            ["model.fp16.safetensors", "model.non_ema.safetensors"],
            [*shards, "model.safetensors"],
            [shards[0]],
            [shards[0], "model-00002-of-00003.safetensors"],
        ]
    ):
        with pytest.raises(BadInput) as caught:
            weight_files(component(tmp_path / str(number), *names))
        assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 3])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = component(tmp_path / "x", *shards, index={"w0": name})
    with pytest.raises(BadInput, match="no index of shards"):
        weight_files(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w0": "gone.safetensors"}}')
    with pytest.raises(MissingObject, match=r"names gone\.safetensors"):
        weight_files(folder)


def test_a_folder_of_checkpoints_is_told_from_a_checkpoint(tmp_path):
    component(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(MissingObject, match=r"holds 2 checkpoints: name one, such as .*a\.safetensors"):
        entries(tmp_path, ["unet", "vae"])
