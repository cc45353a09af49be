"""Search spaces, and what CMA-ES and random search claim beyond the conformance suite."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import RecipeError
from remelt.recipe import Variable
from remelt.searchers import SearchSpace, Trial, TrialState, build_searcher, searcher_options
from remelt.searchers.cma_es import CmaEs

FOUR = SearchSpace(tuple(Variable(f"w{k}", 0.0, 1.0, 0.25) for k in range(4)), (("w0", "w1", "w2", "w3"),))
TARGET = (0.55, 0.25, 0.15, 0.05)


def score(space: SearchSpace, point: dict[str, float]) -> float:
    values = space.values(point)
    return -sum((values[v.name] - t) ** 2 for v, t in zip(space.variables, TARGET, strict=True))


def study(searcher_name: str, num_trials: int, seed: int, **options: float) -> list[Trial]:
    searcher = build_searcher(searcher_name, FOUR, seed, options)
    trials: list[Trial] = []
    for number in range(num_trials):
        point = dict(searcher.ask(number, trials))
        trials.append(Trial(number, TrialState.COMPLETE, point, len(trials), score(FOUR, point)))
    return trials


def best(trials: list[Trial]) -> float:
    return max(trial.score for trial in trials if trial.score is not None)


@given(
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(0.34, 1.0)), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_a_simplex_group_sums_to_one_inside_its_intervals(
    shares: list[float], intervals: list[tuple[float, float]]
) -> None:
    names = ("a", "b", "c")
    space = SearchSpace(tuple(Variable(n, lo, hi, hi) for n, (lo, hi) in zip(names, intervals, strict=True)), (names,))
    values = space.values(dict(zip(names, shares, strict=True)))
    assert math.isclose(sum(values.values()), 1.0, abs_tol=1e-9)
    assert all(lo <= values[n] <= hi for n, (lo, hi) in zip(names, intervals, strict=True))


def test_scaling_keeps_the_ratios_of_shares_that_need_no_clipping() -> None:
    values = FOUR.values({"w0": 0.2, "w1": 0.4, "w2": 0.1, "w3": 0.1})
    assert values == pytest.approx({"w0": 0.25, "w1": 0.5, "w2": 0.125, "w3": 0.125}, abs=1e-15)


def test_a_softmax_searches_logits_around_the_start() -> None:
    space = SearchSpace(FOUR.variables, FOUR.simplex, softmax=True)
    logits = np.array([0.3, -1.2, 1.4, 0.0])
    shares = np.exp(logits) / np.exp(logits).sum()
    point = space.point_at((logits + 1.5) / 3)
    assert list(space.values(point).values()) == pytest.approx(shares.tolist(), abs=1e-12)
    assert space.unit_of(point) == pytest.approx((logits + 1.5) / 3, abs=1e-12)
    assert space.values(space.point_at([0.5] * 4)) == pytest.approx(dict.fromkeys(point, 0.25))
    # Values far apart are met as nearly as the box allows, and a share of zero by its edge.
    nearest = space.nearest_point({"w0": 0.7, "w1": 0.3, "w2": 0.0, "w3": 0.0})
    assert nearest is not None
    assert all(0 <= place <= 1 for place in space.unit_of(nearest))


def test_the_start_of_a_simplex_is_its_inits_in_the_middle_of_the_box() -> None:
    start = {variable.name: variable.init for variable in FOUR.box}
    assert start == pytest.approx(dict.fromkeys(start, 0.505))
    skewed = SearchSpace((Variable("a", 0, 1, 0.6), Variable("b", 0, 1, 0.4)), (("a", "b"),))
    assert skewed.values({v.name: v.init for v in skewed.box}) == pytest.approx({"a": 0.6, "b": 0.4})


@pytest.mark.parametrize(
    ("variables", "simplex", "words"),
    [
        ((), (), "no variable"),
        ((Variable("a", 1, 0, 0.5),), (), "low < high"),
        ((Variable("a", 0, 1, 2),), (), "hold the start"),
        ((Variable("a", 0, 1, 0), Variable("a", 0, 1, 0)), (), "twice"),
        ((Variable("a", 0, 1, 0.5),), (("a", "b"),), "nothing searches"),
        ((Variable("a", 0, 0.3, 0.1), Variable("b", 0, 0.3, 0.1)), (("a", "b"),), "cannot sum to 1"),
        ((Variable("a", 0.6, 1, 0.7), Variable("b", 0.6, 1, 0.7)), (("a", "b"),), "cannot sum to 1"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(
    variables: tuple[Variable, ...], simplex: tuple[tuple[str, ...], ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        SearchSpace(variables, simplex)


def test_cmaes_beats_random_search_on_a_quadratic() -> None:
    seeds = range(4)
    cmaes = np.median([-best(study("cmaes", 96, seed)) for seed in seeds])
    random = np.median([-best(study("random", 96, seed)) for seed in seeds])
    assert cmaes < random / 3


def test_cmaes_replays_to_the_state_of_an_optimiser_that_was_never_rebuilt() -> None:
    from cmaes import CMA

    trials = study("cmaes", 20, seed=3)
    searcher = CmaEs(FOUR, 3)
    live = CMA(mean=searcher._start.copy(), sigma=1 / 6, bounds=np.tile([0.0, 1.0], (4, 1)), population_size=8, seed=0)
    for k in range(0, 16, 8):
        live.tell([(FOUR.unit_of(t.point), -t.score) for t in trials[k : k + 8] if t.score is not None])
    rebuilt = searcher._replay(trials)
    assert rebuilt.generation == 2
    assert np.array_equal(rebuilt.mean, live.mean)


def test_cmaes_default_population_is_hansens() -> None:
    assert [CmaEs(_space(n), 0).population for n in (1, 2, 4, 16)] == [4, 6, 8, 12]


def test_cmaes_tells_a_late_trial_to_no_later_generation() -> None:
    searcher = CmaEs(FOUR, 0, population=4)
    first = [complete(searcher, number, []) for number in range(4)]
    late = complete(searcher, 4, [])
    assert searcher._replay([*first, late]).generation == 1
    current = [complete(searcher, number, first) for number in range(5, 9)]
    assert searcher._replay([*first, late, *current[:3]]).generation == 1
    assert searcher._replay([*first, late, *current]).generation == 2


def test_cmaes_draws_further_points_of_a_generation_in_place_of_failed_trials() -> None:
    searcher = CmaEs(FOUR, 0, population=4)
    failed = Trial(0, TrialState.FAILED, dict(searcher.ask(0, [])), 0)
    others = [complete(searcher, number, []) for number in range(1, 4)]
    assert searcher._replay([failed, *others]).generation == 0
    assert searcher._replay([failed, *others, complete(searcher, 4, [failed, *others])]).generation == 1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cmae", {}, "did you mean 'cmaes'"),
        ("cmaes", {"sigm": 0.1}, "did you mean 'sigma'"),
        ("random", {"sigma": 0.1}, "takes none"),
        ("cmaes", {"sigma": 0}, "sigma is 0"),
        ("cmaes", {"population": 3}, "population is 3"),
        ("cmaes", {"population": 7.5}, "whole number"),
        ("cmaes", {"sigma": "wide"}, "must be a number"),
    ],
)
def test_unknown_searchers_and_options_are_refused_with_the_nearest(
    name: str, options: dict[str, float], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        build_searcher(name, FOUR, 0, options)


def test_options_are_the_keywords_of_the_class() -> None:
    assert searcher_options("cmaes") == {"sigma": 1 / 6, "population": None}


def test_searchers_import_nothing_heavy() -> None:
    heavy = ("cmaes", "optuna", "ray", "torch", "scipy")
    code = f"import remelt.searchers, sys; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def complete(searcher: CmaEs, number: int, seen: list[Trial]) -> Trial:
    point = dict(searcher.ask(number, seen))
    return Trial(number, TrialState.COMPLETE, point, len(seen), score(FOUR, point))


def _space(num: int) -> SearchSpace:
    return SearchSpace(tuple(Variable(f"v{k}", 0.0, 1.0, 0.5) for k in range(num)))
