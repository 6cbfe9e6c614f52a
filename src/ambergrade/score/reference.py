"""Reference statistics: what real pictures look like to a network, as a named .npz that pytorch-fid reads too.

The file holds pytorch-fid's `mu` (d,) and `sigma` (d, d) in float64, and beside them `features` (m, d) float32 and
`about` (JSON: the extractor's fingerprint and the pictures' digest), which other tools pass over.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ambergrade.errors import BadInput, MissingObject
from ambergrade.identity import canonical_json, digest, file_digest
from ambergrade.pictures import read_rgb
from ambergrade.store import find_file, written_aside

if TYPE_CHECKING:  # whoever reads a sheet needs no networks' libraries, which take seconds to import
    from ambergrade.score.features import FeatureSource

Floats = npt.NDArray[np.float64]
LARGEST_UNASKED = 64 * 2**20
"""Bytes that any file may unpack to; beyond, no more than MOST_SWELLING times its size."""
MOST_SWELLING = 20


@dataclass(frozen=True, eq=False)
class Reference:
    """Moments of real pictures' features, and the features where they are known."""

    mean: Floats
    """(d,)"""
    covariance: Floats
    """(d, d), unbiased."""
    features: npt.NDArray[np.float32] | None = None
    """(m, d); None for a file of another tool, which keeps moments only."""
    about: Mapping[str, Any] | None = None
    """`extractor` (fingerprint) and `pictures` (digest of their files); None for a file of another tool."""

    @property
    def m(self) -> int | None:
        """Pictures behind it; None where another tool did not say."""
        return None if self.features is None else len(self.features)

    @property
    def d(self) -> int:
        return len(self.mean)

    @cached_property
    def digest(self) -> str:
        """sha256 over moments, features and origin."""
        whole = hashlib.sha256(canonical_json(self.about).encode())
        for array in (self.mean, self.covariance, self.features):
            if array is not None:
                whole.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    @classmethod
    def of_features(cls, features: npt.NDArray[np.float32], about: Mapping[str, Any] | None = None) -> Reference:
        """Moments in float64 of features (m, d)."""
        x = features.astype(np.float64)
        centred = x - x.mean(0)
        return cls(x.mean(0), centred.T @ centred / (len(x) - 1), features.astype(np.float32), about)

    def write(self, path: Path) -> None:
        """Write the .npz; equal content gives equal bytes."""
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        if self.about is not None:
            arrays["about"] = np.array(canonical_json(self.about))
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `write`, pytorch-fid or TTUR wrote. Raises BadInput for another, damaged or swelling file."""
        try:
            _refuse_swelling(path)
            with np.load(path, allow_pickle=False) as found:
                names = set(found.files)
                if not {"mu", "sigma"} <= names:
                    raise BadInput(f"{path} holds {sorted(names)}; reference statistics need mu and sigma.")
                mean, covariance = found["mu"].astype(np.float64), found["sigma"].astype(np.float64)
                features = found["features"].astype(np.float32) if "features" in names else None
                about = json.loads(str(found["about"])) if "about" in names else None
        except (zipfile.BadZipFile, zlib.error, ValueError, TypeError, KeyError, OSError, EOFError) as error:
            raise BadInput(f"{path} is not a whole .npz file of numbers: {str(error)[:200]}") from error
        d = len(mean) if mean.ndim == 1 else -1
        if covariance.shape != (d, d):
            raise BadInput(f"{path}: mu {mean.shape} and sigma {covariance.shape} do not fit each other.")
        if features is not None and (features.ndim != 2 or features.shape[1] != d or len(features) < 2):
            raise BadInput(f"{path}: features {features.shape} do not fit mu {mean.shape}.")
        if not all(np.isfinite(x).all() for x in (mean, covariance, features) if x is not None):
            raise BadInput(f"{path} holds NaN or infinity. Build the statistics again.")
        if about is not None and not (isinstance(about, dict) and isinstance(about.get("extractor"), dict)):
            raise BadInput(f"{path}: `about` does not say which extractor made it. Build the statistics again.")
        return cls(mean, covariance, features, about)


def _refuse_swelling(path: Path) -> None:
    """Raise BadInput for a compressed file that would fill the memory: features hardly compress."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    packed = path.stat().st_size
    if unpacked > LARGEST_UNASKED and unpacked > MOST_SWELLING * packed:
        raise BadInput(
            f"{path} would grow from {packed / 1e6:.1f} to {unpacked / 1e6:.0f} MB: such a file is no statistics."
        )


def build_reference(source: FeatureSource, files: Sequence[Path], *, batch: int = 32) -> Reference:
    """Statistics of picture files, read one batch at a time and sent through the same code as generated pictures."""
    if len(files) < 2:
        raise BadInput(f"Reference statistics need at least 2 pictures, found {len(files)}.")
    parts = []
    for start in tqdm(range(0, len(files), batch), desc="reference", unit="batch", disable=None):
        parts.append(source([read_rgb(path) for path in files[start : start + batch]]))
    pictures = digest([file_digest(path) for path in files])
    return Reference.of_features(np.concatenate(parts), {"extractor": source.fingerprint, "pictures": pictures})


def find_reference(
    source: FeatureSource, reference: str, pictures: str | None, *, batch: int = 32, trust: bool = False
) -> Reference:
    """The statistics that a metric is configured with.

    `reference` is an .npz, a folder of them named by extractor, or a text file that lists pictures of the folder
    `pictures`, one a line. An .npz made by
    another extractor (or by another tool, which does not say: `trust` takes it nevertheless) is refused, since a
    Fréchet distance between differently prepared pictures measures the preparation.
    """
    path = find_file(reference)
    if path.is_dir():
        path = path / f"{source.key}.npz"
        if not path.is_file():
            raise MissingObject(
                f"The statistics {reference} hold none of this extractor ({source.key}), or another version did.\n"
                "Build them again: python pipelines/evaluate.py action=reference …"
            )
    if path.suffix != ".npz":
        if pictures is None:
            raise MissingObject(f"{path} lists pictures, but no folder was named.\nGive `pictures`, or an .npz file.")
        return build_reference(source, listed(path, find_file(pictures)), batch=batch)
    found = Reference.read(path)
    if found.d != source.d:
        raise BadInput(f"{path} has {found.d} features, the extractor gives {source.d}.")
    if found.about is None and not trust:
        raise BadInput(
            f"{path} does not say which network and which resize made it (pytorch-fid's files do not).\n"
            "Build them again (action=reference); FID alone can trust them: suite.metrics.fid.trust_reference=true."
        )
    if found.about is not None and canonical_json(found.about["extractor"]) != canonical_json(source.fingerprint):
        unlike = [key for key, value in source.fingerprint.items() if found.about["extractor"].get(key) != value]
        raise BadInput(
            f"{path} was made by another extractor: it differs in {', '.join(unlike) or 'its fields'}.\n"
            "Build the statistics again: python pipelines/evaluate.py action=reference …"
        )
    return found


def listed(reference: Path, pictures: Path) -> list[Path]:
    """The picture files that a list names; raises BadInput or MissingObject for a list that cannot serve."""
    names = [line.strip() for line in reference.read_text().splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(
            f"{reference} must name at least 2 pictures, each once; found {len(set(names))} of {len(names)}."
        )
    files = [pictures / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise MissingObject(f"{len(missing)} of {len(files)} reference pictures are not in {pictures}: {missing[:3]} …")
    return files
