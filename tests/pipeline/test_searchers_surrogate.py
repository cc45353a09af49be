"""The quadratic of MAP and the Pareto machinery under it, against slow and obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remelt.searchers.pareto import find_front, front, nondominated_ranks, reference_directions, survivors
from remelt.searchers.quadratic import features, fit_quadratic, num_coefficients


def test_a_quadratic_is_recovered_from_as_many_points_as_it_has_coefficients() -> None:
    draws = np.random.default_rng(0)
    truth = draws.normal(size=(num_coefficients(3), 2))
    variables = draws.random((num_coefficients(3), 3))
    fit = fit_quadratic(variables, features(variables) @ truth)
    assert fit.coefficients_FM == pytest.approx(truth, abs=1e-8)
    assert fit.errors[0].left_out is None, "no point can be left out of a fit that needs them all"
    assert fit.errors[0].residual < 1e-9


def test_left_out_errors_are_those_of_fits_that_leave_points_out() -> None:
    draws = np.random.default_rng(1)
    variables, objectives = draws.random((25, 2)), draws.random((25, 1))
    (error,) = fit_quadratic(variables, objectives).errors
    missed = []
    for left_out in range(25):
        rest = np.arange(25) != left_out
        fit = fit_quadratic(variables[rest], objectives[rest])
        missed.append(float((fit.predict(variables[~rest]) - objectives[~rest])[0, 0]))
    assert error.left_out == pytest.approx(np.sqrt(np.mean(np.square(missed))))


def test_an_underdetermined_quadratic_says_how_many_coefficients_it_knows() -> None:
    draws = np.random.default_rng(2)
    fit = fit_quadratic(draws.random((7, 4)), draws.random((7, 3)))
    assert [error.coefficients for error in fit.errors] == [7, 7, 7]
    assert np.isfinite(fit.coefficients_FM).all()


def test_a_constant_objective_is_fitted_as_a_constant() -> None:
    variables = np.random.default_rng(3).random((30, 2))
    fit = fit_quadratic(variables, np.full((30, 1), 0.25))
    assert fit.predict(variables) == pytest.approx(np.full((30, 1), 0.25))
    assert fit.errors[0].r_squared == 1.0


def slow_ranks(objectives: NDArray[np.float64]) -> list[int]:
    def dominates(p: int, q: int) -> bool:
        return bool((objectives[p] >= objectives[q]).all() and (objectives[p] > objectives[q]).any())

    ranks, left, rank = [-1] * len(objectives), set(range(len(objectives))), 0
    while left:
        best = {p for p in left if not any(dominates(q, p) for q in left)}
        for p in best:
            ranks[p] = rank
        left, rank = left - best, rank + 1
    return ranks


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=24))
@settings(max_examples=40, deadline=None)
def test_ranks_and_front_match_the_definition_with_ties(points: list[tuple[int, int, int]]) -> None:
    objectives = np.array(points, dtype=np.float64)
    ranks = slow_ranks(objectives)
    assert nondominated_ranks(objectives).tolist() == ranks
    assert front(objectives).tolist() == [rank == 0 for rank in ranks]


@pytest.mark.parametrize(("num_objectives", "count"), [(1, 1), (2, 100), (3, 91), (4, 84), (8, 36)])
def test_reference_directions_are_as_fine_as_allowed(num_objectives: int, count: int) -> None:
    directions = reference_directions(num_objectives, 100)
    assert directions.shape == (count, num_objectives)
    assert directions.sum(axis=1) == pytest.approx(np.ones(count))
    assert len(np.unique(directions, axis=0)) == count


def test_survivors_are_the_better_fronts_and_spread_over_the_last() -> None:
    line = np.linspace(0, 1, 21)
    objectives = np.column_stack([np.sqrt(line), np.sqrt(1 - line)])
    worse = objectives[::4] * 0.5
    kept = survivors(np.vstack([objectives, worse]), 5, reference_directions(2, 5), np.random.default_rng(0))
    assert len(set(kept.tolist())) == 5
    assert (kept < 21).all()
    assert {0, 20} <= set(kept.tolist()), "the ends of the front lie on the outermost directions"
    assert np.diff(np.sort(kept)).max() <= 8
    every = survivors(np.vstack([objectives, worse]), 24, reference_directions(2, 24), np.random.default_rng(0))
    assert set(range(21)) <= set(every.tolist())


def test_the_front_of_a_known_function_is_found() -> None:
    """Best at 0.3 and at 0.6 in the first variable and at 0 in the others: the Pareto set is the line between."""

    def evaluate(points: NDArray[np.float64]) -> NDArray[np.float64]:
        rest = (points[:, 1:] ** 2).sum(axis=1)
        return -np.column_stack([(points[:, 0] - 0.3) ** 2 + rest, (points[:, 0] - 0.6) ** 2 + rest])

    found = find_front(evaluate, np.full((1, 4), 0.5), 2, np.random.default_rng(0))
    assert len(found) > 50
    assert (np.abs(found[:, 1:]) < 0.05).all()
    assert found[:, 0].min() == pytest.approx(0.3, abs=0.02)
    assert found[:, 0].max() == pytest.approx(0.6, abs=0.02)
    assert np.diff(np.sort(found[:, 0])).max() < 0.05
