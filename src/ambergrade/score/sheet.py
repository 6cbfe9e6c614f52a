"""ScoreSheet: one row per picture, from which every aggregate can be recomputed without a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ambergrade.errors import BadInput, MissingObject
from ambergrade.identity import canonical_json
from ambergrade.score.reference import Reference
from ambergrade.store import written_aside

_HEADER = b"ambergrade.score_sheet"
_REFERENCE = "reference."
MOST_BYTES = 2 << 30
"""A sheet's columns take at most so much; 50,000 pictures with 2048 features each have 0.4 GB."""
MOST_ROWS = 1_000_000
_DAMAGED = (
    *(pa.ArrowException, OSError, LookupError, TypeError, ValueError),
    *(AttributeError, ArithmeticError, AssertionError, MemoryError, RecursionError),
)
"""What pyarrow, JSON and numpy raise for bytes that `ScoreSheet.write` has not written."""


@dataclass(frozen=True, eq=False)
class ScoreSheet:
    """Scores of n pictures. Rows stand in the order of the prompt set, then by seed."""

    prompt_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: Mapping[str, npt.NDArray[np.float64]]
    """Name to (n,): one number a picture; NaN is not scored, which is counted and never zero."""
    features: Mapping[str, npt.NDArray[np.float32]]
    """`metric.what` to (n, d): what set-level aggregates are computed from."""
    higher_is_better: Mapping[str, bool]
    """For every column."""
    fingerprints: Mapping[str, Mapping[str, Any]]
    """Metric to what made its numbers: weights, preprocessing, reference, library versions. No paths."""
    constants: Mapping[str, Mapping[str, Any]]
    """Metric to what its aggregates need beside the rows, as plain JSON (names of tags, a reference's digest)."""
    sampler: Mapping[str, Any]
    """How the pictures were sampled; empty for pictures that were not."""
    prompts_digest: str
    """Over the prompts in row order: text, negative, tags."""
    references: Mapping[str, Reference] = field(default_factory=dict)
    """Reference statistics by digest, so that a sheet needs no other file."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """`<prompt id> <seed>` of pictures that are none, to the reason; their rows are NaN."""
    blank: tuple[str, ...] = ()
    """`<prompt id> <seed>` of pictures of one single colour; they are scored like any other."""

    @property
    def n(self) -> int:
        """Pictures."""
        return len(self.prompt_ids)

    @property
    def sound(self) -> npt.NDArray[np.bool_]:
        """(n,): rows of pictures without a fault."""
        keys = zip(self.prompt_ids, self.seeds, strict=True)
        return np.array([f"{prompt_id} {seed}" not in self.faults for prompt_id, seed in keys], dtype=np.bool_)

    def rows(self, keep: npt.NDArray[np.bool_]) -> ScoreSheet:
        """The sheet of some of its pictures."""
        if keep.all():
            return self
        places = np.flatnonzero(keep)
        return replace(
            self,
            prompt_ids=tuple(self.prompt_ids[k] for k in places),
            seeds=tuple(self.seeds[k] for k in places),
            columns={name: values[keep] for name, values in self.columns.items()},
            features={name: values[keep] for name, values in self.features.items()},
            faults={},
        )

    @cached_property
    def digest(self) -> str:
        """sha256 over rows, features, fingerprints and constants."""
        whole = hashlib.sha256(canonical_json([self._header(), self.prompt_ids, self.seeds]).encode())
        for arrays in (self.columns, self.features):
            for name in sorted(arrays):
                whole.update(canonical_json([name, arrays[name].shape]).encode())
                whole.update(np.ascontiguousarray(arrays[name]).tobytes())
        return whole.hexdigest()

    def write(self, path: Path) -> None:
        """Write parquet; the same content gives the same bytes (with the same pyarrow)."""
        arrays: dict[str, Any] = {"prompt_id": pa.array(self.prompt_ids, pa.string())}
        arrays["seed"] = pa.array(self.seeds, pa.int64())
        arrays |= {name: pa.array(self.columns[name], pa.float64()) for name in sorted(self.columns)}
        for name in sorted(self.features):
            values = np.ascontiguousarray(self.features[name], dtype=np.float32)
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for key, reference in sorted(self.references.items()):
            parts = {"mean": reference.mean, "covariance": reference.covariance, "features": reference.features}
            arrays |= {
                f"{_REFERENCE}{key}.{part}": _in_first_row(x, self.n) for part, x in parts.items() if x is not None
            }
        table = pa.table(arrays).replace_schema_metadata({_HEADER: canonical_json(self._header()).encode()})
        with written_aside(path) as aside:
            pq.write_table(table, aside, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> ScoreSheet:
        """Read what `write` wrote, with suspicion. Raises BadInput for anything else, naming the file."""
        try:
            table = _read_table(path)
            sheet = cls._of_table(table, json.loads(table.schema.metadata[_HEADER]))
        except FileNotFoundError:
            raise MissingObject(f"No score sheet at {path}.") from None
        except _DAMAGED as error:
            told = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise BadInput(
                f"{path} is not a score sheet, or not a whole one: {told}.\nScore the pictures again."
            ) from None
        return sheet

    @classmethod
    def _of_table(cls, table: pa.Table, header: dict[str, Any]) -> ScoreSheet:
        canonical_json(header).encode()  # refuses infinities, NaN and halves of characters
        feature_names, abouts = header.pop("features"), header.pop("references")
        columns = {name: table.column(name).to_numpy().astype(np.float64) for name in header["higher_is_better"]}
        features = {
            name: table.column(name).combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            for name in feature_names
        }
        prompt_ids, seeds = table.column("prompt_id").to_pylist(), table.column("seed").to_pylist()
        references = {key: _reference(table, key, about) for key, about in abouts.items()}
        header["blank"] = tuple(header.get("blank", ()))
        sheet = cls(tuple(prompt_ids), tuple(seeds), columns, features, **header, references=references)
        _check_kinds(sheet)
        return sheet

    def _header(self) -> dict[str, Any]:
        return {
            "higher_is_better": self.higher_is_better,
            "fingerprints": self.fingerprints,
            "constants": self.constants,
            "sampler": self.sampler,
            "prompts_digest": self.prompts_digest,
            "features": sorted(self.features),
            "references": {key: reference.about for key, reference in self.references.items()},
            **({"faults": self.faults} if self.faults else {}),
            **({"blank": self.blank} if self.blank else {}),
        }


@contextmanager
def suspected(what: str) -> Iterator[None]:
    """Tell as BadInput what a metric raises over sheets from elsewhere, whose header may say what no scorer said."""
    try:
        yield
    except _DAMAGED as error:
        told = (str(error).splitlines() or [""])[0][:120]
        raise BadInput(f"{what} cannot be read as scores: {type(error).__name__} {told}.") from None


def _read_table(path: Path) -> pa.Table:
    """Read a parquet file, unless it says of itself that it is no score sheet or too large for one."""
    with pq.ParquetFile(path) as file:
        about = file.metadata
        if _HEADER not in (file.schema_arrow.metadata or {}):
            raise ValueError(f"its header lacks {_HEADER.decode()}")
        size = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        if size > MOST_BYTES or not 0 < about.num_rows <= MOST_ROWS:
            raise ValueError(f"it has {about.num_rows:,} rows of {size:,} bytes")
        return file.read()


def _check_kinds(sheet: ScoreSheet) -> None:
    """Raise TypeError or ValueError where a file's header holds other kinds of values than `write` puts there."""
    rows = [*map(len, sheet.columns.values()), *map(len, sheet.features.values())]
    texts = [*sheet.prompt_ids, *sheet.blank, *sheet.faults.values(), sheet.prompts_digest]
    tables = [sheet.sampler, *sheet.fingerprints.values(), *sheet.constants.values(), sheet.faults]
    if {*rows} - {sheet.n} or len(sheet.seeds) != sheet.n:
        raise ValueError("its columns have unequal lengths")
    if not all(type(text) is str for text in texts) or {*map(type, sheet.seeds)} != {int}:
        raise TypeError("its prompt ids are no texts, or its seeds no whole numbers")
    if not all(isinstance(one, dict) for one in tables) or {*map(type, sheet.higher_is_better.values())} - {bool}:
        raise TypeError("its header is damaged")


def _in_first_row(values: npt.NDArray[Any], rows: int) -> pa.ListArray:
    """A whole array as the first row's list; metadata would hold it in base64, twice."""
    offsets = pa.array([0] + [values.size] * rows, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).ravel()))


def _reference(table: pa.Table, key: str, about: Mapping[str, Any] | None) -> Reference:
    def part(name: str) -> npt.NDArray[Any] | None:
        whole = f"{_REFERENCE}{key}.{name}"
        return table.column(whole)[0].values.to_numpy() if whole in table.column_names else None

    mean, covariance, features = part("mean"), part("covariance"), part("features")
    if mean is None or covariance is None:
        raise ValueError(f"the reference {key} is not whole")
    d = len(mean)
    return Reference(mean, covariance.reshape(d, d), None if features is None else features.reshape(-1, d), about)


def refuse_unlike(sheet: ScoreSheet, baseline: ScoreSheet, *, other_batch: bool = False) -> None:
    """Raise BadInput unless both sheets hold the same (prompt, seed, sampler) rows scored by the same scorers.

    The batch is part of the sampler, since kernels round otherwise in other shapes; `other_batch` lets it differ.
    """
    complaints = []
    if (sheet.prompt_ids, sheet.seeds) != (baseline.prompt_ids, baseline.seeds):
        ours = set(zip(sheet.prompt_ids, sheet.seeds, strict=True))
        theirs = set(zip(baseline.prompt_ids, baseline.seeds, strict=True))
        odd = sorted(ours ^ theirs)[:3]
        complaints.append(f"pictures: {len(ours)} and {len(theirs)} (prompt, seed) keys, unlike in {odd} …")
    elif sheet.prompts_digest != baseline.prompts_digest:
        complaints.append("prompts: equal ids, but other text, negatives or tags")
    drawn, other = ({k: v for k, v in s.sampler.items() if k != "batch" or not other_batch} for s in (sheet, baseline))
    if canonical_json(drawn) != canonical_json(other):
        complaints.append(f"sampler: {_unlike(drawn, other)}")
    for metric in sorted(sheet.fingerprints.keys() & baseline.fingerprints.keys()):
        ours_made, theirs_made = sheet.fingerprints[metric], baseline.fingerprints[metric]
        if canonical_json(ours_made) != canonical_json(theirs_made):
            complaints.append(f"{metric}: {_unlike(ours_made, theirs_made)}")
    if complaints:
        raise BadInput(
            "These score sheets cannot be compared:\n  "
            + "\n  ".join(complaints)
            + "\nScore both with the same suite, on the same prompts, seeds and sampler."
        )


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """`steps 20 / 28, name 'ddim' / 'euler'` for the keys that differ."""
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} {_short(ours.get(key))} / {_short(theirs.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
