"""Input that means harm, or nothing: formulas, recipe files, headers and pickles end in an error of ours, soon.

Every case has 2 s of CPU and 100 MB, and leaves nothing under the output's name. Headers have a test of their own in
`test_files`.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ambergrade.errors import AmbergradeError
from ambergrade.merge.engine import merge
from ambergrade.merge.files import RECIPE, read_recipe, verify

SECONDS, BYTES = 2.0, 100 << 20
MODELS = {"x": "x.safetensors", "y": "y.safetensors"}
GOOD = {"formula": "mine = x + a * (y - x)", "models": MODELS, "coefficients": {"a": 0.5}, "out": "out.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models; merged once, so that what is imported on the way is not charged to a case."""
    made = tmp_path_factory.mktemp("hostile")
    for alias, file in MODELS.items():
        save_file({"model.w": torch.arange(24.0).reshape(4, 6).half() * (1 + len(alias))}, made / file)
    assert run(made, json.dumps(GOOD)) == "merged"
    verify(made / "out.safetensors", made, cache=made / "cache.json")
    return made


def run(folder: Path, recipe: str | bytes) -> str:
    """Read and merge a recipe file; what came of it. Anything but a merge or an error of ours is raised."""
    file, out = folder / "recipe.yaml", folder / "out.safetensors"
    file.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode("utf-8", "surrogatepass"))
    out.unlink(missing_ok=True)
    try:
        written = read_recipe(file)
        if written.out is None or written.out != out:
            return "read"
        merge(written.job(), out, threads=1)
    except AmbergradeError as error:
        return "refused" if str(error) and not out.exists() else "half done, or told nothing"
    return "merged"


def bounded(case: Callable[[], Any], what: str) -> Any:
    """Run a case and hold it to its time and memory, as the kernel counts them."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.process_time()
    try:
        return case()
    finally:
        assert time.process_time() - start < SECONDS, what[:300]
        assert _resident("VmHWM") - before < BYTES, what[:300]


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


deep = 10_000
FORMULAS = [
    "(" * deep + "x" + ")" * deep,
    "(" * deep,
    ")" * deep,
    "-" * deep + "x",
    "x" + " + 0 * (y - x)" * deep,
    "x" + " / 1e999" * 400,
    "x * 1e999 / 1e999",
    "x * " + "9" * deep,
    "x * 0." + "3" * deep,
    "x + " + " * ".join(["(a + b + c + d)"] * 12) + " * (y - x)",
    "x + " + " * ".join(f"(c{k} + d{k})" for k in range(60)) + " * (y - x)",
    "\n".join(["l0 = x"] + [f"l{k} = 0.3 * l{k - 1} + 0.7 * l{k - 1}" for k in range(1, 199)]),
    "\n".join(["l0 = x"] + [f"l{k} = l{k - 1} + a{k} * (l{k - 1} - l{k - 1})" for k in range(1, 199)]),
    "\n" * deep + "x",
    "x # " + "comment " * 5000,
    "__import__('os').system('touch harm')",
    "x.__class__.__mro__[1].__subclasses__()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "lambda: x",
    "x if x else y",
    "x := y",
    "{x}",
    "f'{x}'",
    "at('" + "*" * 2000 + "q', x, else=y)",
    "at('" + "[" * 2000 + "', x, else=y)",
    "at('" + "?*" * 300 + "', x, else=y)",
    'mbw(x, y, "' + "1," * 20_000 + '", dialect="supermerger")',
    'mbw(x, y, "1e999,' + "0," * 18 + '0", dialect="supermerger")',
    "lora('/etc/passwd', 1)",
    "x + lora('../../../../etc/passwd', 1)",
    "ties(" + ", ".join(["x"] * 5000) + ")",
    "unet(" * 60 + "x" + ")" * 60,
    "x\0",
    "x\u202e + y",
    "\ud800",
    "𝓍",
]


@pytest.mark.parametrize("number", range(len(FORMULAS)))
def test_formulas_that_mean_harm(folder: Path, number: int) -> None:
    formula = FORMULAS[number]
    came = [bounded(lambda: run(folder, json.dumps({**GOOD, "formula": formula})), formula)]
    names = (
        "a",
        "b",
        "c",
        "d",
        *(f"{letter}{k}" for letter in "cd" for k in range(60)),
        *(f"a{k}" for k in range(199)),
    )
    values = {**GOOD, "formula": formula, "coefficients": {name: 0.5 for name in names if name in formula}}
    came.append(bounded(lambda: run(folder, json.dumps(values)), formula))
    assert set(came) <= {"refused", "merged"}
    assert not (folder / "harm").exists()
    assert not Path("harm").exists()


_LAUGHS = "\n".join(["a0: &a0 ha"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)])
_MERGED = "\n".join(
    ["a0: &a0 {k: 1}"] + [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}" for k in range(1, 12)]
)
RECIPES: list[str | bytes] = [
    b"",
    b"\xff\xfe\0\0",
    b"\0" * 1000,
    "[" * deep,
    "{a: " * deep,
    "- " * deep,
    "formula: x\n" * 5000,
    "a: [" + "1, " * 15_000 + "]",
    "formula: " + "x" * 1_000_000,
    _LAUGHS + "\nformula: *a11\nmodels: {}",
    _MERGED + "\nformula: x",
    "formula: !!python/object/apply:os.system ['touch harm']",
    "!!python/object/new:os.system [touch harm]",
    *(f"formula: !!{tag} '{text}'" for tag in ("bool", "int", "float", "timestamp", "binary") for text in ("", "q")),
    "formula: 2026-13-45",
    "formula: 1" + "0" * 5000,
    "formula: x\nmodels: {x: x.safetensors}\ncoefficients: {a: 1" + "0" * 400 + "}",
    "formula: x\nmodels: {x: x.safetensors}\ncoefficients: {a: .nan}",
    "? [a]\n: b",
    "? {a: b}\n: c",
    "formula: x\n---\nformula: y",
    "%YAML 9.9\n---\nformula: x",
]
_ODD: list[Any] = [None, True, 0, -1, 1.5, float("inf"), "", "x", "\0", [], [1], {}, {"x": 1}, {"x": None}, {"x": []}]
RECIPES += [json.dumps({**GOOD, key: value}) for key in (*GOOD, "dtype", "policies", "more") for value in _ODD]
RECIPES += [
    json.dumps({**GOOD, "models": {"x": place, "y": "y.safetensors"}}) for place in ("/", "~", "/dev/zero", "\0")
]


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipe_files_that_mean_harm(folder: Path, number: int) -> None:
    recipe = RECIPES[number]
    came = bounded(lambda: run(folder, recipe), repr(recipe))
    assert came in ("refused", "read", "merged")
    assert not (folder / "harm").exists()
    assert not Path("harm").exists()


_DOCUMENT = {
    "formula": "mine = x + a * (y - x)",
    "coefficients": {"a": 0.5},
    "inputs": {"x": "0" * 64, "y": "1" * 64},
    "dtype": None,
    "policies": {},
}
HEADERS = ["", "[]", "null", "{", "[" * deep, "1" * 5000, '{"formula": 1}', json.dumps(_DOCUMENT)[:-9]]
HEADERS += [json.dumps({**_DOCUMENT, key: value}) for key in _DOCUMENT for value in _ODD]
HEADERS += [json.dumps({**_DOCUMENT, "formula": formula}) for formula in FORMULAS]


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_recipes_in_headers_that_mean_harm(folder: Path, number: int, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    try:
        save_file({"model.w": torch.zeros(2)}, model, {RECIPE: HEADERS[number]})
    except UnicodeEncodeError:
        return  # no header can hold it

    def case() -> str:
        try:
            found = verify(model, folder, threads=1, cache=tmp_path / "cache.json")
        except AmbergradeError:
            return "refused"
        return "same" if found.same else "differs"

    assert bounded(case, HEADERS[number]) in ("refused", "differs")


class Harm:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "legacy", *(f"protocol {number}" for number in range(6))])
def test_a_pickle_under_another_name_is_refused_and_not_run(folder: Path, tmp_path: Path, kind: str) -> None:
    mark, bad = tmp_path / "harm", tmp_path / "x.safetensors"
    weights = {"model.w": torch.zeros(4, 6), "more": Harm(mark)}
    if kind in ("zip", "legacy"):
        torch.save(weights, bad, _use_new_zipfile_serialization=kind == "zip")
    else:
        bad.write_bytes(pickle.dumps(weights["more"], protocol=int(kind[-1])))
    recipe = json.dumps({**GOOD, "models": {"x": str(bad), "y": "y.safetensors"}})
    assert bounded(lambda: run(folder, recipe), kind) == "refused"
    assert not mark.exists()


TOKENS = "x y z a b ( ) + - * / , = 0.5 1 1e9 'x' \"*\" at( mbw( lora( unet( vae( ties( slerp( else= weight= \n # . [ é"


def soup(rng: random.Random) -> str:
    """Tokens of formulas in any order, most of them nonsense, some a formula."""
    return rng.choice(["", " "]).join(rng.choices(TOKENS.split(" "), k=rng.randrange(1, 40)))


def mutated(rng: random.Random) -> bytes:
    """A good recipe file with something cut, doubled, swapped or replaced."""
    text = bytearray(rng.choice([yaml.safe_dump(GOOD), json.dumps(GOOD)]).encode())
    for _ in range(rng.randrange(6)):
        place, other = rng.randrange(len(text)), rng.randrange(len(text))
        kind = rng.randrange(4)
        if kind == 0:
            text[place] = rng.randrange(256)
        elif kind == 1:
            del text[place : place + rng.randrange(20)]
        elif kind == 2:
            text[place:place] = text[other : other + 20]
        else:
            text[place:place] = rng.choice([b"*a", b"&a", b"!!", b"\n", b"\t", b"{", b"]", b": ", b"- ", b"|", b"<<: "])
        if not text:
            break
    return bytes(text)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_formulas_and_recipe_files_end_in_an_error_or_in_a_merge(folder: Path, count: int) -> None:
    rng = random.Random(count)
    came = []
    for number in range(count):
        recipe = mutated(rng) if number % 2 else json.dumps({**GOOD, "formula": soup(rng)}).encode()
        came.append(bounded(functools.partial(run, folder, recipe), repr(recipe)))
    assert came.count("refused") > count // 2
    assert came.count("merged") > count // 200  # some mutations do no harm, so the good way was really reached
