"""Score sheets: one order, one set of bytes, and no comparison of unlike numbers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.nouns import Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.score import comparison
from ambergrade.score.comparison import aggregates, differences, remarks, winners
from ambergrade.score.scoring import Metric, load_metric, score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import prompt_means

SAMPLER = SamplerSettings("ddim", 20, 5.0, 32, 48)


@pytest.fixture(scope="module")
def metrics(folders: Any) -> list[Metric]:
    return [
        load_metric("clip_score", model=str(folders.clip)),
        load_metric("tag_adherence", tagger=str(folders.tagger), groups={"warm": ["red_hair"]}),
        load_metric(
            "fid",
            extractor=str(folders.features),
            reference=str(folders.reference),
            pictures=str(folders.pictures),
            few=True,
        ),
    ]


@pytest.fixture(scope="module")
def sheet(metrics: list[Metric], prompts: PromptSet, pictures: list[Picture]) -> ScoreSheet:
    return score(iter(pictures), prompts, metrics, sampler=SAMPLER)


def darker(pictures: list[Picture]) -> list[Picture]:
    return [Picture(p.prompt_id, p.seed, p.pixels // 3) for p in pictures]


def test_a_sheet_read_back_is_the_sheet(sheet: ScoreSheet, tmp_path: Path) -> None:
    sheet.write(tmp_path / "sheet.parquet")
    back = ScoreSheet.read(tmp_path / "sheet.parquet")
    assert back.digest == sheet.digest
    assert (back.prompt_ids, back.seeds) == (sheet.prompt_ids, sheet.seeds)
    assert back.columns.keys() == sheet.columns.keys()
    for name, values in sheet.columns.items():
        np.testing.assert_array_equal(back.columns[name], values)
    for name, values in sheet.features.items():
        np.testing.assert_array_equal(back.features[name], values)
    assert aggregates(back).keys() == aggregates(sheet).keys()


def test_anyone_can_open_it_as_a_table(sheet: ScoreSheet, tmp_path: Path) -> None:
    sheet.write(tmp_path / "sheet.parquet")
    table = pq.read_table(tmp_path / "sheet.parquet").to_pandas()
    assert len(table) == 24
    assert {"prompt_id", "seed", "clip_score", "tag_balance", *sheet.features} <= set(table.columns)
    assert table["tag_prob_warm"].isna().sum() == 16


def test_the_same_sheet_is_the_same_bytes(sheet: ScoreSheet, tmp_path: Path) -> None:
    shuffled = dataclasses.replace(
        sheet, columns=dict(reversed(sheet.columns.items())), features=dict(reversed(sheet.features.items()))
    )
    sheet.write(tmp_path / "one.parquet")
    shuffled.write(tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert shuffled.digest == sheet.digest


def test_one_changed_number_changes_the_digest(sheet: ScoreSheet) -> None:
    column = sheet.columns["clip_score"].copy()
    column[3] = np.nextafter(column[3], 200)
    changed = dataclasses.replace(sheet, columns={**sheet.columns, "clip_score": column})
    assert changed.digest != sheet.digest


def test_order_and_batches_of_the_stream_do_not_matter(
    sheet: ScoreSheet, metrics: list[Metric], prompts: PromptSet, pictures: list[Picture]
) -> None:
    other = score(reversed(pictures), prompts, metrics, sampler=SAMPLER, batch=5)
    assert (other.prompt_ids, other.seeds) == (sheet.prompt_ids, sheet.seeds)
    for name in sheet.columns:
        np.testing.assert_allclose(other.columns[name], sheet.columns[name], atol=2e-4)
    differences(other, sheet)  # and they may be compared


def test_no_machine_path_is_in_a_sheet(sheet: ScoreSheet, folders: Any, tmp_path: Path) -> None:
    sheet.write(tmp_path / "sheet.parquet")
    header = str(pq.read_schema(tmp_path / "sheet.parquet").metadata)
    for word in (str(folders.clip.parent), str(Path.home()), str(Path(__file__).parents[2])):
        assert word not in header


def test_aggregates_of_a_stored_sheet_need_no_model(
    sheet: ScoreSheet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    expected = aggregates(sheet)
    sheet.write(tmp_path / "sheet.parquet")
    monkeypatch.setattr(open_clip, "create_model", refuse)
    monkeypatch.setattr(timm, "create_model", refuse)
    back = ScoreSheet.read(tmp_path / "sheet.parquet")
    found = aggregates(back)
    # nan is not equal to itself, but prints alike
    assert str(sorted(found.items())) == str(sorted(expected.items()))


def test_aggregates_count_prompts_not_pictures(sheet: ScoreSheet) -> None:
    found = aggregates(sheet)
    assert found["clip_score"].n == 12
    assert found["clip_score"].value == pytest.approx(sheet.columns["clip_score"].mean())
    assert found["tag_prob_warm"].n == 4
    assert {"fid", "tag_macro_recall", "tag_macro_recall_warm"} <= found.keys()
    assert not found["fid"].higher_is_better


def test_what_was_not_scored_is_told(sheet: ScoreSheet) -> None:
    said = remarks(sheet)
    assert "tag_recall_warm: 16 of 24 pictures not scored (left out, not counted as zero)." in said
    assert any(line.startswith("fid: 24 pictures") and "lacks rank" in line for line in said)


def test_differences_pair_by_prompt(
    sheet: ScoreSheet, metrics: list[Metric], prompts: PromptSet, pictures: list[Picture]
) -> None:
    other = score(darker(pictures), prompts, metrics, sampler=SAMPLER)
    found = differences(other, sheet)
    by_prompt = prompt_means(other.columns["clip_score"] - sheet.columns["clip_score"], sheet.prompt_ids)
    assert found["clip_score"].value == pytest.approx(by_prompt.mean())
    assert found["clip_score"].n == 12
    assert found["fid"].value == pytest.approx(aggregates(other)["fid"].value - aggregates(sheet)["fid"].value)
    assert found.keys() == aggregates(sheet).keys()


def test_winners_are_named(
    sheet: ScoreSheet, metrics: list[Metric], prompts: PromptSet, pictures: list[Picture]
) -> None:
    worse_column = sheet.columns["tag_balance"] - 0.5
    worse = dataclasses.replace(sheet, columns={**sheet.columns, "tag_balance": worse_column})
    found = winners({"a=0.6": worse, "a=0.8": sheet, "a=1.0": sheet}, "tag_balance")
    assert found.best == "a=0.8"
    assert found.members == ("a=0.8", "a=1.0")
    assert found.behind["a=0.6"].value == pytest.approx(0.5)
    with pytest.raises(UnknownName, match="Did you mean 'tag_balance'"):
        winners({"a": sheet}, "tag_balence")
    with pytest.raises(BadSetting, match="at least one point"):
        winners({}, "tag_balance")


def test_unlike_sheets_are_not_compared(
    sheet: ScoreSheet, metrics: list[Metric], folders: Any, prompts: PromptSet, pictures: list[Picture]
) -> None:
    squash = [load_metric("clip_score", model=str(folders.clip), resize_mode="squash")]
    reseeded = [Picture(p.prompt_id, p.seed + 1, p.pixels) for p in pictures]
    reworded = PromptSet("x", tuple(dataclasses.replace(p, text=p.text + "!") for p in prompts.prompts))
    fewer_steps = dataclasses.replace(SAMPLER, steps=10)
    clip = metrics[:1]
    for other, message in [
        (score(pictures, prompts, squash, sampler=SAMPLER), "resize_mode squash / longest"),
        (score(pictures[1:], prompts, clip, sampler=SAMPLER), "23 and 24 "),
        (score(reseeded, prompts, clip, sampler=SAMPLER), r"\(prompt, seed\) keys"),
        (score(pictures, reworded, clip, sampler=SAMPLER), "other text"),
        (score(pictures, prompts, clip, sampler=fewer_steps), "steps 10 / 20"),
    ]:
        with pytest.raises(BadInput, match=message):
            differences(other, sheet)
        with pytest.raises(BadInput, match="cannot be compared"):
            winners({"one": other, "two": sheet}, "clip_score")


def test_streams_that_cannot_be_scored_are_refused(metrics: list[Metric], prompts: PromptSet) -> None:
    clip = metrics[:1]
    fine = np.zeros((32, 32, 3), dtype=np.uint8)
    cases: list[tuple[list[Picture], type[Exception], str]] = [
        ([], BadInput, "empty"),
        ([Picture("p00", 1, fine), Picture("p00", 1, fine)], BadInput, "repeat"),
        ([Picture("p99", 1, fine)], UnknownName, "p99"),
        ([Picture("p00", 1, fine.astype(np.float32))], BadInput, "uint8"),  # type: ignore[arg-type]
        ([Picture("p00", 1, fine.transpose(2, 0, 1))], BadInput, "height"),
    ]
    for shown, error, message in cases:
        with pytest.raises(error, match=message):
            score(shown, prompts, clip)


def test_the_stream_is_consumed_batch_by_batch(metrics: list[Metric], prompts: PromptSet) -> None:
    """Scoring overlaps generation: no more than a batch is asked for before it is scored."""
    asked: list[int] = []
    scored: list[int] = []

    class Watching(Metric):
        name = "clip_score"
        columns = MappingProxyType({"seen": True})
        fingerprint = MappingProxyType({"weights": ""})

        def rows(self, pictures: Any, prompts: Any) -> Any:
            scored.append(len(asked))
            return {"seen": np.ones(len(pictures))}

    def stream() -> Any:
        for prompt in prompts.prompts:
            asked.append(1)
            yield Picture(prompt.id, prompt.seed, np.zeros((8, 8, 3), dtype=np.uint8))

    score(stream(), prompts, [Watching()], batch=5)
    assert scored == [5, 10, 12]


def test_another_parquet_is_not_read_as_a_sheet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(BadInput, match="not a score sheet"):
        ScoreSheet.read(tmp_path / "other.parquet")


def test_misnamed_metrics_and_settings_are_told() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'clip_score'"):
        load_metric("clip_scor")
    with pytest.raises(BadSetting, match=r"conf/metric/clip_score\.yaml"):
        load_metric("clip_score", modl="x")


def test_prompt_ids_keep_the_prompt_sets_order_not_the_alphabets(metrics: list[Metric]) -> None:
    prompts = PromptSet("o", (Prompt("z", "moon", 1), Prompt("a", "hat", 2)))
    shown = [Picture(i, 1, np.zeros((32, 32, 3), dtype=np.uint8)) for i in ("a", "z")]
    assert score(shown, prompts, metrics[:1]).prompt_ids == ("z", "a")


def test_reading_and_comparing_sheets_needs_no_networks_libraries() -> None:
    """They take seconds to import, which every report and every sweep's parent process would wait for."""
    code = """import pkgutil, sys
from ambergrade.score import comparison, metrics
from ambergrade.score.scoring import metric_class
names = [module.name for module in pkgutil.iter_modules(metrics.__path__)]
print(len([metric_class(name) for name in names]) > 9, {"torch", "timm", "open_clip"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True set()"


def test_aggregates_are_worked_out_once_a_content_and_never_for_another(
    sheet: ScoreSheet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = aggregates(sheet)
    expected.pop("clip_score")  # the caller's copy
    monkeypatch.setattr(comparison, "_aggregates", lambda sheet, seed: {"asked": seed})
    sheet.write(tmp_path / "sheet.parquet")
    assert "clip_score" in aggregates(ScoreSheet.read(tmp_path / "sheet.parquet"))
    assert aggregates(sheet, seed=1) == {"asked": 1}
    changed = dataclasses.replace(sheet, columns={**sheet.columns, "clip_score": sheet.columns["clip_score"] + 1})
    assert aggregates(changed) == {"asked": 0}
    for seed in range(2, 70):
        aggregates(sheet, seed=seed)
    assert len(comparison._known) <= 64
    comparison._known.clear()
