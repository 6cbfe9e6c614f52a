"""Pictures are found where danbooru's data sets keep them: loose, in numbered folders, in tars."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.files import OutsideFolder, PictureFiles
from ambergrade.captions.lint import lint
from ambergrade.captions.manifest import OUTSIDE, build
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.errors import BadInput
from ambergrade.nouns import Post
from ambergrade.typed import settings

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
    write_tar(made / "data-0009.tar", {"²³.png": b"", "9" * 30 + ".png": b"", "9.png": png(3, tmp_path)}, tmp_path)
    (made / "data-²³.tar").write_bytes(b"")
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
        (9, "9.jpg"): "data-0009.tar/9.png",
    }
    assert {post: files.find(*post) for post in wanted} == wanted
    assert files.read("data-0123.tar/44123.webp") == png(44, tmp_path)
    assert files.read("updates/data-0123.tar/./7000123.webp") == png(7, tmp_path)
    again = PictureFiles(folder, index=tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert again.find(5123, "5123.jpg") == "data-0123.tar/5123.webp"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}


def test_a_manifest_names_members_of_tars(folder: Path, tmp_path: Path) -> None:
    recipe = settings(CaptionRecipe, yaml.safe_load(CONF.read_text()))
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


OUTSIDE_NAMES = ["../secret.png", "ABSOLUTE", "0001/../../secret.png", "link.png", "linked/secret.png", "a\0b", "..\\x"]


@pytest.fixture
def hostile(folder: Path, tmp_path: Path) -> Path:
    """The folder beside a picture that is none of its own, with links to it."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("secret.png", "elsewhere/secret.png"):
        (tmp_path / name).write_bytes(png(5, tmp_path))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "inner.png").symlink_to(folder / "loose.png")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize("name", OUTSIDE_NAMES)
def test_no_name_leads_out_of_the_folder(hostile: Path, tmp_path: Path, name: str) -> None:
    name = name.replace("ABSOLUTE", str(tmp_path / "secret.png"))
    files = PictureFiles(hostile)
    with pytest.raises(OutsideFolder, match="leads out of"):
        files.find(3, name)
    with pytest.raises(OutsideFolder, match="leads out of"):
        files.read(name)


def test_links_inside_and_a_linked_folder_are_followed(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").symlink_to(hostile)
    files = PictureFiles(tmp_path / "mounted")
    assert files.read("inner.png") == png(1, tmp_path)
    assert files.find(3, "pipe.png") is None
    assert files.find(3, "0456") is None
    with pytest.raises(BadInput, match="name too long"):
        files.find(3, "x" * 300)


def test_a_file_that_may_not_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(BadInput, match=r"loose\.png cannot be read: Permission denied"):
        PictureFiles(folder).read("loose.png")


def test_names_that_lead_out_are_counted_and_end_nothing(hostile: Path, tmp_path: Path) -> None:
    recipe = settings(CaptionRecipe, yaml.safe_load(CONF.read_text()))
    names = ["loose.png", *OUTSIDE_NAMES, "x" * 300]
    posts = [Post(n, {"general": ("solo",)}, "general", "2020-", 1, 1, 0, 0, name) for n, name in enumerate(names)]
    posts[2] = Post(2, {}, "general", "2020-", 1, 1, 0, 0, str(tmp_path / "secret.png"))
    captions, report = build(posts, recipe, hostile, aspect_buckets(128, 32, 96, 160))
    assert [p.post_id for p in captions.pictures] == [0]
    assert report.dropped == {OUTSIDE: tuple(range(1, 8)), "picture unreadable": (8,)}
    assert len(report.details) == 8
    found = lint(posts, PictureFiles(hostile))
    assert [f.post_id for f in found.findings if f.rule == "outside"] == list(range(1, 8))
    assert [f.post_id for f in found.findings if f.rule == "unreadable"] == [8]


POSTS = [(1, "1.png"), (3, "loose.png"), (123, "123.jpg"), (9456, "9456.png"), (2123, "2123.png")]


def test_the_fingerprint_changes_with_the_pictures(folder: Path, tmp_path: Path) -> None:
    def now() -> str:
        return PictureFiles(folder, index=tmp_path / "index").fingerprint(POSTS)

    told = [now()]
    assert now() == told[0]
    (folder / "unasked.png").write_bytes(b"x")
    assert now() == told[0]  # of no chosen post
    (folder / "1.png").write_bytes(png(1, tmp_path))  # added
    told.append(now())
    edited = (folder / "1.png").stat()
    (folder / "1.png").write_bytes(png(2, tmp_path))  # written anew in place, as large as before
    assert (folder / "1.png").stat().st_size == edited.st_size
    told.append(now())
    os.utime(folder / "1.png")  # touched: the same bytes
    shutil.copy(folder / "1.png", folder / "copy.png")
    (folder / "copy.png").rename(folder / "1.png")
    assert now() == told[-1]
    (folder / "loose.png").unlink()
    told.append(now())
    write_tar(folder / "updates" / "data-0123.tar", {"2123.png": png(4, tmp_path)}, tmp_path)
    told.append(now())
    assert len(set(told)) == 5
    assert PictureFiles(folder).fingerprint([*POSTS, (5, "../x")]) not in told
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert PictureFiles(moved).fingerprint(POSTS) == told[-1]  # where the folder lies does not matter
