"""What is saved under the name of a safetensors file is called by what it is, and a pickle's conversion works."""

import shlex
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ambergrade.errors import BadInput
from ambergrade.family.dtypes import DTYPES, torch_dtypes, words
from ambergrade.family.files import entries, read_metadata, read_tensors
from ambergrade.family.header import read_header


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 6938040682\n", "Git-LFS pointer of"),
        (b"<!DOCTYPE html><html><head><title>Log in</title></head></html>", "web page"),
        (b"\n  <html>\n<body>404</body></html>", "web page"),
        (b'{"error":"Unauthorized"}', "JSON"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"", "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
    ],
)
def test_other_files_are_called_by_what_they_are(tmp_path, content, told):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for read in (read_header, read_tensors, read_metadata, entries):
        with pytest.raises(BadInput, match=rf"model\.safetensors is .*{told}"):
            read(file)


def converted(tmp_path, found):
    torch.save(found, tmp_path / "old.ckpt")
    with pytest.raises(BadInput, match="is a pickle") as caught:
        read_tensors(tmp_path / "old.ckpt")
    command = shlex.split(str(caught.value).partition("Convert it: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    return load_file(tmp_path / command[-1])


def test_the_conversion_of_a_pickle_that_is_advised_works(tmp_path):
    """On tied tensors, on a training's checkpoint, and on R-ESRGAN's file."""
    weight = torch.arange(6.0).reshape(2, 3)
    tied = converted(tmp_path, {"a": weight, "b": weight, "t": weight.T, "epoch": 3})
    assert {key: value.tolist() for key, value in tied.items()} == {
        "a": weight.tolist(),
        "b": weight.tolist(),
        "t": weight.T.tolist(),
    }
    for key in ("state_dict", "params_ema", "params"):
        assert converted(tmp_path, {key: {"a": weight}, "step": 1}).keys() == {"a"}


def test_one_table_of_dtypes():
    """Sizes and digits against torch's own, codes against numpy's."""
    for word, dtype in DTYPES.items():
        found = torch_dtypes()[word]
        assert found.itemsize == dtype.size
        assert words()[found] == word
        if dtype.numpy:
            assert np.dtype(dtype.numpy).name.rstrip("_") == dtype.torch
        if found.is_floating_point:
            info = torch.finfo(found)
            assert info.eps == 2.0**-dtype.digits
            assert info.smallest_normal == 2.0**dtype.least
            kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            largest = torch.tensor([info.max], dtype=found).view(kinds[dtype.size])
            assert int(largest) + 1 == dtype.infinity


def test_a_header_of_many_keys_takes_seconds(tmp_path):
    """Files of no family, and of nearly one, are told in seconds: 100,000 keys took a minute."""
    import time

    from ambergrade.family.detect import detect

    file = tmp_path / "many.safetensors"
    names = [f"model.diffusion_model.input_blocks.{number}.0.x.{number % 7}.weight" for number in range(60_000)]
    save_file({name: torch.zeros(1) for name in names}, file)
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert length < 8 << 20
    start = time.process_time()
    with pytest.raises(BadInput, match="no known family"):
        detect({name: entry.shape for name, entry in entries(file).items()})
    assert time.process_time() - start < 10
