"""What every conf/metric/*.yaml promises; subjects are found by listing the folder."""

from __future__ import annotations

import inspect
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ambergrade.identity import canonical_json
from ambergrade.nouns import Measurement, Picture, Prompt, PromptSet
from ambergrade.score.comparison import aggregates, differences, remarks
from ambergrade.score.scoring import Metric, load_metric, metric_class, score

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "conf" / "metric").glob("*.yaml"))
SUITES = sorted((ROOT / "conf" / "suite").glob("*.yaml"))
MODULES = sorted((ROOT / "src" / "ambergrade" / "score" / "metrics").glob("[a-z]*.py"))
MAKE = runpy.run_path(str(ROOT / "tests" / "score" / "tiny_scorers.py"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: Any) -> dict[str, str]:
    """A tiny file for every source that a yaml may name."""
    root = tmp_path_factory.mktemp("contract")
    reference = MAKE["make_pictures"](root / "real", 40)
    return {
        "builtin://clip": str(MAKE["make_clip"](root / "clip")),
        "builtin://tagger": str(MAKE["make_tagger"](root / "tagger")),
        "builtin://features": str(MAKE["make_timm"](root / "features", 2)),
        "aesthetic.model": str(MAKE["make_timm"](root / "grades", 7)),
        "preference.model": str(root / "clip"),
        "tagger_agreement.second": str(MAKE["make_tagger"](root / "second", seed=7)),
        "reference": str(reference),
        "pictures": str(reference.parent / "pictures"),
    }


def settings_of(path: Path, stand_ins: dict[str, str]) -> dict[str, Any]:
    settings = yaml.safe_load(path.read_text())

    def file_for(key: str, value: Any) -> Any:
        if value == "???":
            return stand_ins.get(f"{path.stem}.{key}") or stand_ins[key]
        return stand_ins.get(str(value).replace("${suite.networks.", "builtin://").rstrip("}"), value)

    found = {key: file_for(key, value) for key, value in settings.items()}
    more = {"pictures": stand_ins["pictures"]} if "reference" in settings else {}
    return {**found, **more, **({"few": True} if "few" in settings else {})}


@pytest.fixture(scope="module", params=YAMLS, ids=lambda path: path.stem)
def path(request: Any) -> Any:
    return request.param


@pytest.fixture(scope="module")
def metric(path: Path, stand_ins: dict[str, str]) -> Metric:
    return load_metric(**settings_of(path, stand_ins))


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return PromptSet(
        "contract",
        tuple(Prompt(f"p{k}", f"1girl, red hair, {k}", k, tags=("1girl",), unwanted=("red_hair",)) for k in range(6)),
    )


@pytest.fixture(scope="module")
def pictures(prompts: PromptSet) -> list[Picture]:
    rng = np.random.default_rng(0)
    sizes = [(32, 32, 3), (48, 32, 3), (32, 48, 3)]
    return [
        Picture(p.id, p.seed, rng.integers(0, 256, size=sizes[k % 3], dtype=np.uint8))
        for k, p in enumerate(prompts.prompts)
    ]


def test_every_metric_has_a_yaml_and_every_yaml_a_metric() -> None:
    names = [path.stem for path in MODULES]
    assert [path.stem for path in YAMLS] == names
    assert len(names) >= 3


def test_a_yamls_keys_are_the_constructors(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("name") == path.stem
    parameters = set(inspect.signature(metric_class(path.stem)).parameters)
    assert settings.keys() <= parameters
    assert parameters - settings.keys() <= {"device", "batch"}  # where and how fast, not what


def test_columns_and_features_have_one_row_a_picture(
    metric: Metric, prompts: PromptSet, pictures: list[Picture]
) -> None:
    rows = metric.rows(pictures, prompts.by_id())
    assert metric.columns.keys() <= rows.keys()
    for name, values in rows.items():
        if name in metric.columns:
            assert values.shape == (6,)
        else:
            assert name.startswith((f"{metric.name}.", "features."))
            assert values.ndim == 2
            assert len(values) == 6


def test_a_pictures_row_does_not_depend_on_its_neighbours(
    metric: Metric, prompts: PromptSet, pictures: list[Picture]
) -> None:
    whole = metric.rows(pictures, prompts.by_id())
    for k, picture in enumerate(pictures):
        for name, values in metric.rows([picture], prompts.by_id()).items():
            np.testing.assert_allclose(values[0], whole[name][k], rtol=1e-4, atol=1e-3, err_msg=name)


def test_scoring_leaves_the_pictures_alone_and_repeats_bit_for_bit(
    metric: Metric, prompts: PromptSet, pictures: list[Picture]
) -> None:
    before = [picture.pixels.copy() for picture in pictures]
    one, two = score(pictures, prompts, [metric]), score(pictures, prompts, [metric])
    assert one.digest == two.digest
    for picture, pixels in zip(pictures, before, strict=True):
        np.testing.assert_array_equal(picture.pixels, pixels)


def test_fingerprint_and_constants_are_plain_json_without_paths(
    metric: Metric, prompts: PromptSet, stand_ins: dict[str, str]
) -> None:
    text = canonical_json([metric.fingerprint, metric.constants(prompts.by_id())])
    assert json.loads(text)
    assert str(Path(stand_ins["builtin://clip"]).parent) not in text
    assert metric.fingerprint["weights"] == "none" or len(metric.fingerprint["weights"]) == 64


def test_other_weights_are_another_fingerprint(
    path: Path, metric: Metric, stand_ins: dict[str, str], tmp_path: Path
) -> None:
    if metric.fingerprint["weights"] == "none":
        pytest.skip("it has no weights")
    other = dict(stand_ins)
    other["builtin://clip"] = str(MAKE["make_clip"](tmp_path / "clip", seed=1))
    other["builtin://features"] = str(MAKE["make_timm"](tmp_path / "features", 2, seed=1))
    other["builtin://tagger"] = str(MAKE["make_tagger"](tmp_path / "tagger", seed=1))
    other["aesthetic.model"] = str(MAKE["make_timm"](tmp_path / "grades", 7, seed=1))
    other["preference.model"] = other["builtin://clip"]
    assert load_metric(**settings_of(path, other)).fingerprint["weights"] != metric.fingerprint["weights"]


def test_set_level_values_and_their_differences_match(
    metric: Metric, prompts: PromptSet, pictures: list[Picture]
) -> None:
    sheet = score(pictures, prompts, [metric])
    found, apart = aggregates(sheet), differences(sheet, sheet)
    assert found.keys() == apart.keys() >= metric.columns.keys()
    for name, value in found.items():
        assert isinstance(value, Measurement)
        if np.isnan(value.value):  # a number that is not given is told by name
            assert any(name in line for line in remarks(sheet)), name
            continue
        if np.isnan(value.low):  # biased at every n, or of too few pictures
            assert name in getattr(metric, "biased", ()) or any(metric.name in line for line in remarks(sheet)), name
        else:
            assert value.low <= value.value <= value.high, name
        assert apart[name].value == 0
        assert apart[name].verdict == "undecided"
        assert apart[name].higher_is_better == value.higher_is_better


@pytest.mark.parametrize("suite_path", SUITES, ids=lambda path: path.stem)
def test_a_suite_composes_to_metrics_by_name(suite_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        suite: Any = OmegaConf.to_container(compose(overrides=[f"+suite={suite_path.stem}"]))
    for name, settings in suite["suite"]["metrics"].items():
        assert settings["name"] == name
        metric_class(name)
    assert suite["suite"]["metrics"]


def test_one_setting_names_the_network_of_every_metric_of_its_kind_and_one_metric_may_have_its_own() -> None:
    given = {"clip": "my/clip", "tagger": "my/wd", "features": "my/timm"}
    overrides = [f"suite.networks.{kind}={path}" for kind, path in given.items()]
    overrides += ["+metric@suite.metrics.tagger_agreement=tagger_agreement", "suite.metrics.tagger_agreement.second=b"]
    overrides += ["suite.metrics.kid.extractor=own", "reference=r.npz"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        made: Any = OmegaConf.to_container(compose("evaluate", ["suite=full", *overrides]).suite, resolve=False)
        suite = compose("evaluate", ["suite=full", *overrides]).suite
    found = {name: {key: suite.metrics[name][key] for key in one} for name, one in made["metrics"].items()}
    found["control_response"] = {"extractor": suite.contrast.extractor}
    networks = {
        name: one.get("model") or one.get("tagger") or one.get("extractor")
        for name, one in found.items()
        if name != "mosaic"
    }
    assert networks == {
        **dict.fromkeys(("clip_score", "cmmd"), "my/clip"),
        **dict.fromkeys(("tag_adherence", "tagger_agreement"), "my/wd"),
        **dict.fromkeys(("fid", "mind", "prdc", "control_response"), "my/timm"),
        "kid": "own",
    }
