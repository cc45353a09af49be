"""A candidate's parts come together again: every entry once, in the suite's order, and never half of it."""

from __future__ import annotations

import pytest

from remelt_evals.eval_report import EvalReport, TaskReport
from remelt_evals.suite import Suite, SuiteTask
from remelt_jobs.parts import Gathering, deal_entries, split_work
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


def suite_of(*tasks: str) -> Suite:
    entries = tuple(
        SuiteTask(
            ability=f"ability {place}",
            metric="acc",
            weight=1.0,
            search=f"{task}_search",
            selection=None,
            report=f"{task}_report",
            num_fewshot=0,
            limit=None,
        )
        for place, task in enumerate(tasks)
    )
    return Suite(
        name="s",
        path="s.yaml",
        tasks=entries,
        batch_size=1,
        allow_overlap=False,
        execute_code=(),
        task_files={},
        digest="d",
    )


@pytest.mark.parametrize("num_parts", [1, 2, 3, 9])
def test_every_entry_is_in_one_part_and_entries_of_one_eval_task_stay_together(num_parts: int) -> None:
    parts = deal_entries(suite_of("a", "b", "a", "c", "d"), num_parts)
    assert sorted(place for part in parts for place in part) == list(range(5))
    assert len(parts) == min(num_parts, 4) and all(parts)
    assert any({0, 2} <= set(part) for part in parts)
    works = split_work(3, WORK, parts)
    assert [work.entries for work in works.values()] == ([None] if num_parts == 1 else list(parts))


def test_a_candidate_is_whole_when_its_last_part_comes_and_in_the_suites_order() -> None:
    entries = ((0, 2, 4), (1, 3))
    parts = {part: split_work(part, WORK, entries) for part in (0, 1)}
    gathering = Gathering(entries)
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


def test_what_fails_in_one_part_fails_the_candidate() -> None:
    good = Outcome(report=report((0, 2)), digest="weights")
    gathering = Gathering(((0, 2), (1,)))
    whole = gathering.take({"0/0": good, "0/1": Outcome(failure="lost")})[0]
    assert (whole.report, whole.failure) == (None, "lost")
    nan = Outcome(report=report((1,), error="NaN in the answers"), failure="NaN in the answers")
    whole = gathering.take({"1/0": good, "1/1": nan})[1]
    assert whole.report is not None and not whole.report.is_ok and whole.report.tasks == ()
    assert whole.failure == "NaN in the answers"
    other = Outcome(report=report((1,), digest="other weights"))
    whole = gathering.take({"2/0": good, "2/1": other})[2]
    assert whole.report is None and "cannot be joined" in str(whole.failure)
