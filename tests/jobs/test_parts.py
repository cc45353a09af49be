"""A candidate's parts come together again: every entry once, in the suite's order, and never half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from remelt_evals.eval_report import EvalReport, TaskReport
from remelt_jobs.parts import Gathering, split_work
from remelt_jobs.trial import Outcome, Work

WORK = Work(recipe=None, checkpoint="c", role="search", suite="s", suite_digest="d")


def report(entries: tuple[int, ...], digest: str = "weights", error: str | None = None) -> EvalReport:
    tasks = tuple(
        TaskReport(
            ability=f"ability {place}",
            task=f"task {place}",
            task_version="1",
            metric="acc",
            filter="none",
            value=place / 10,
            stderr=0.01,
            n=10,
            n_total=10,
            higher_is_better=True,
            weight=1.0,
            num_fewshot=0,
            aggregation="mean",
        )
        for place in entries
    )
    return EvalReport(
        evaluation_id=f"id {entries}",
        checkpoint="c",
        digest=digest,
        suite="s",
        suite_digest="d",
        role="search",
        fidelity="full",
        backend="hf",
        device="cpu",
        dtype="bfloat16",
        status="ok" if error is None else "failed",
        error=error,
        tasks=() if error else tasks,
        started_at="2026-01-01",
        seconds=2.0,
    )


@pytest.mark.parametrize(("num_entries", "num_parts"), [(5, 2), (4, 4), (2, 3), (1, 2), (7, 1)])
def test_every_entry_is_in_one_part(num_entries: int, num_parts: int) -> None:
    parts = split_work(3, WORK, num_entries, num_parts)
    if num_parts == 1:
        assert parts == {"3": WORK}
        return
    dealt = [place for part in parts.values() for place in part.entries or ()]
    assert sorted(dealt) == list(range(num_entries))
    assert all(part.entries for part in parts.values())
    assert len(parts) == min(num_parts, num_entries)


def test_a_candidate_is_whole_when_its_last_part_comes_and_in_the_suites_order(tmp_path: Path) -> None:
    parts = {part: split_work(part, WORK, 5, 2) for part in (0, 1)}
    gathering = Gathering(5, 2)
    outcomes = {
        key: Outcome(report=report(work.entries or ()), digest="weights", seconds=3.0, merge_seconds=1.0, where=key)
        for each in parts.values()
        for key, work in each.items()
    }
    assert gathering.take({"0/1": outcomes["0/1"], "1/0": outcomes["1/0"]}) == {}
    (number, whole), *rest = gathering.take({"0/0": outcomes["0/0"]}).items()
    assert (number, rest) == (0, [])
    assert whole.report is not None
    assert [task.task for task in whole.report.tasks] == [f"task {place}" for place in range(5)]
    assert (whole.seconds, whole.merge_seconds, whole.where, whole.report.seconds) == (6.0, 2.0, "0/0, 0/1", 4.0)
    assert list(gathering.take({"1/1": outcomes["1/1"]})) == [1]
    assert gathering.take({"7": Outcome(failure="x")}) == {7: Outcome(failure="x")}


def test_what_fails_in_one_part_fails_the_candidate(tmp_path: Path) -> None:
    good = Outcome(report=report((0, 2)), digest="weights")
    gathering = Gathering(3, 2)
    whole = gathering.take({"0/0": good, "0/1": Outcome(failure="lost")})[0]
    assert (whole.report, whole.failure) == (None, "lost")
    nan = Outcome(report=report((1,), error="NaN in the answers"), failure="NaN in the answers")
    whole = gathering.take({"1/0": good, "1/1": nan})[1]
    assert whole.report is not None and not whole.report.is_ok and whole.report.tasks == ()
    assert whole.failure == "NaN in the answers"
    other = Outcome(report=report((1,), digest="other weights"))
    whole = gathering.take({"2/0": good, "2/1": other})[2]
    assert whole.report is None and "cannot be joined" in str(whole.failure)
