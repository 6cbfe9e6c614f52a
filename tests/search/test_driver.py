"""The driver with evaluators of one line: what is asked, told, recalled and said, for sweeps and for races."""

import json
import math
import os

import numpy as np
import pytest

from ambergrade.errors import BadSetting
from ambergrade.search.driver import Driver, Job, Outcome, attempt, in_process
from ambergrade.search.folder import SweepFolder, job_of, write_outcome
from ambergrade.search.load import search


def label(point):
    return ", ".join(f"{name} {value:g}" for name, value in point.items())


def grid(*values):
    return search("grid", values={"a": list(values)}, objective="x")


def driver(chosen, evaluate, **more):
    said = []
    made = Driver(chosen, in_process(evaluate), label, say=said.append, **more)
    return made, said


def test_every_point_is_evaluated_once_and_the_best_is_known():
    drawn = []
    made, said = driver(grid(1, 3, 2), lambda job: drawn.append(job.label) or job.point["a"])
    swept = made.sweep()
    assert drawn == ["a 1", "a 3", "a 2"]
    assert swept.best == ({"a": 3.0}, 3.0)
    assert [trial.outcome.score for trial in swept.trials] == [1, 3, 2]
    assert not said
    assert swept.failure_table == ""


def test_a_point_that_fails_has_its_whole_reason_and_the_others_go_on():
    def evaluate(job):
        if job.point["a"] == 2:
            raise BadSetting("the first line\nand the rest")
        if job.point["a"] == 3:
            raise SystemExit(3)
        return {"score": job.point["a"], "rows": [1.0]}

    swept = driver(grid(1, 2, 3, 4), evaluate)[0].sweep()
    assert [trial.job.label for trial in swept.done] == ["a 1", "a 4"]
    refused, left = swept.failed
    assert refused.outcome.reason == "BadSetting: the first line\nand the rest"
    assert refused.outcome.trace == ""  # a user's mistake
    assert "exit code 3" in left.outcome.reason
    assert math.isnan(left.outcome.score)
    assert swept.failure_table.startswith("2 of 4 points failed:\n  a 2  BadSetting: the first line\n")
    assert "the rest" not in swept.failure_table


def test_an_error_that_is_no_users_mistake_keeps_its_traceback():
    found = attempt(lambda work: work[0], [])
    assert found.reason == "IndexError: list index out of range"
    assert "test_driver.py" in found.trace


def test_a_process_that_is_asked_to_end_does_end():
    for error in (SystemExit(143), KeyboardInterrupt()):

        def evaluate(job, error=error):
            raise error

        with pytest.raises(type(error)):
            driver(grid(1), evaluate)[0].sweep()


def test_what_was_finished_counts_only_while_it_is_recalled_and_is_not_evaluated_again():
    drawn, heard = [], []
    made, said = driver(
        grid(1, 2, 3),
        lambda job: drawn.append(job.label) or 0.0,
        recall=lambda job: Outcome(True, 9.0) if job.label == "a 2" else None,
        past=[{"a": 2.0}, {"a": 1.0}],
        hear=lambda trial: heard.append((trial.job.label, trial.before)),
    )
    swept = made.sweep()
    assert drawn == ["a 1", "a 3"]
    assert said == ["  1 of 3 points finished before"]
    assert heard == [("a 2", True), ("a 1", False), ("a 3", False)]
    assert swept.best == ({"a": 2.0}, 9.0)


def test_points_come_in_the_order_proposed_whoever_was_quicker_and_whatever_was_resumed():
    def backwards(jobs):
        yield from ((job, Outcome(True, job.point["a"])) for job in reversed(list(jobs)))

    order = ["a 5", "a 3", "a 4", "a 1"]
    whole = Driver(grid(5, 3, 4, 1), backwards, label).sweep()
    assert [trial.job.label for trial in whole.trials] == order
    done = {"a 3": Outcome(True, 3.0)}
    past = [{"a": 5.0}, {"a": 3.0}]
    resumed = Driver(grid(5, 3, 4, 1), backwards, label, recall=lambda job: done.get(job.label), past=past)
    resumed.say = lambda text: None
    assert [trial.job.label for trial in resumed.sweep().trials] == order


def test_a_search_that_learns_hears_each_score_before_it_is_asked_again():
    chosen = search("optuna", sampler="tpe", values={"a": {"low": 0, "high": 1}}, trials=5, objective="x")
    told, asks = [], []
    tell, ask = chosen.tell, chosen.ask
    chosen.tell = lambda point, score: told.append(score) or tell(point, score)
    chosen.ask = lambda: asks.append(len(told)) or ask()
    driver(chosen, lambda job: job.point["a"])[0].sweep()
    assert asks == [0, 1, 2, 3, 4, 5]


def test_what_was_begun_and_not_finished_is_evaluated_first_and_within_the_total():
    chosen = search("optuna", sampler="qmc", values={"a": {"low": 0, "high": 1}}, trials=3, objective="x")
    swept = driver(chosen, lambda job: 0.0, past=[{"a": 0.123}])[0].sweep()
    assert swept.trials[0].job.point == {"a": 0.123}
    assert len(swept.trials) == 3


def judge(scores, alive, error):
    means = {row: np.nanmean(scores[row]) for row in alive}
    return [row for row in alive if means[row] > max(means.values()) - 1]


def raced(whole, cheap=None, failing=(), recall=None):
    """A race of 12 and 24 prompts whose jobs answer from tables; what it came to, what was drawn, what it said."""
    drawn = {}

    def evaluate(job):
        assert (job.label, job.block, job.cheap) not in drawn
        drawn[job.label, job.block, job.cheap] = True
        if job.cheap and job.label in failing:
            raise ValueError("no")
        return {"score": 0.0, "rows": list((cheap if job.cheap else whole)[int(job.point["a"])][slice(*job.block)])}

    made, said = driver(grid(*range(len(whole))), evaluate, **({"recall": recall} if recall else {}))
    swept = made.race([12, 24], judge, screened_by="" if cheap is None else "steps=2")
    return swept, drawn, said


def noisy(seed, spread=0.1):
    rng = np.random.default_rng(seed)
    return -np.arange(12)[:, None] + rng.normal(0, 1, 24) + rng.normal(0, spread, (12, 24))


def test_a_race_draws_only_what_may_still_be_the_best():
    swept, drawn, said = raced(noisy(0))
    assert set(swept.race.alive) <= {"a 0", "a 1"}
    assert {job[0] for job in drawn if job[1] == (12, 24)} == {"a 0", "a 1"}
    assert {trial.job.label for trial in swept.done} == set(swept.race.alive)
    assert swept.best[0] == {"a": 0.0}
    assert swept.best[1] == pytest.approx(noisy(0)[0].mean())
    assert said[0] == "  rung 1, 12 prompts: 12 points drawn"


def test_a_race_goes_on_from_what_is_recalled():
    def recall(job):
        return Outcome(True, {"rows": list(noisy(0)[int(job.point["a"])][slice(*job.block)])})

    assert raced(noisy(0), recall=recall)[1] == {}


def test_a_race_needs_scores_prompt_by_prompt():
    made, _ = driver(grid(1, 2), lambda job: 1.0)
    with pytest.raises(TypeError, match="prompt by prompt"):
        made.race([2, 4], judge)


def test_a_screening_goes_before_the_race():
    whole = noisy(0)
    cheap = whole / 2 + np.random.default_rng(1).normal(0, 0.05, whole.shape)
    swept, drawn, said = raced(whole, cheap, failing=["a 3"])
    assert sum(cheaply for *_, cheaply in drawn) == 12
    assert "screening by steps=2, 12 prompts: rank correlation with whole pictures 1.00" in said[0]
    assert set(swept.race.alive) <= {"a 0", "a 1"}
    assert "a 11" in swept.race.screened
    assert "a 3" in swept.race.failed
    assert [trial.job.label for trial in swept.failed] == ["a 3"]


def test_they_all_race_where_cheap_pictures_order_points_otherwise():
    whole = noisy(1)
    swept, drawn, said = raced(whole, whole[::-1])
    assert "too poor, all points race" in said[0]
    assert len({job[0] for job in drawn if job[1] == (0, 12) and not job[2]}) == 12
    assert "a 0" in swept.race.alive


def test_a_points_folder_is_the_same_in_any_order_and_for_any_spelling(tmp_path):
    folder = SweepFolder(tmp_path)
    one = folder.place(Job("", {"a": 1.0, "b": "x"}))
    assert folder.place(Job("", {"b": "x", "a": 1})) == one
    others = [
        Job("", {"a": 2.0, "b": "x"}),
        Job("", {"a": 1.0, "b": "x"}, cheap=True),
        Job("", {"a": 1.0, "b": "x"}, (0, 4)),
    ]
    assert len({one, *map(folder.place, others)}) == 4


def test_a_folder_keeps_the_points_in_their_order_and_how_each_ended(tmp_path):
    folder = SweepFolder(tmp_path)
    jobs = [Job(f"a {a}", {"a": float(a)}) for a in (5, 3, 4)]
    for job in jobs:
        folder.begin(job)
        assert folder.outcome(job) is None
        folder.keep(job, Outcome(True, {"score": 1.0, "rows": [1.0]}, seconds=2.0))
    assert folder.past() == [{"a": 5.0}, {"a": 3.0}, {"a": 4.0}]
    assert folder.outcome(jobs[0]).rows == [1.0]
    assert job_of(folder.place(jobs[1])) == jobs[1]
    folder.keep(jobs[1], Outcome.of_error(ValueError("odd\nnumbers")))
    row = json.loads((folder.place(jobs[1]) / "outcome.json").read_text())
    assert (row["status"], row["reason"]) == ("failed", "ValueError: odd\nnumbers")
    folder.begin(jobs[1])  # drawn anew: how it ended before is forgotten, its number is not
    assert folder.outcome(jobs[1]) is None
    assert folder.past()[1] == {"a": 3.0}


def test_an_outcome_that_its_worker_wrote_is_not_written_again(tmp_path):
    folder, job = SweepFolder(tmp_path), Job("a 1", {"a": 1.0})
    outcome = Outcome(True, {"score": 1.0, "rows": [1.0]}, seconds=2.0)
    write_outcome(folder.place(job), outcome)  # as a launcher's worker does
    file = folder.place(job) / "outcome.json"
    os.utime(file, ns=(1, 1))
    folder.keep(job, folder.outcome(job))
    assert file.stat().st_mtime_ns == 1
    folder.keep(job, Outcome(True, {"score": 2.0, "rows": [2.0]}, seconds=2.0))
    assert folder.outcome(job).score == 2.0


def test_the_failures_file_holds_every_reason_whole(tmp_path):
    def evaluate(job):
        raise BadSetting(f"{job.label} is odd\nbecause of its second line")

    folder = SweepFolder(tmp_path)
    folder.keep_failures(driver(grid(1, 2), evaluate)[0].sweep())
    text = (tmp_path / "failures.txt").read_text()
    assert text.count("because of its second line") == 2
    folder.keep_failures(driver(grid(1), lambda job: 1.0)[0].sweep())
    assert not (tmp_path / "failures.txt").exists()
