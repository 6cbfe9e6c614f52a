"""Pictures are found where danbooru's data sets keep them: loose, in numbered folders, in tars."""

import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.files import PictureFiles
from ambergrade.captions.manifest import build
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.errors import BadInput
from ambergrade.nouns import Post

CONF = Path(__file__).parents[2] / "conf" / "captions" / "kohaku-2024-01.yaml"


def png(seed: int, folder: Path) -> bytes:
    Image.new("RGB", (160, 128), (seed % 256, 99, 3)).save(folder / "one.png")
    return (folder / "one.png").read_bytes()


def write_tar(path: Path, members: dict[str, bytes], scratch: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            (scratch / "member").write_bytes(data)
            tar.add(scratch / "member", name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    write_tar(made / "data-0123.tar", {f"{n}.webp": png(n // 1000, tmp_path) for n in (5123, 123, 44123)}, tmp_path)
    write_tar(made / "updates" / "data-0123.tar", {"./7000123.webp": png(7, tmp_path), "README": b"x"}, tmp_path)
    (made / "0456").mkdir()
    (made / "0456" / "9456.png").write_bytes(png(9, tmp_path))
    (made / "loose.png").write_bytes(png(1, tmp_path))
    return made


def test_every_layout_is_found_and_read(folder: Path, tmp_path: Path) -> None:
    files = PictureFiles(folder, index=tmp_path / "index")
    wanted = {
        (5123, "5123.jpg"): "data-0123.tar/5123.webp",
        (123, "123.png"): "data-0123.tar/123.webp",
        (7000123, "7000123.jpg"): "updates/data-0123.tar/./7000123.webp",
        (9456, "9456.png"): "0456/9456.png",
        (3, "loose.png"): "loose.png",
        (5124, "5124.jpg"): None,
        (6123, "6123.jpg"): None,
    }
    assert {post: files.find(*post) for post in wanted} == wanted
    assert files.read("data-0123.tar/44123.webp") == png(44, tmp_path)
    assert files.read("updates/data-0123.tar/./7000123.webp") == png(7, tmp_path)
    again = PictureFiles(folder, index=tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert again.find(5123, "5123.jpg") == "data-0123.tar/5123.webp"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}


def test_a_manifest_names_members_of_tars(folder: Path, tmp_path: Path) -> None:
    recipe = CaptionRecipe.from_dict(yaml.safe_load(CONF.read_text()))
    posts = [Post(n, {"general": ("solo",)}, "general", "2020-", 1, 1, 0, 0, f"{n}.jpg") for n in (123, 5123, 9999)]
    captions, report = build(posts, recipe, folder, aspect_buckets(128, 32, 96, 160))
    assert [p.file_name for p in captions.pictures] == ["data-0123.tar/123.webp", "data-0123.tar/5123.webp"]
    assert report.dropped == {"picture file missing": (9999,)}
    parallel, _ = build(posts, recipe, folder, aspect_buckets(128, 32, 96, 160), workers=2)
    assert parallel == captions


def test_what_cannot_be_read_is_told(folder: Path, tmp_path: Path) -> None:
    files = PictureFiles(folder)
    for name, told in (("data-0123.tar/9.webp", "no member 9.webp"), ("gone.png", "No picture at")):
        with pytest.raises(BadInput, match=told):
            files.read(name)
    tar = folder / "data-0123.tar"
    files.find(44123, "")
    tar.write_bytes(tar.read_bytes()[:1600])
    with pytest.raises(BadInput, match="cut short"):
        files.read("data-0123.tar/44123.webp")
    (folder / "data-0007.tar").write_bytes(b"\x1f\x8b" + b"0" * 2000)
    with pytest.raises(BadInput, match="uncompressed tar"):
        PictureFiles(folder).find(7, "7.jpg")
