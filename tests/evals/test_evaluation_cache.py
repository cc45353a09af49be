"""Claim: an evaluation is done once for the same weights, items, fidelity and backend, and never taken for another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest
from remelt_evals.evaluation_cache import EvaluationCache, evaluate_once
from remelt_evals.evaluator import Evaluator


class Counting:
    """A real evaluator that counts what it is asked to do."""

    def __init__(self) -> None:
        self.evaluator = Evaluator(BackendOptions(name="dummy"))
        self.num_evaluations = 0

    def evaluation_id(self, request: EvalRequest) -> str:
        return self.evaluator.evaluation_id(request)

    def evaluate(self, request: EvalRequest) -> EvalReport:
        self.num_evaluations += 1
        return self.evaluator.evaluate(request)


@pytest.fixture(scope="module")
def counting() -> Counting:
    return Counting()


@pytest.mark.slow
def test_the_second_time_it_is_taken_from_the_cache(counting: Counting, suite_path: Path, tmp_path: Path) -> None:
    request = EvalRequest(checkpoint="-", digest="one", suite=str(suite_path), role="search")
    first = evaluate_once(counting, request, tmp_path)
    before = counting.num_evaluations
    assert evaluate_once(counting, request, tmp_path) == first
    assert counting.num_evaluations == before
    for other in (
        dataclasses.replace(request, digest="two"),
        dataclasses.replace(request, role="report"),
        dataclasses.replace(request, limit=3),
    ):
        before = counting.num_evaluations
        assert evaluate_once(counting, other, tmp_path).evaluation_id != first.evaluation_id
        assert counting.num_evaluations == before + 1


def test_a_failure_is_not_kept(counting: Counting, suite_path: Path, tmp_path: Path) -> None:
    report = counting.evaluate(EvalRequest(checkpoint="-", digest="one", suite=str(suite_path), role="search"))
    EvaluationCache(tmp_path).put(dataclasses.replace(report, status="failed", error="for now", tasks=()))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_file_is_refused(counting: Counting, suite_path: Path, tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path)
    report = counting.evaluate(EvalRequest(checkpoint="-", digest="one", suite=str(suite_path), role="search"))
    cache.put(report)
    path = tmp_path / f"{report.evaluation_id}.json"
    (tmp_path / "other.json").write_bytes(path.read_bytes())
    with pytest.raises(EvaluationError, match="holds evaluation"):
        cache.get("other")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EvaluationError, match="is damaged"):
        cache.get(report.evaluation_id)
