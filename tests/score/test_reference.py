"""Reference statistics, Inception and the sharing of features, against pytorch-fid and torch-fidelity."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ambergrade.errors import AmbergradeError, BadInput, MissingObject
from ambergrade.nouns import Picture, PromptSet
from ambergrade.pictures import read_rgb
from ambergrade.score import folders as folders_module
from ambergrade.score.distances import frechet_distance
from ambergrade.score.features import feature_source
from ambergrade.score.folders import scorer_path
from ambergrade.score.inception import FidInception
from ambergrade.score.metrics.fid import Fid
from ambergrade.score.metrics.kid import Kid
from ambergrade.score.reference import Reference, build_reference, listed
from ambergrade.score.scoring import score
from ambergrade.score.sheet import ScoreSheet


@pytest.fixture(scope="module")
def made(folders: Any) -> Reference:
    return build_reference(feature_source(str(folders.features)), listed(folders.reference, folders.pictures))


def test_statistics_come_back_and_equal_content_is_equal_bytes(made: Reference, tmp_path: Path) -> None:
    made.write(tmp_path / "one.npz")
    made.write(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    back = Reference.read(tmp_path / "one.npz")
    assert back.digest == made.digest
    assert (back.m, back.d) == (60, 32)
    x = made.features
    assert x is not None
    np.testing.assert_allclose(back.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_pytorch_fid_reads_ours_and_we_read_its(made: Reference, folders: Any, tmp_path: Path) -> None:
    from pytorch_fid import fid_score as stock

    made.write(tmp_path / "ours.npz")
    mean, covariance = stock.compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 32, "cpu")
    np.testing.assert_array_equal(mean, made.mean)
    np.testing.assert_array_equal(covariance, made.covariance)
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
    with pytest.raises(BadInput, match="does not say which network"):
        Fid(str(folders.features), str(tmp_path / "theirs.npz"))
    trusted = Fid(str(folders.features), str(tmp_path / "theirs.npz"), trust_reference=True)
    assert trusted.fingerprint["reference_pictures"] is None
    with pytest.raises(BadInput, match="moments only"):
        Kid(str(folders.features), str(write_trusted(made, tmp_path)))


def test_moments_are_torchmetrics_state_of_sums(made: Reference) -> None:
    """Facts, section 7: Σx = nμ and Σxxᵀ = (n-1)Σ + nμμᵀ; and its FID of the sums is ours of the moments."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        """A network whose pictures are its features."""

        num_features = made.d

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    stock = FrechetInceptionDistance(feature=Given(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    assert made.features is not None
    other = np.random.default_rng(0).normal(made.mean, 0.1, (80, made.d))
    stock.update(torch.from_numpy(made.features.astype(np.float64)), real=True)
    stock.update(torch.from_numpy(other), real=False)
    n = len(made.features)
    outer = np.outer(made.mean, made.mean)
    np.testing.assert_allclose(stock.real_features_sum, n * made.mean, rtol=1e-9)
    np.testing.assert_allclose(
        stock.real_features_cov_sum, (n - 1) * made.covariance + n * outer, rtol=1e-9, atol=1e-12
    )
    value = frechet_distance(other.mean(0), np.cov(other, rowvar=False), made.mean, made.covariance)
    assert float(stock.compute()) == pytest.approx(float(value), rel=1e-5)


def write_trusted(made: Reference, folder: Path) -> Path:
    """Our extractor's moments without the features."""
    Reference(made.mean, made.covariance, None, made.about).write(folder / "moments.npz")
    return folder / "moments.npz"


def test_statistics_of_another_extractor_are_refused(made: Reference, folders: Any, tmp_path: Path) -> None:
    other = Reference(made.mean, made.covariance, made.features, {"extractor": {"weights": "x"}, "pictures": ""})
    other.write(tmp_path / "other.npz")
    with pytest.raises(BadInput, match="another extractor: it differs in"):
        Fid(str(folders.features), str(tmp_path / "other.npz"))
    Reference.of_features(np.zeros((5, 3), np.float32)).write(tmp_path / "small.npz")
    with pytest.raises(BadInput, match="3 features, the extractor gives 32"):
        Fid(str(folders.features), str(tmp_path / "small.npz"))
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    with pytest.raises(BadInput, match="not a whole"):
        Reference.read(tmp_path / "broken.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MissingObject, match="action=reference"):
        Fid(str(folders.features), str(tmp_path / "folder"))
    made.write(tmp_path / "folder" / f"{feature_source(str(folders.features)).key}.npz")
    assert Fid(str(folders.features), str(tmp_path / "folder")).fingerprint["reference"] == made.digest


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"about": np.array("no json")}, "not a whole"),
        ({"about": np.array("{}")}, "does not say which extractor"),
        ({"about": np.array("[1]")}, "does not say which extractor"),
        ({"mu": np.array(["a"] * 32)}, "not a whole"),
        ({"mu": np.full(32, np.nan)}, "NaN or infinity"),
        ({"mu": np.float64(3)}, "do not fit"),
        ({"features": np.zeros((5, 3), np.float32)}, "do not fit"),
        ({"features": np.array(["a"])}, "not a whole"),
        ({"sigma": None}, "need mu and sigma"),
    ],
)
def test_damaged_statistics_are_told(changes: dict[str, Any], told: str, made: Reference, tmp_path: Path) -> None:
    made.write(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as found:
        arrays = {**found, **changes}
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(BadInput, match=told):
        Reference.read(tmp_path / "bad.npz")


def test_statistics_without_their_origin_are_advised_with_whole_keys(
    made: Reference, folders: Any, tmp_path: Path
) -> None:
    Reference(made.mean, made.covariance, made.features, None).write(tmp_path / "bare.npz")
    for metric in (Fid, Kid):
        with pytest.raises(BadInput, match=r"suite\.metrics\.fid\.trust_reference=true"):
            metric(str(folders.features), str(tmp_path / "bare.npz"))


def test_a_small_file_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(32), sigma=np.zeros((4000, 4000)))
    assert (tmp_path / "bomb.npz").stat().st_size < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="would grow from"):
            Reference.read(tmp_path / "bomb.npz")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_sheet_carries_its_reference(
    made: Reference, folders: Any, prompts: PromptSet, pictures: list[Picture], tmp_path: Path
) -> None:
    made.write(tmp_path / "ref.npz")
    metrics = [Fid(str(folders.features), str(tmp_path / "ref.npz"), few=True)]
    sheet = score(pictures, prompts, [*metrics, Kid(str(folders.features), str(tmp_path / "ref.npz"))])
    assert list(sheet.references) == [made.digest]
    assert len(sheet.features) == 1  # both read the same features
    sheet.write(tmp_path / "sheet.parquet")
    (tmp_path / "ref.npz").unlink()
    back = ScoreSheet.read(tmp_path / "sheet.parquet")
    assert back.references[made.digest].digest == made.digest
    for plug in (Fid, Kid):
        assert plug.aggregates(back, seed=0) == plug.aggregates(sheet, seed=0)


def test_metrics_of_one_extractor_share_one_pass(folders: Any) -> None:
    source = feature_source(str(folders.features))
    assert feature_source(str(folders.features)) is source
    pixels = [np.full((40, 40, 3), value, np.uint8) for value in (10, 200)]
    assert source(pixels) is source(list(pixels))
    assert source(pixels[:1]) is not source(pixels)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: Any) -> tuple[Path, FidInception]:
    """A random Inception in pytorch-fid's pickle format, then converted by the command that the refusal names."""
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    network = FidInception()
    for module in network.modules():  # torchvision's own start lets the signal die on the way
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    state = dict(network.network.state_dict().items())
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, folder / "pt_inception.pth")
    with pytest.raises(AmbergradeError, match="pickle") as caught:
        feature_source(str(folder / "pt_inception.pth"))
    command = shlex.split(str(caught.value).partition("Convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=folder)
    return folder / command[-1], network.eval()


def test_a_local_inception_file_scores_offline_as_pytorch_fid_and_torch_fidelity_do(
    inception: tuple[Path, FidInception],
) -> None:
    path, _ = inception
    source = feature_source(str(path))
    assert source.d == 2048
    pixels = np.random.default_rng(0).integers(0, 256, (2, 80, 60, 3), dtype=np.uint8)
    found = source(list(pixels))
    from pytorch_fid import inception as theirs
    from safetensors.torch import load_file

    network = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    network.Mixed_5b, network.Mixed_5c, network.Mixed_5d = (
        theirs.FIDInceptionA(w, p) for w, p in ((192, 32), (256, 64), (288, 64))
    )
    for name, width in zip("bcde", (128, 160, 160, 192), strict=True):
        setattr(network, f"Mixed_6{name}", theirs.FIDInceptionC(768, channels_7x7=width))
    network.Mixed_7b, network.Mixed_7c = theirs.FIDInceptionE_1(1280), theirs.FIDInceptionE_2(2048)
    network.load_state_dict(load_file(path))
    network.fc = torch.nn.Identity()
    network.eval()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = network(2 * x - 1).numpy()
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_no_extractor_ever_keeps_random_weights(tmp_path: Path) -> None:
    save_file({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(BadInput, match="not pytorch-fid's Inception"):
        feature_source(str(tmp_path / "part.safetensors"))
    with pytest.raises(MissingObject):
        feature_source(str(tmp_path / "gone.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingObject, match=r"lacks config\.json"):
        feature_source(str(tmp_path / "empty"))


def test_hub_folders_come_from_the_hub_or_its_cache(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folders.tagger))
    assert scorer_path("hub://SmilingWolf/wd-swinv2-tagger-v3") == folders.tagger

    def offline(name: str, **_: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MissingObject, match="Give the path of a local copy"):
        folders_module.scorer_path("hub://a/b")


def test_odd_picture_files_are_read_as_they_are_seen_or_told_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey16 = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(grey16).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "deep.png")[..., 0], np.rint(grey16 / 257).astype(np.uint8))
    Image.fromarray(rng.integers(0, 256, (8, 6), dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png").shape == (8, 6, 3)
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert (read_rgb(tmp_path / "clear.png") == 255).all()
    whole = tmp_path / "whole.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(BadInput, match=name):
            read_rgb(tmp_path / name)
