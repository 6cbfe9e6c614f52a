"""The dataset stage: what makes a manifest new, and worlds that two commands draw."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ambergrade.chain.context import Context
from ambergrade.chain.dataset import dataset, draw_world
from ambergrade.chain.settings import Compute, DataSettings, Drawing, GammaSettings
from ambergrade.door.compose import compose, read
from ambergrade.errors import BadInput


def test_a_manifest_is_made_again_when_pictures_were_added(
    context: Context, smoke: GammaSettings, data: DataSettings, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(data.pictures, pictures)
    away = tmp_path / "away"
    away.mkdir()
    for file in sorted(path for path in pictures.rglob("*") if path.is_file())[::2]:
        (away / file.name).write_bytes(file.read_bytes())
        file.unlink()
    half = replace(data, pictures=str(pictures))
    first = dataset(context, half, smoke.captions, smoke.family)
    assert dataset(context, half, smoke.captions, smoke.family).identity == first.identity
    shutil.rmtree(pictures)
    shutil.copytree(data.pictures, pictures)
    second = dataset(context, half, smoke.captions, smoke.family)
    assert second.fresh
    assert sum(second.values["pictures"].values()) > sum(first.values["pictures"].values())


def test_another_drawing_lies_in_another_folder(tmp_path: Path) -> None:
    folders = set()
    for count in (80, 81):
        settings = read(
            GammaSettings,
            compose("gamma", ["experiment=gamma_smoke", f"root={tmp_path}", f"data.draw.count={count}"]),
        )
        folders.add(settings.data.folder)
        assert settings.prompts.sweep.startswith(str(settings.data.folder))
    assert len(folders) == 2


def test_two_commands_at_once_draw_one_world(tmp_path: Path, data: DataSettings) -> None:
    drawing = Drawing(seed=3, count=6, prompts=2, references=2)
    wanted = replace(data, draw=drawing, folder=str(tmp_path / "world"))
    troubles: list[BaseException] = []

    def draw() -> None:
        try:
            draw_world(wanted, Compute())
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not troubles
    assert json.loads((tmp_path / "world" / "drawn.json").read_text())["count"] == 6


def test_a_folder_of_something_else_is_not_drawn_over(tmp_path: Path, data: DataSettings) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds other things"):
        draw_world(replace(data, draw=Drawing(seed=3, count=6), folder=str(folder)), Compute())
    assert (folder / "precious.txt").read_text() == "mine"
