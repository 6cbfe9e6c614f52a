"""The dashboard and the review page in a real browser: headless Chromium, driven by docs/ui_screenshots.py."""

import json
import os
import runpy
import shutil
import socket
from pathlib import Path

import pytest

from ambergrade.nouns import Measurement
from ambergrade.track.journal import Journal
from ambergrade.track.ui import deep_link, run_link

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SHOTS = runpy.run_path(str(REPOSITORY / "docs" / "ui_screenshots.py"))
EXPERIMENT = "gamma_tiny"
MANY = 1000

ROWS = """(() => {
  const rows = {};
  for (const row of document.querySelectorAll('.ag-row[row-index]')) {
    const cells = rows[row.getAttribute('row-index')] ??= {};
    for (const cell of row.querySelectorAll('[col-id]')) {
      cells[cell.getAttribute('col-id')] = (cell.querySelector('a') ?? cell).innerText.trim();
    }
  }
  return Object.keys(rows).map(Number).sort((one, two) => one - two).map(number => rows[number]);
})()"""
"""The table's rows from top to bottom, each a mapping of column to text."""

CARDS = """(() => [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(card => ({
  title: card.querySelector('h4')?.textContent,
  shown: [...card.querySelectorAll('img')].filter(image => image.complete && image.naturalWidth).map(image => {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const pen = canvas.getContext('2d');
    pen.drawImage(image, 0, 0);
    let words = image;
    while (words && !words.innerText.trim()) words = words.parentElement;
    return {run: new URL(image.src).searchParams.get('run_uuid'), name: words?.innerText ?? '',
            corner: [...pen.getImageData(4, 4, 1, 1).data].slice(0, 3)};
  }),
})))()"""
"""The panels of pictures: their key, and of every picture its run, the words above it and a pixel of its corner."""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("There is no Chromium here: the dashboard is not looked at. Debian: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def root(chromium, tmp_path_factory) -> Path:
    """A chain of 25 points with pictures, and a model with lineage and alias."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("dashboard")
    SHOTS["made_up_chain"](root)
    return root


@pytest.fixture(scope="module")
def thousand(root) -> Path:
    """In the same record, a sweep of 1,000 points with 40 params and 10 metrics each."""
    journal = Journal.open(root, "thousand")
    with journal.run("a sweep of 1,000", key="thousand", kind="sweep") as sweep:
        for number in range(MANY):
            params = {f"c{k}": (number * (k + 1)) % 97 for k in range(40)}
            with journal.run(f"point {number}", key=f"p{number}", kind="point", parent=sweep, params=params) as point:
                score = score_of(number)
                point.metrics({"score": Measurement(score, score - 5, score + 5, 48), **dict.fromkeys("uvwxyz", 1.0)})
        sweep.view("sweep", "point", order_by="score", params=["c0", "c1"], metrics=["score", "score_lo", "score_hi"])
    assert not journal.troubles
    return root


def score_of(number: int) -> float:
    return float(number * 7919 % MANY)


@pytest.fixture(scope="module")
def record(root) -> dict:
    """Run ids by kind, the experiment's number, and the released model's id."""
    journal = Journal.open(root, EXPERIMENT)
    runs = journal.client.search_runs([journal.experiment_id])
    by_kind = {run.data.tags["ag.kind"]: run.info.run_id for run in runs}
    scores = {run.info.run_name: run.data.metrics.get("tag_balance") for run in runs if "a" in run.data.params}
    places = {run.info.run_id: run.data.params for run in runs if "a" in run.data.params}
    model = journal.client.get_run(by_kind["release"]).outputs.model_outputs[0].model_id
    return {**by_kind, "experiment": journal.experiment_id, "scores": scores, "places": places, "model": model}


@pytest.fixture(scope="module")
def base(root):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with SHOTS["served"](root, port) as address:
        yield address


@pytest.fixture(scope="module")
def browser(chromium):
    with SHOTS["Browser"](chromium) as browser:
        yield browser


def view_of(root: Path, experiment: str) -> tuple[str, str]:
    journal = Journal.open(root, experiment)
    found = journal.client.get_experiment(journal.experiment_id)
    key = next(tag for tag in found.tags if tag.startswith("mlflow.sharedViewState."))
    return journal.experiment_id, key.removeprefix("mlflow.sharedViewState.")


def read(browser, *words: str) -> None:
    """Wait until the page shows all of these words."""
    text = "document.body.innerText.replace(/\\s+/g, ' ')"
    browser.wait(f"{json.dumps(words)}.every(word => {text}.includes(word))")


def test_the_printed_link_opens_the_leaderboard_best_first_with_names_to_read(browser, base, root, record):
    number, view = view_of(root, EXPERIMENT)
    browser.open(deep_link(number, view=view, base=base))
    rows = browser.wait(
        f"(rows => rows.length === 25 && rows.every(row => row['metrics.`tag_balance`']) && rows)({ROWS})"
    )
    names = [row["attributes.`Run Name`"] for row in rows]
    shown = [float(row["metrics.`tag_balance`"]) for row in rows]
    assert names[0] == "a 0.8, b 0.5"
    assert set(names) == record["scores"].keys()
    assert shown == sorted(record["scores"].values(), reverse=True)
    assert shown == pytest.approx([record["scores"][name] for name in names])
    for row in rows:
        assert row["attributes.`Run Name`"] == f"a {float(row['params.`a`']):g}, b {float(row['params.`b`']):g}"
        assert float(row["metrics.`tag_balance_lo`"]) < float(row["metrics.`tag_balance`"])
    read(browser, "25 matching runs")


def test_the_same_prompt_is_shown_side_by_side_for_ten_points(browser, base, root, record):
    number, view = view_of(root, EXPERIMENT)
    browser.open(deep_link(number, view=view, base=base, chart=True))
    keyed = f"{CARDS}.filter(card => card.title?.startsWith('sweep/') && card.shown.length === 10)"
    cards = {card["title"]: card["shown"] for card in browser.wait(f"(cards => cards.length === 4 && cards)({keyed})")}
    assert sorted(cards) == ["sweep/00", "sweep/01", "sweep/02", "sweep/03"]
    best = sorted(record["scores"].values(), reverse=True)[:10]
    for title, shown in cards.items():
        assert len({picture["run"] for picture in shown}) == 10
        drawn = []
        for picture in shown:
            a, b = (float(record["places"][picture["run"]][name]) for name in "ab")
            assert f"a {a:g}, b {b:g}" in picture["name"]
            expected = (60 + 100 * a, 60 + 150 * b, 60 + 40 * int(title[-2:]))  # docs/ui_screenshots.py: picture
            assert picture["corner"] == pytest.approx(expected, abs=6)  # the UI shows a lossy copy
            drawn.append(record["scores"][f"a {a:g}, b {b:g}"])
        assert sorted(drawn, reverse=True) == pytest.approx(best)


def test_a_model_shows_its_run_its_parents_and_its_alias(browser, base, record):
    browser.open(f"{base}/#/experiments/{record['experiment']}/models/{record['model']}?workflowType=machine_learning")
    read(browser, "gamma-rev1", "Source run release gamma rev1", f"{EXPERIMENT} v1")
    assert browser.wait(f"document.querySelector('a[href*=\"{record['release']}\"]')?.innerText")

    browser.open(run_link(record["experiment"], record["release"], base))
    read(browser, "Logged models (5)", "About this run")
    table = "document.body.innerText.split('Logged models (5)').pop().split('About this run')[0]"
    browser.wait(f"['beta7', 'anxl3', 'anxl2', 'base7', 'gamma-rev1'].every(name => {table}.includes(name))")
    kinds = browser.ask(table).split()
    assert (kinds.count("Input"), kinds.count("Output")) == (4, 1)
    link = f"document.querySelector('a[href*=\"models/{record['model']}\"]')?.innerText"
    assert browser.wait(link) == "gamma-rev1"

    browser.open(f"{base}/#/models/{EXPERIMENT}/versions/1")
    formula = "gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
    read(browser, "Aliases : @ candidate", "Source Run : release gamma rev1", formula)


def test_the_page_of_a_thousand_points_opens_sorted(browser, base, thousand):
    number, view = view_of(thousand, "thousand")
    browser.open(deep_link(number, view=view, base=base))
    scored = f"{ROWS}.filter(row => row['metrics.`score`'])"  # the last row is the one that loads more
    rows = browser.wait(f"(rows => rows.length > 20 && rows)({scored})")
    shown = [float(row["metrics.`score`"]) for row in rows]
    assert shown == [MANY - 1.0 - place for place in range(len(shown))]
    for row in rows:
        assert float(row["metrics.`score`"]) == score_of(int(row["attributes.`Run Name`"].split()[1]))


def test_a_click_on_a_heading_sorts_the_review_page(chromium, browser, tmp_path):
    from ambergrade.score.comparison import Winners
    from ambergrade.score.review import Review, html_review

    better = {"p 10": 0.2, "p 9": 0.9, "p −1": 0.5}
    points = {"p 10": {"p": 10.0}, "p 9": {"p": 9.0}, "p −1": {"p": -1.0}}
    none = Measurement(0.0, 0.0, 0.0, 8, higher_is_better=False)
    scores = {name: {"prob": Measurement(value, value - 0.1, value + 0.1, 8)} for name, value in better.items()}
    scores["p 10"]["fid"] = Measurement(3.0, 2.0, 4.0, 8, higher_is_better=False)
    # axes need points that differ; the second metric is known of one point alone
    review = Review(
        "a sweep",
        "prob",
        ("prob", "fid"),
        points,
        scores,
        Winners("prob", "p 9", ("p 9",), dict.fromkeys(better, none)),
    )
    page = tmp_path / "review.html"
    page.write_text(html_review(review, review.draw(tmp_path), facts={}))
    names = "[...document.querySelectorAll('table.sorts tr')].slice(1).map(row => row.cells[1].title)"
    click = "[...document.querySelectorAll('table.sorts th')].find(head => head.textContent.startsWith({})).click()"
    browser.open(page.as_uri())
    assert browser.wait(f"document.querySelectorAll('table.sorts tr').length === 4 && {names}") == [
        "p 9",
        "p −1",
        "p 10",
    ]
    browser.ask(click.format(json.dumps("prob")))
    assert browser.ask(names) == ["p 10", "p −1", "p 9"]
    browser.ask("document.querySelectorAll('table.sorts th')[2].click()")
    assert browser.ask(names) == ["p 10", "p 9", "p −1"]  # as numbers, not as words
    browser.ask("document.querySelectorAll('table.sorts th')[2].click()")
    assert browser.ask(names) == ["p −1", "p 9", "p 10"]
    for _ in range(2):
        browser.ask(click.format(json.dumps("fid")))
        assert browser.ask(names)[0] == "p 10"  # what has no value stays last
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 300)")
