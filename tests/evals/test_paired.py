"""Paired comparison: right differences, honest intervals, the same items or a refusal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from remelt.errors import EvaluationError
from remelt_evals.eval_report import objective
from remelt_evals.paired import compare
from report_fixtures import make_report, make_task


def test_differences_are_those_of_the_reports_and_the_macro_that_of_the_objective() -> None:
    rng = np.random.default_rng(0)
    a = make_report(
        make_task("words", rng.integers(0, 2, 50)),
        make_task("prose", rng.random(40), aggregation="weighted_mean", higher=False, weight=0.5),
        make_task("code", rng.random(30), aggregation="exp_weighted_mean", higher=False, weight=0.25),
    )
    b = make_report(
        make_task("words", rng.integers(0, 2, 50)),
        make_task("prose", rng.random(40), aggregation="weighted_mean", higher=False, weight=0.5),
        make_task("code", rng.random(30), aggregation="exp_weighted_mean", higher=False, weight=0.25),
    )
    found = compare(a, b, num_resamples=2000)
    for difference, one, two in zip(found.abilities, a.tasks, b.tasks, strict=True):
        assert (difference.a, difference.b) == (pytest.approx(one.value), pytest.approx(two.value))
        assert difference.difference == pytest.approx(two.oriented_value - one.oriented_value)
        assert difference.low < difference.difference < difference.high
    assert found.macro.difference == pytest.approx(objective(b) - objective(a))
    assert found.macro.n == 120
    reverse = compare(b, a, num_resamples=2000)
    assert reverse.macro.low == pytest.approx(-found.macro.high)


def test_the_interval_is_that_of_the_normal_approximation_for_many_items() -> None:
    rng = np.random.default_rng(1)
    scores_a, scores_b = rng.random(2000), rng.random(2000)
    found = compare(make_report(make_task("t", scores_a)), make_report(make_task("t", scores_b)), num_resamples=4000)
    half = 1.96 * np.std(scores_b - scores_a, ddof=1) / np.sqrt(2000)
    assert found.macro.high - found.macro.low == pytest.approx(2 * half, rel=0.06)


def test_pairing_sees_a_small_difference_that_separate_errors_hide() -> None:
    rng = np.random.default_rng(2)
    hardness = rng.normal(size=300)
    a = make_report(make_task("t", hardness))
    b = make_report(make_task("t", hardness + 0.02 + 0.01 * rng.normal(size=300)))
    assert compare(a, b).macro.is_better
    assert not compare(a, a).macro.is_better
    assert compare(a, a).macro[4:7] == (0.0, 0.0, 0.0)


def test_intervals_hold_what_they_promise() -> None:
    """95 % of intervals contain the true difference of zero: 200 tries, at 3 standard deviations of the count."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        a, b = (make_report(make_task("t", rng.integers(0, 2, 80))) for _ in range(2))
        macro = compare(a, b, num_resamples=400).macro
        held += macro.low <= 0 <= macro.high
    assert 180 <= held <= 200


def test_the_same_seed_gives_the_same_intervals() -> None:
    rng = np.random.default_rng(4)
    a, b = (make_report(make_task("t", rng.random(20))) for _ in range(2))
    assert compare(a, b) == compare(a, b)
    assert compare(a, b).macro.low != compare(a, b, seed=1).macro.low


def test_only_common_items_count() -> None:
    a = make_report(make_task("t", [1.0, 0.0, 1.0, 0.0]))
    whole = make_task("t", [1.0, 1.0, 1.0, 0.0])
    b = make_report(dataclasses.replace(whole, samples=whole.samples[1:][::-1]))
    found = compare(a, b).abilities[0]
    assert (found.n, found.a, found.b) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_an_item_that_stands_twice_is_paired_twice() -> None:
    task = make_task("t", [1.0, 0.0, 1.0])
    twin = dataclasses.replace(task.samples[2], doc_hash=task.samples[0].doc_hash)
    report = make_report(dataclasses.replace(task, samples=(*task.samples[:2], twin)))
    assert compare(report, report).macro.n == 3


def test_what_cannot_be_compared_is_refused() -> None:
    task = make_task("t", [1.0, 0.0])
    report = make_report(task)
    with pytest.raises(EvaluationError, match="evaluate both on the same"):
        compare(report, make_report(task, suite_digest="other"))
    with pytest.raises(EvaluationError, match="failed and cannot be compared: NaN"):
        compare(report, make_report(status="failed", error="NaN"))
    strangers = tuple(dataclasses.replace(sample, doc_hash=f"x{sample.doc_id}") for sample in task.samples)
    with pytest.raises(EvaluationError, match="have no item in common"):
        compare(report, make_report(dataclasses.replace(task, samples=strangers)))
    other = dataclasses.replace(task, aggregation="other")
    with pytest.raises(EvaluationError, match="has no score for each item"):
        compare(make_report(other), make_report(other))
