"""The training stage: every output is filed, whatever kind of adapter is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from ambergrade.chain.context import Context
from ambergrade.chain.dataset import dataset, read_sets
from ambergrade.chain.point import open_checkpoint
from ambergrade.chain.settings import GammaSettings
from ambergrade.chain.training import Subject, train
from ambergrade.store import find_file
from ambergrade.train.settings import LoraSettings


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_an_adapter_s_own_file_is_an_output(
    context: Context, smoke: GammaSettings, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, validation = read_sets(dataset(context, smoke.data, smoke.captions, smoke.family))
    trainer = replace(smoke.trainer, images=4, batch=4, micro=4, lora=LoraSettings(2, 2.0, kind), sample_every=0)  # type: ignore[arg-type]
    base = open_checkpoint(find_file("builtin://beta7.safetensors"), "sdxl_tiny")
    subject = Subject(
        name="style",
        base=base,
        base_name="beta7",
        family=smoke.family,
        data=smoke.data,
        captions=captions,
        validation=validation,
        trainer=trainer,
        sampler=smoke.sampler,
    )
    trained = train(context, subject)
    assert trained.path.exists()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"{kind} file" in line]
    assert Path(line.split()[-1]).name == f"style-{kind}.safetensors"
    with safe_open(Path(line.split()[-1]), "pt") as file:
        assert any(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118
