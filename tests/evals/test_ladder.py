"""Claim: a candidate stops at a rung only where it is clearly worse on the same items, and its estimate is fair."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from remelt_evals.eval_report import EvalReport, objective, report_to_json
from remelt_evals.ladder import rungs_of, stop_early, without_texts
from report_fixtures import make_report, make_task

N, RUNG = 400, 80


def evaluation(rates: tuple[float, ...], difficulty_TN: np.ndarray, count: int = N) -> EvalReport:
    """Items are solved where their difficulty is below the model's rate: what is hard is hard for all."""
    tasks = [
        make_task(f"t{place}", (difficulty[:count] < rate).astype(float))
        for place, (rate, difficulty) in enumerate(zip(rates, difficulty_TN, strict=True))
    ]
    return make_report(*tasks)


@pytest.fixture
def difficulty() -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(2, N))


def test_a_much_worse_candidate_stops_and_a_better_one_goes_on(difficulty: np.ndarray) -> None:
    incumbent = evaluation((0.6, 0.7), difficulty)
    assert stop_early(incumbent, evaluation((0.3, 0.4), difficulty, RUNG)) is not None
    assert stop_early(incumbent, evaluation((0.7, 0.75), difficulty, RUNG)) is None
    assert stop_early(incumbent, evaluation((0.6, 0.7), difficulty, RUNG)) is None


def test_the_estimate_is_nearer_than_the_rungs_own_score(difficulty: np.ndarray) -> None:
    """The first items may be easy ones; the paired difference knows, the plain mean does not."""
    easy_first = np.sort(difficulty, axis=1)
    incumbent = evaluation((0.6, 0.7), easy_first)
    rng = np.random.default_rng(1)
    for matrix in (easy_first, difficulty, rng.permuted(difficulty, axis=1)):
        incumbent = evaluation((0.6, 0.7), matrix)
        full, rung = evaluation((0.35, 0.4), matrix), evaluation((0.35, 0.4), matrix, RUNG)
        estimate = stop_early(incumbent, rung)
        if estimate is not None:
            assert abs(estimate.score - objective(full)) <= abs(objective(rung) - objective(full)) + 0.02
            assert estimate.score == pytest.approx(np.mean(estimate.values))
    assert stop_early(evaluation((0.6, 0.7), difficulty), evaluation((0.35, 0.4), difficulty, RUNG)) is not None


def test_with_several_objectives_only_what_is_worse_everywhere_stops(difficulty: np.ndarray) -> None:
    incumbent = evaluation((0.6, 0.7), difficulty)
    mixed = evaluation((0.9, 0.1), difficulty, RUNG)
    assert stop_early(incumbent, mixed) is not None
    assert stop_early(incumbent, mixed, on_every_entry=True) is None
    assert stop_early(incumbent, evaluation((0.2, 0.2), difficulty, RUNG), on_every_entry=True) is not None


def test_lower_is_better_where_the_metric_says_so() -> None:
    rng = np.random.default_rng(2)
    bits = rng.uniform(1, 3, N)
    incumbent = make_report(make_task("bits", bits, aggregation="weighted_mean", higher=False))
    worse = make_report(make_task("bits", (bits + 0.5)[:RUNG], aggregation="weighted_mean", higher=False))
    estimate = stop_early(incumbent, worse)
    assert estimate is not None
    assert estimate.values[0] == pytest.approx(objective(incumbent) - 0.5)


def test_a_metric_without_item_scores_never_stops_a_candidate() -> None:
    task = make_task("f1", [1.0, 0.0])
    other = dataclasses.replace(task, aggregation="other")
    assert stop_early(make_report(task), make_report(other)) is None


def test_what_travels_to_evaluators_has_no_texts(difficulty: np.ndarray) -> None:
    report = evaluation((0.6, 0.7), difficulty)
    sample = dataclasses.replace(report.tasks[0].samples[0], doc_json='{"secret": 1}', response="said")
    task = dataclasses.replace(report.tasks[0], samples=(sample, *report.tasks[0].samples[1:]))
    bare = without_texts(dataclasses.replace(report, tasks=(task, report.tasks[1])))
    assert "secret" not in report_to_json(bare)
    assert "said" not in report_to_json(bare)
    assert objective(bare) == objective(report)


def test_rungs_climb_and_end_with_all_items() -> None:
    assert rungs_of([200, 50, 200]) == (50, 200, None)
    assert rungs_of([]) == (None,)
