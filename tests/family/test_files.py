"""Canonical safetensors bytes, read back by the safetensors library itself."""

import json
import struct

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ambergrade.family.files import weights_digest, write_tensors

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
