"""A run's state on disk: whole or not there; a damaged or half-written one never stands in the way of an older."""

import errno

import pytest
import torch

from ambergrade.errors import BadInput, MissingObject
from ambergrade.train import state
from ambergrade.train.state import read_state, write_state


def tensors(value):
    return {f"t{n}": torch.full((100,), float(value + n)) for n in range(5)}


def write(folder, seen):
    write_state(folder, tensors(seen), {"seen": seen}, shard=900)


def test_it_is_sharded_and_comes_back(tmp_path):
    assert read_state(tmp_path) is None
    write(tmp_path, 8)
    assert len(list((tmp_path / "000000008").glob("shard-*.safetensors"))) == 3  # two tensors of 400 bytes in each
    found, progress = read_state(tmp_path)
    assert progress == {"seen": 8}
    assert all(torch.equal(found[name], value) for name, value in tensors(8).items())
    assert found.keys() == tensors(8).keys()


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path):
    for seen in (8, 16, 24):
        write(tmp_path, seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000016", "000000024"]
    assert read_state(tmp_path)[1] == {"seen": 24}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_state_is_passed_over(tmp_path, damage):
    write(tmp_path, 8)
    write(tmp_path, 16)
    shard = tmp_path / "000000016" / "shard-001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    else:
        data[-1] ^= 1
        shard.write_bytes(data if damage == "flip" else data[:-100])
    assert read_state(tmp_path)[1] == {"seen": 8}
    (tmp_path / "000000008" / "shard-000.safetensors").unlink()
    with pytest.raises(BadInput, match=r"Every state .* is damaged: 000000016 \(shard-001.safetensors\); 000000008"):
        read_state(tmp_path)


def test_a_full_disk_is_told_and_the_last_good_state_survives(tmp_path, monkeypatch):
    write(tmp_path, 8)
    real = state.write_tensors
    written = []

    def full(path, part, metadata):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return real(path, part, metadata)

    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(MissingObject, match=r"No space left on device[\s\S]*last whole one is of 8 images"):
        write(tmp_path, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["000000008"]
    assert read_state(tmp_path)[1] == {"seen": 8}


def test_a_state_without_its_last_file_is_not_there(tmp_path):
    write(tmp_path, 8)
    write(tmp_path, 16)
    (tmp_path / "000000016" / "state.json").unlink()
    assert read_state(tmp_path)[1] == {"seen": 8}
