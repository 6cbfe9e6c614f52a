"""Stages: what an identity holds, and that a result counts only while its bytes are sound."""

from pathlib import Path

import pytest

from ambergrade.chain.context import Context, Stage
from ambergrade.chain.settings import Compute
from ambergrade.store import Outputs
from ambergrade.track.journal import Run

TOAST = Stage("toast", 1)


def made(scratch: Path, run: Run) -> Outputs:
    (scratch / "toast.txt").write_text("crisp")
    return Outputs({"toast": scratch / "toast.txt"}, {"slices": 2})


def test_a_task_is_done_once_per_identity(context: Context) -> None:
    task = TOAST.task({"minutes": 2}, {"bread": "rye"})
    assert task.find(context.ledger) is None
    first = context.run(task, "toast", made)
    again = context.run(task, "toast", made)
    assert (first.fresh, again.fresh) == (True, False)
    found = task.find(context.ledger)
    assert found is not None
    assert found.values == {"slices": 2}
    for other in (
        TOAST.task({"minutes": 3}, {"bread": "rye"}),
        TOAST.task({"minutes": 2}, {"bread": "white"}),
        Stage("toast", 2).task({"minutes": 2}, {"bread": "rye"}),
    ):
        assert other.identity != task.identity
        assert other.find(context.ledger) is None


def test_where_is_in_no_identity(context: Context) -> None:
    task = TOAST.task({"minutes": 2}, {"bread": "rye"})
    context.run(task, "toast", made)
    elsewhere = Context(context.root, context.journal, context.parent, Compute("cpu", 7, 3))
    assert not elsewhere.run(task, "toast", made).fresh


@pytest.mark.parametrize("damage", ["burnt!", "krisp"], ids=["another size", "one byte"])
def test_a_damaged_result_is_made_again(context: Context, damage: str) -> None:
    task = TOAST.task({"minutes": 2}, {"bread": "rye"})
    file = context.run(task, "toast", made).files["toast"]
    file.chmod(0o644)
    file.write_text(damage)
    again = context.run(task, "toast", made)
    assert again.fresh
    assert again.files["toast"].read_text() == "crisp"
