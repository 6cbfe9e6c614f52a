"""Papers follow from release.json, and those for whom each is written can read it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ambergrade.errors import BadInput
from ambergrade.family.digests import listed_digests, weights_sha256
from ambergrade.identity import file_digest
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import FACTS, MOST_BYTES, Draft, parse_facts, read_facts, write_facts
from ambergrade.release.licenses import load_license
from ambergrade.release.papers import differs, papers

NAME = "gamma-rev1.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draft: Draft, payload: Payload) -> Path:
    return build_release(tmp_path_factory.mktemp("release") / "out", draft, payload).path


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory, draft: Draft, payload: Payload) -> Path:
    """A release of a file that nobody knows the origin of."""
    known = {"license": "unknown", "license_why": "nobody named it", "licenses": {"unknown": load_license("unknown")}}
    given = replace(draft, recipe=None, training=None, **known)
    return build_release(tmp_path_factory.mktemp("release") / "out", given, replace(payload, as_it_is=True)).path


def test_every_paper_follows_from_the_facts_that_lie_beside_it(folder: Path, unknown: Path) -> None:
    for release in (folder, unknown):
        facts = read_facts(release)
        assert write_facts(facts) == (release / FACTS).read_text()
        texts = papers(facts)
        assert {name: (release / name).read_text() for name in texts} == texts
        listed = {*json.loads((release / "MANIFEST.json").read_text())["files"]}
        assert listed == {FACTS, facts.file, *texts, *facts.files}
    assert not {"recipe.yaml", "training.json"} & {*texts}


def test_a_changed_number_is_named_with_its_paper(folder: Path) -> None:
    facts = read_facts(folder)
    for name, text in papers(facts).items():
        assert differs(name, text.encode(), facts) == ""
        place = max(found.start() for found in re.finditer(r"\d", text))
        forged = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        line = text[:place].count("\n") + 1
        assert differs(name, forged.encode(), facts).startswith(f"{name}, line {line}: ")
        assert differs(name, text.encode() + b"more\n", facts).startswith(name)
        assert differs(name, text.encode()[:-9], facts).startswith(name)


HOSTILE: dict[str, Any] = {
    "no JSON": "{",
    "another value": "[]",
    "deep": "[" * 100_000,
    "NaN": '{"name": NaN}',
    "twice": '{"name": "a", "name": "b"}',
    "half a character": '{"name": "\\ud800"}',
    "unknown key": {"nam": "x"},
    "a name that is a path": {"name": "../x"},
    "a number for a text": {"summary": 7},
    "a licence that is not described": {"license": "mit"},
    "a text for a score": {"evaluation": "good"},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_facts_that_are_none_are_refused(tmp_path: Path, folder: Path, how: str) -> None:
    given = HOSTILE[how]
    values = json.loads((folder / FACTS).read_text())
    (tmp_path / FACTS).write_text(given if isinstance(given, str) else json.dumps({**values, **given}))
    with pytest.raises(BadInput, match=re.escape(FACTS)):
        read_facts(tmp_path)


def test_facts_are_no_link_and_no_endless_file(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadInput, match="is no release"):
        read_facts(tmp_path)
    (tmp_path / FACTS).symlink_to(folder / FACTS)
    with pytest.raises(BadInput, match="is no release"):
        read_facts(tmp_path)
    (tmp_path / FACTS).unlink()
    with (tmp_path / FACTS).open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(BadInput, match="more than"):
        read_facts(tmp_path)


def test_the_hub_reads_the_card(folder: Path, models: Path) -> None:
    from huggingface_hub import ModelCard

    read = ModelCard.load(folder / "README.md")
    assert (read.data.license, read.data.license_name) == ("other", "faipl-1.0-sd")
    assert read.data.license_link == "https://freedevproject.org/faipl-1.0-sd/"
    assert read.data.pipeline_tag == "text-to-image"
    assert read.data.base_model == ["Linaqruf/animagine-xl-2.0", "cagliostrolab/animagine-xl-3.0"]
    assert read.data.base_model_relation == "merge"
    assert {one.metric_type: one.metric_value for one in read.data.eval_results} == {"tag_recall": 0.81, "fid": 12.0}
    assert {one.dataset_name for one in read.data.eval_results} == {"heldout (48 prompts)"}
    assert read.data.widget[0]["output"]["url"] == "samples/1.png"
    text = read.content
    assert "gamma rev1   = beta7 + 0.8*(anxl3 - anxl2) + 0.5 * (base7 - beta7)" in text
    assert "| tag_recall ↑ | 0.810 [0.780, 0.840] | 0.410 [0.350, 0.470] | +0.400 [+0.330, +0.470] |" in text
    assert "measures 0.300 [0.200, 0.400] grey levels, 0.200 [0.100, 0.300] in those of beta7" in text
    assert "say nothing about real models" in text
    assert "| ![7](samples/1.png) | 1girl, smile<br>negative: nsfw | 7 |" in text
    assert "- Fair AI Public License 1.0-SD (of anxl3): What is trained or merged from this model is shared" in text
    assert "- CreativeML Open RAIL++-M License (of beta7, anxl2, base7): Give a copy of the licence" in text
    for path in models.iterdir():  # both digests, each under its name
        assert f"| `{weights_sha256(path)}` | `{file_digest(path)}` |" in text
    assert r"by Cagliostro \| Lab | faipl-1.0-sd |" in text
    for name, digest in listed_digests(folder / NAME).items():
        assert f"| {name} | `{digest}` |" in text


def test_what_was_not_scored_is_null_and_a_dash_never_zero(folder: Path) -> None:
    scores = json.loads((folder / "evaluation.json").read_text())["scores"]
    assert scores["fid"]["beta7"]["value"] is None
    row = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| fid ↓"))
    assert row == "| fid ↓ | 12.000 [11.000, 13.000] | – | – |"


def test_a_stranger_s_snippet_needs_diffusers_only(folder: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert re.findall(r"^(?:from|import) (\w+)", snippet, re.MULTILINE) == ["diffusers"]
    compile(snippet, "README.md", "exec")
    assert f'from_single_file("{NAME}", config="config", local_files_only=True)' in snippet


def test_an_unknown_origin_and_licence_are_told(unknown: Path) -> None:
    from huggingface_hub import ModelCard

    read = ModelCard.load(unknown / "README.md")
    assert read.data.license == "unknown"
    assert read.data.base_model is None
    assert "Nobody recorded how these weights were made." in read.content
    assert "The licence of a model that this one was made of is not known." in read.content
    statement = json.loads((unknown / "provenance.intoto.json").read_text())
    assert statement["predicate"]["buildDefinition"]["buildType"] == "urn:ambergrade:released-as-found:1"


def test_the_provenance_is_a_slsa_statement_whose_parameters_are_the_formula(folder: Path, models: Path) -> None:
    statement = json.loads((folder / "provenance.intoto.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert {name: file_digest(folder / name) for name in subjects} == subjects
    assert {NAME, "prompts.jsonl", "scores/released.parquet", "contact_sheet.png"} <= {*subjects}
    assert statement["predicate"].keys() == {"buildDefinition", "runDetails"}
    built = statement["predicate"]["buildDefinition"]
    required = {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert built.keys() == required
    asked = built["externalParameters"]
    assert asked["formula"] == "gamma rev1   = beta7 + a*(anxl3 - anxl2) + b * (base7 - beta7)"
    assert asked["coefficients"] == {"a": 0.8, "b": 0.5}
    inputs = {one["name"]: one["digest"] for one in built["resolvedDependencies"] if "name" in one}
    for path in models.iterdir():
        assert inputs[path.stem] == {"sha256": file_digest(path)}
    assert built["internalParameters"]["training"]["captions"] == "cd" * 32
    assert statement["predicate"]["runDetails"]["builder"]["id"]
    assert not re.search(r"\d{4}-\d\d-\d\dT", json.dumps(statement))


def test_the_bill_of_materials_passes_the_standard_s_own_schema(folder: Path, unknown: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    for release in (folder, unknown):
        text = (release / "bom.cdx.json").read_text()
        assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"machine-learning-model"', '"a model"')) is not None
    bill = json.loads((folder / "bom.cdx.json").read_text())
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "gamma", "rev1")
    assert model["hashes"] == [{"alg": "SHA-256", "content": file_digest(folder / NAME)}]
    metrics = {one["type"]: one for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["tag_recall"]["value"] == "0.81"
    assert metrics["tag_recall"]["confidenceInterval"] == {"lowerBound": "0.78", "upperBound": "0.84"}
    parts = {one["bom-ref"] for one in bill["components"]}
    assert {"parent:beta7", "pkg:pypi/numpy@2.0.0", "pkg:pypi/torch@2.13.0+cpu"} <= parts
    assert {"serialNumber", "timestamp"}.isdisjoint({*bill, *bill["metadata"]})


class Read(HTMLParser):
    """Tags and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name == "href"]
        assert {name for name, _ in attrs} <= {"href"}


def test_the_description_escapes_everything_and_drops_links_that_run_code(folder: Path, draft: Draft) -> None:
    text = (folder / "civitai.html").read_text()
    read = Read(text)
    assert read.tags <= {"h2", "h3", "p", "pre", "code", "ul", "li", "a"}
    assert all(link and link.startswith("https://") for link in read.links)
    assert "https://x.org" in read.links
    assert "javascript" not in text
    assert "&lt;script&gt;" in text
    facts = read_facts(folder)
    hostile = replace(facts, name="a <b>", author="<i>", evaluation=replace(facts.evaluation, columns=("<u>", "fid")))
    assert Read(papers(hostile)["civitai.html"]).tags == read.tags


def test_the_card_s_tables_hold_no_html_of_others(folder: Path) -> None:
    facts = read_facts(folder)
    sample = replace(facts.samples[0], text="<script>|`x`\n# head")
    text = papers(replace(facts, samples=(sample,)))["README.md"].partition("## Samples")[2].partition("## Use")[0]
    assert "<script>" not in text
    terms = {name: replace(one, url="javascript:alert(1)") for name, one in facts.licenses.items()}
    assert "javascript" not in papers(replace(facts, licenses=terms))["README.md"].partition("## Licence")[2]
    assert "| &lt;script&gt;\\|`x` # head" in text


def test_the_packages_are_those_of_a_requirements_file(folder: Path) -> None:
    lines = (folder / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == ["ambergrade==0.1.0", "numpy==2.0.0", "torch==2.13.0+cpu"]
    assert parse_facts((folder / FACTS).read_bytes()).environment.isa == "AVX2"
