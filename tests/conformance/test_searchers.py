"""What every searcher of the table must hold. A new row gets these for free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest

from remelt.recipe import Variable
from remelt.searchers import SEARCHERS, SearchSpace, Trial, TrialState, build_searcher

BOX = SearchSpace((Variable("density", 0.2, 0.9, 0.5), Variable("scale", -1.0, 3.0, 1.0)))
SIMPLEX = SearchSpace(
    (*(Variable(f"w{k}", 0.0, 1.0, 0.25) for k in range(4)), Variable("density", 0.2, 0.9, 0.5)),
    simplex=(("w0", "w1", "w2", "w3"),),
)
NARROW = SearchSpace(tuple(Variable(f"w{k}", 0.1, 0.5, 1 / 3) for k in range(3)), simplex=(("w0", "w1", "w2"),))
SPACES = {"box": BOX, "simplex": SIMPLEX, "narrow": NARROW, "single": SearchSpace((Variable("t", 0.0, 1.0, 0.5),))}
TARGET = {"w0": 0.5, "w1": 0.3, "w2": 0.15, "w3": 0.05, "density": 0.8, "scale": 0.2, "t": 0.9}

pytestmark = pytest.mark.parametrize("name", list(SEARCHERS))


def quadratic(values: Mapping[str, float]) -> float:
    return -sum((value - TARGET[name]) ** 2 for name, value in values.items())


def run(
    name: str,
    space: SearchSpace,
    num_trials: int,
    *,
    seed: int = 0,
    num_evaluators: int = 2,
    score: Callable[[Mapping[str, float]], float] = quadratic,
    fails: Callable[[int], bool] = lambda number: False,
    rebuild: bool = False,
) -> list[Trial]:
    """A study without a cluster: `num_evaluators` trials run at once, the oldest finishes first."""
    searcher = build_searcher(name, space, seed)
    finished: list[Trial] = []
    running: list[Trial] = []
    for number in range(num_trials):
        if rebuild:
            searcher = build_searcher(name, space, seed)
        point = searcher.ask(number, [*finished, *running])
        running.append(Trial(number, TrialState.RUNNING, point, len(finished)))
        if len(running) == num_evaluators:
            trial = running.pop(0)
            state = TrialState.FAILED if fails(trial.number) else TrialState.COMPLETE
            value = None if fails(trial.number) else score(space.values(trial.point))
            finished.append(Trial(trial.number, state, trial.point, trial.asked_after, value))
    return [*finished, *running]


@pytest.mark.parametrize("kind", list(SPACES))
def test_points_stay_in_the_box_and_values_in_their_intervals(name: str, kind: str) -> None:
    space = SPACES[kind]
    for trial in run(name, space, 30):
        assert list(trial.point) == [variable.name for variable in space.variables]
        assert all(variable.low <= trial.point[variable.name] <= variable.high for variable in space.box)
        values = space.values(trial.point)
        assert all(variable.low <= values[variable.name] <= variable.high for variable in space.variables)
        for group in space.simplex:
            assert math.isclose(sum(values[member] for member in group), 1.0, abs_tol=1e-12)


@pytest.mark.parametrize("kind", list(SPACES))
def test_different_numbers_give_different_points(name: str, kind: str) -> None:
    points = [tuple(trial.point.values()) for trial in run(name, SPACES[kind], 40)]
    assert len(set(points)) == 40


def test_a_rebuilt_searcher_asks_the_same(name: str) -> None:
    assert run(name, SIMPLEX, 30) == run(name, SIMPLEX, 30, rebuild=True)


def test_an_ask_has_no_side_effect(name: str) -> None:
    searcher = build_searcher(name, BOX, 0)
    seen = run(name, BOX, 20)
    first = searcher.ask(20, seen)
    searcher.ask(3, [])
    assert searcher.ask(20, seen) == first


def test_another_seed_gives_other_points(name: str) -> None:
    assert run(name, BOX, 3, seed=0) != run(name, BOX, 3, seed=1)


@pytest.mark.parametrize("fails", [lambda number: number % 3 == 0, lambda number: True], ids=["third", "all"])
def test_failed_trials_do_not_break_it(name: str, fails: Callable[[int], bool]) -> None:
    trials = run(name, SIMPLEX, 40, fails=fails)
    assert len({tuple(trial.point.values()) for trial in trials}) == 40


def test_a_constant_score_does_not_break_it(name: str) -> None:
    assert len(run(name, BOX, 60, score=lambda values: 0.25)) == 60


def test_trials_that_no_searcher_asked_for_are_allowed(name: str) -> None:
    starts = [Trial(k, TrialState.COMPLETE, {}, 0, 0.1 * k) for k in range(5)]
    searcher = build_searcher(name, SIMPLEX, 0)
    assert set(searcher.ask(5, starts)) == {variable.name for variable in SIMPLEX.variables}


@pytest.mark.parametrize("num_evaluators", [1, 2, 5])
def test_beats_the_start_on_a_quadratic(name: str, num_evaluators: int) -> None:
    start = quadratic(SIMPLEX.values({variable.name: variable.init for variable in SIMPLEX.box}))
    for seed in range(3):
        scores = [t.score for t in run(name, SIMPLEX, 64, seed=seed, num_evaluators=num_evaluators)]
        assert max(score for score in scores if score is not None) > start
