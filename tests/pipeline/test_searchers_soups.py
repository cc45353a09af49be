"""Grid, greedy soup, LCSC and MAP: known answers, and that they learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import RecipeError
from remelt.recipe import Variable
from remelt.searchers import SearchSpace, Trial, TrialState, build_searcher, needs_objectives, needs_simplex
from remelt.searchers.greedy_soup import GreedySoup
from remelt.searchers.grid import Grid
from remelt.searchers.lcsc import Lcsc, average_coefficients
from remelt.searchers.map_front import MapFront
from remelt.searchers.spec import project

PLANE = SearchSpace((Variable("x", 0.0, 1.0, 0.5), Variable("y", 0.0, 1.0, 0.5)))


def simplex(num: int, low: float = 0.0, high: float = 1.0) -> SearchSpace:
    names = tuple(f"w{k}" for k in range(num))
    return SearchSpace(tuple(Variable(name, low, high, 1 / num) for name in names), (names,))


def single_parents(scores: Sequence[float | None]) -> list[Trial]:
    """What a study has scored before it asks: the single parents; None for one that failed."""
    return [
        Trial(
            k,
            TrialState.FAILED if score is None else TrialState.COMPLETE,
            {},
            k,
            score,
            values={f"w{j}": float(j == k) for j in range(len(scores))},
        )
        for k, score in enumerate(scores)
    ]


def finish(trial: Trial, score: float | None) -> Trial:
    return replace(trial, state=TrialState.FAILED if score is None else TrialState.COMPLETE, score=score)


def run(
    name: str,
    space: SearchSpace,
    score: Callable[[Mapping[str, float]], float],
    num_trials: int,
    seen: Sequence[Trial] = (),
    seed: int = 0,
    **options: float | str,
) -> list[Trial]:
    searcher = build_searcher(name, space, seed, options)
    trials = list(seen)
    for number in range(len(seen), len(seen) + num_trials):
        point = searcher.ask(number, trials)
        values = space.values(point)
        trials.append(Trial(number, TrialState.COMPLETE, point, len(trials), score(values), values=values))
    return trials[len(seen) :]


def best(trials: Sequence[Trial]) -> float:
    return max(trial.score for trial in trials if trial.score is not None)


# Search spaces


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_nearest_point_to_what_a_point_stands_for_stands_for_the_same(shares: list[float]) -> None:
    space = simplex(4)
    values = space.values(dict(zip(("w0", "w1", "w2", "w3"), shares, strict=True)))
    nearest = space.nearest_point(values)
    assert nearest is not None
    assert space.values(nearest) == pytest.approx(values, abs=1e-12)
    assert all(variable.low <= nearest[variable.name] <= variable.high for variable in space.box)


def test_values_that_lack_a_variable_have_no_point() -> None:
    assert simplex(2).nearest_point({"w0": 1.0}) is None


def test_a_point_made_of_values_stands_for_them_zero_and_negative_ones_included() -> None:
    point = {"w0": 1.4, "w1": -0.4, "w2": 0.0}
    assert simplex(3, -1, 2).values(point) == pytest.approx(point, abs=1e-15)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(-1, 0), st.floats(0.5, 2))
@settings(max_examples=60, deadline=None)
def test_projection_gives_the_nearest_values_that_sum_to_one(given: list[float], low: float, high: float) -> None:
    names = ("a", "b", "c")
    intervals = dict.fromkeys(names, (low, high))
    found = project(names, dict(zip(names, given, strict=True)), intervals)
    assert math.isclose(sum(found.values()), 1.0, abs_tol=1e-9)
    assert all(low <= value <= high for value in found.values())
    assert project(names, found, intervals) == pytest.approx(found, abs=1e-9)
    distance = sum((x - y) ** 2 for x, y in zip(found.values(), given, strict=True))
    draws = np.random.default_rng(0).uniform(low, high, (400, 2))
    others = [(a, b, 1 - a - b) for a, b in draws if low <= 1 - a - b <= high]
    assert all(sum((x - y) ** 2 for x, y in zip(o, given, strict=True)) >= distance - 1e-9 for o in others)


def test_who_needs_several_objectives_and_who_a_simplex() -> None:
    names = ("cmaes", "gp", "tpe", "nsga3", "map", "lcsc", "greedy_soup", "grid", "random")
    assert [name for name in names if needs_objectives(name)] == ["nsga3", "map"]
    assert [name for name in names if needs_simplex(name)] == ["greedy_soup"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("greedy_soup", {"acceptance": "loose"}, "one of strict, paper"),
        ("greedy_soup", {"acceptance": 1}, "must be a word"),
        ("lcsc", {"start": "average"}, "one of averages, random"),
        ("gp", {"startup": True}, "must be a number"),
        ("gp", {"startup": "ten"}, "must be a number"),
        ("grid", {"points": 2.5}, "whole number from 2"),
        ("nsga", {}, "did you mean 'nsga3'"),
        ("greedy_soup", {"acept": "paper"}, "did you mean 'acceptance'"),
    ],
)
def test_wrong_options_are_refused_in_words(name: str, options: dict[str, float | str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_searcher(name, simplex(3), 0, options)


# Grid


def test_a_grid_asks_for_each_of_its_points_once_from_coarse_to_fine() -> None:
    trials = run("grid", PLANE, lambda values: 0.0, 25)
    points = [(trial.point["x"], trial.point["y"]) for trial in trials]
    steps = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert sorted(points) == sorted(itertools.product(steps, steps))
    assert points[0] == (0.5, 0.5)
    assert set(points[1:5]) == set(itertools.product((0.0, 1.0), (0.0, 1.0)))


def test_any_beginning_of_a_grid_covers_the_square_better_than_random_draws() -> None:
    probes = np.random.default_rng(1).random((500, 2))

    def gap(trials: Sequence[Trial]) -> float:
        points = np.array([(trial.point["x"], trial.point["y"]) for trial in trials])
        return float(np.sqrt(((probes[:, None] - points) ** 2).sum(axis=2)).min(axis=1).max())

    grid = run("grid", PLANE, lambda values: 0.0, 100, points=12)
    for count in (9, 25, 60):
        drawn = [gap(run("random", PLANE, lambda values: 0.0, count, seed=seed)) for seed in range(5)]
        assert gap(grid[:count]) < min(drawn)


def test_a_grid_beats_random_search_on_smooth_functions_on_the_average() -> None:
    targets = np.random.default_rng(0).random(40)
    line = SearchSpace((Variable("x", 0.0, 1.0, 0.5),))
    grid = run("grid", line, lambda values: 0.0, 17, points=17)
    draws = run("random", line, lambda values: 0.0, 17)
    missed = [[min(abs(t.point["x"] - target) for t in trials) for target in targets] for trials in (grid, draws)]
    assert np.mean(missed[0]) < np.mean(missed[1]) / 1.5


def test_a_simplex_takes_the_lattice_without_what_the_starts_have_tried() -> None:
    starts = single_parents([0.1, 0.2, 0.3])
    trials = run("grid", simplex(3), lambda values: 0.0, 3, starts, points=3)
    assert sorted(tuple(t.point.values()) for t in trials) == [(0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0)]
    searcher = Grid(simplex(3), 0, points=3)
    assert searcher.report([*starts, *trials]) == {"points": 3, "asked": 3, "is_finished": True}
    assert searcher.report(starts) == {"points": 3, "asked": 0, "is_finished": False}


@pytest.mark.parametrize(
    ("space", "points", "words"),
    [
        (SearchSpace(tuple(Variable(f"v{k}", 0, 1, 0.5) for k in range(16))), 5, "a grid of 152,587,890,625; at most"),
        (simplex(16), 12, "a simplex of 16 make a lattice of"),
        (SearchSpace((Variable("a", 0.4, 0.45, 0.4), Variable("b", 0.5, 0.6, 0.6)), (("a", "b"),)), 3, "take more"),
    ],
)
def test_a_grid_that_is_too_large_or_empty_is_refused(space: SearchSpace, points: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Grid(space, 0, points=points)


# Greedy soup


def table_score(table: Mapping[tuple[int, ...], float]) -> Callable[[Mapping[str, float]], float]:
    """Scores by the set of parents that are in a soup with equal weight."""

    def score(values: Mapping[str, float]) -> float:
        inside = tuple(k for k, value in enumerate(values.values()) if value > 0)
        return table.get(inside, -1.0)

    return score


def test_greedy_soup_adds_parents_best_first_and_keeps_what_helps() -> None:
    """Ranked 2, 0, 3, 1: 0 helps, 3 does not, 1 does."""
    starts = single_parents([0.6, 0.3, 0.7, 0.5])
    table = {(0, 2): 0.75, (0, 2, 3): 0.74, (0, 1, 2): 0.8}
    trials = run("greedy_soup", simplex(4), table_score(table), 3, starts)
    third = pytest.approx(1 / 3, abs=1e-15)
    assert [tuple(trial.values.values()) for trial in trials] == [
        (0.5, 0.0, 0.5, 0.0),
        (third, 0.0, third, third),
        (third, third, third, 0.0),
    ]
    report = GreedySoup(simplex(4), 0).report([*starts, *trials])
    assert report == {"soup": {"w0": 1, "w1": 1, "w2": 1}, "score": 0.8, "is_finished": False}


def test_the_paper_accepts_an_equal_score_and_its_code_does_not() -> None:
    starts = single_parents([0.6, 0.3, 0.5])
    table = {(0, 2): 0.6, (0, 1, 2): 0.5, (0, 1): 0.5}
    soups = {
        acceptance: [
            tuple(value > 0 for value in trial.values.values())
            for trial in run("greedy_soup", simplex(3), table_score(table), 2, starts, acceptance=acceptance)
        ]
        for acceptance in ("strict", "paper")
    }
    assert soups == {
        "strict": [(True, False, True), (True, True, False)],
        "paper": [(True, False, True), (True, True, True)],
    }


def test_a_parent_without_a_score_never_enters_the_soup_of_the_first_pass() -> None:
    starts = single_parents([0.6, None, 0.5])
    trials = run("greedy_soup", simplex(3), lambda values: 0.1, 1, starts)
    assert trials[0].values["w1"] == 0.0
    assert GreedySoup(simplex(3), 0).report([*starts, *trials])["is_finished"] is True


def test_parents_that_no_start_stands_for_are_asked_for_first() -> None:
    trials = run("greedy_soup", simplex(3), lambda values: values["w1"] - values["w0"] ** 2, 5)
    assert [tuple(trial.values.values()) for trial in trials[:4]] == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.5, 0.5)]


def test_a_free_evaluator_gets_the_step_for_a_rejection_then_for_an_acceptance() -> None:
    starts = single_parents([0.6, 0.3, 0.7, 0.5])
    searcher = GreedySoup(simplex(4), 0)
    seen, sets = list(starts), []
    for number in range(4, 8):
        point = searcher.ask(number, seen)
        seen.append(Trial(number, TrialState.RUNNING, point, 4, values=point))
        sets.append(tuple(k for k, value in enumerate(point.values()) if value > 0))
    assert sets == [(0, 2), (2, 3), (0, 2, 3), (1, 2)]
    # (0, 2) is accepted, so what is asked next builds on it; (0, 2, 3) is used, (2, 3) and (1, 2) were in vain.
    done = [*starts, finish(seen[4], 0.8), finish(seen[6], 0.7), finish(seen[5], 0.1), finish(seen[7], 0.1)]
    assert searcher.ask(8, done) == pytest.approx({"w0": 1 / 3, "w1": 1 / 3, "w2": 1 / 3, "w3": 0.0})


def test_further_passes_add_parents_again_until_one_adds_nothing() -> None:
    target = np.array([0.72, 0.28])
    starts = single_parents([-0.1568, -1.0368])

    def score(values: Mapping[str, float]) -> float:
        return -float(((np.array(list(values.values())) - target) ** 2).sum())

    trials = run("greedy_soup", simplex(2), score, 12, starts)
    assert [trial.values["w0"] for trial in trials[:3]] == pytest.approx([0.5, 2 / 3, 3 / 4])
    searcher = GreedySoup(simplex(2), 0)
    assert searcher.report([*starts, *trials])["is_finished"] is True
    assert searcher.report([*starts, *trials])["soup"] == {"w0": 3, "w1": 1}


def test_a_soup_over_layer_groups_moves_them_together_and_leaves_other_variables_alone() -> None:
    groups = (("a0", "b0"), ("a1", "b1"))
    variables = [Variable(name, 0.0, 1.0, 0.5) for group in groups for name in group]
    space = SearchSpace((*variables, Variable("density", 0.1, 0.9, 0.3)), groups)
    for trial in run("greedy_soup", space, lambda values: values["a0"], 3):
        assert trial.values["a0"] == trial.values["a1"]
        assert trial.values["density"] == 0.3


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (PLANE, "must sum to one"),
        (simplex(3, 0.1, 0.8), r"lies in \[0.1, 0.8\]; give it the range"),
        (
            SearchSpace(tuple(Variable(n, 0.0, 1.0, 0.4) for n in "abcde"), (("a", "b"), ("c", "d", "e"))),
            "the groups have 2, 3 names",
        ),
    ],
)
def test_a_space_without_soups_is_refused(space: SearchSpace, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        GreedySoup(space, 0)


def test_greedy_soup_beats_random_search_where_some_parents_harm() -> None:
    quality = (1.0, 0.9, -2.0, 0.8, -2.0, -2.0)

    def score(values: Mapping[str, float]) -> float:
        shares = list(values.values())
        return sum(q * s for q, s in zip(quality, shares, strict=True)) - sum(s * s for s in shares)

    singles = [score({f"w{j}": float(j == k) for j in range(6)}) for k in range(6)]
    soup = best(run("greedy_soup", simplex(6), score, 10, single_parents(singles)))
    assert soup > max(best(run("random", simplex(6), score, 10, seed=seed)) for seed in range(10))


# LCSC


def test_average_coefficients_are_those_of_the_recurrence() -> None:
    assert average_coefficients(3, 0.5) == (0.25, 0.25, 0.5)
    average, checkpoints = 3.0, (3.0, 5.0, -1.0, 2.0)
    for checkpoint in checkpoints[1:]:
        average = 0.9 * average + 0.1 * checkpoint
    coefficients = average_coefficients(4, 0.9)
    assert sum(coefficients) == pytest.approx(1.0)
    assert sum(a * c for a, c in zip(coefficients, checkpoints, strict=True)) == pytest.approx(average)


def test_lcsc_begins_with_averages_of_the_run_unless_told_otherwise() -> None:
    first = Lcsc(simplex(3), 0).ask(4, single_parents([0.1, 0.2, 0.3]))
    assert tuple(first.values()) == pytest.approx(average_coefficients(3, 0.7))
    drawn = Lcsc(simplex(3), 0, start="random").ask(3, single_parents([0.1, 0.2, 0.3]))
    assert drawn == build_searcher("random", simplex(3), 0).ask(3, [])


def test_lcsc_finds_negative_coefficients_where_intervals_allow_them() -> None:
    space, target = simplex(3, -1.0, 2.0), (1.3, 0.1, -0.4)

    def score(values: Mapping[str, float]) -> float:
        return -sum((value - t) ** 2 for value, t in zip(values.values(), target, strict=True))

    trials = run("lcsc", space, score, 120)
    found = max(trials, key=lambda trial: trial.score or -math.inf)
    assert tuple(found.values.values()) == pytest.approx(target, abs=0.05)
    assert all(math.isclose(sum(trial.values.values()), 1.0, abs_tol=1e-9) for trial in trials)


def test_lcsc_tries_the_corner_of_a_simplex_once() -> None:
    """Where one parent alone is best, most children are projected onto it."""
    trials = run("lcsc", simplex(3), lambda values: values["w1"], 80, single_parents([0.0, 1.0, 0.0]), population=4)
    points = {tuple(trial.values.values()) for trial in trials}
    assert len(points) == 80
    assert (0.0, 1.0, 0.0) not in points


def test_lcsc_beats_random_search_on_a_quadratic() -> None:
    target = (0.55, 0.25, 0.15, 0.05)

    def score(values: Mapping[str, float]) -> float:
        return -sum((value - t) ** 2 for value, t in zip(values.values(), target, strict=True))

    evolved = np.median([-best(run("lcsc", simplex(4), score, 96, seed=seed)) for seed in range(5)])
    drawn = np.median([-best(run("random", simplex(4), score, 96, seed=seed)) for seed in range(5)])
    assert evolved < drawn / 2


# MAP


def measured(
    space: SearchSpace, objectives: Callable[[Mapping[str, float]], tuple[float, ...]], num: int
) -> list[Trial]:
    searcher = build_searcher("random", space, 5)
    trials = []
    for number in range(num):
        point = searcher.ask(number, [])
        found = objectives(space.values(point))
        trials.append(Trial(number, TrialState.COMPLETE, point, number, sum(found), found, space.values(point)))
    return trials


def two_peaks(values: Mapping[str, float]) -> tuple[float, float]:
    """Quadratics with their best at (0.2, 0.2) and (0.8, 0.6); the Pareto set is the line between."""
    x, y = values["x"], values["y"]
    return 0.9 - (x - 0.2) ** 2 - (y - 0.2) ** 2, 0.7 - (x - 0.8) ** 2 - (y - 0.6) ** 2


def test_map_asks_for_points_of_the_pareto_set_when_scores_are_quadratic() -> None:
    searcher = MapFront(PLANE, 0)
    seen = measured(PLANE, two_peaks, searcher.design)
    asked = []
    for number in range(len(seen), len(seen) + 6):
        point = searcher.ask(number, seen)
        asked.append(point)
        seen.append(Trial(number, TrialState.RUNNING, point, len(seen), values=point))
    for point in asked:
        along = ((point["x"] - 0.2) * 0.6 + (point["y"] - 0.2) * 0.4) / 0.52
        beside = abs((point["x"] - 0.2) * 0.4 - (point["y"] - 0.2) * 0.6) / math.sqrt(0.52)
        assert -0.05 < along < 1.05
        assert beside < 0.05
    gaps = [math.dist(tuple(a.values()), tuple(b.values())) for a, b in itertools.combinations(asked, 2)]
    assert min(gaps) > 0.03, "running trials count as asked for, so the front is covered rather than repeated"


def test_map_reports_the_errors_of_its_fits_and_the_front_they_promise() -> None:
    noise = np.random.default_rng(0)
    seen = measured(PLANE, lambda values: (two_peaks(values)[0], float(noise.random())), 30)
    report = MapFront(PLANE, 0, design=30).report(seen)
    exact, noisy = report["fit"]
    assert exact["observations"] == 30
    assert exact["coefficients"] == 6
    assert exact["left_out"] < 1e-9
    assert exact["r_squared"] == pytest.approx(1.0)
    assert noisy["left_out"] > noisy["residual"] > 0.1
    assert noisy["r_squared"] < 0.6
    assert all(set(one["values"]) == {"x", "y"} and len(one["predicted"]) == 2 for one in report["front"])
    assert "fit" not in MapFront(PLANE, 0, design=31).report(seen)


def test_map_needs_twice_as_many_trials_as_coefficients_and_one_variable_less_in_a_simplex() -> None:
    assert MapFront(PLANE, 0).design == 12
    assert MapFront(simplex(4), 0).design == 20
    assert MapFront(simplex(16), 0).design == 272


def test_map_counts_starts_and_draws_in_place_of_failed_trials() -> None:
    searcher = MapFront(simplex(2), 0, design=4)
    starts = [replace(trial, objectives=(trial.score or 0.0, 0.1)) for trial in single_parents([0.3, 0.4])]
    draw = searcher.ask(2, starts)
    assert draw == build_searcher("random", simplex(2), 0).ask(2, [])
    failed = [Trial(n, TrialState.FAILED, build_searcher("random", simplex(2), 0).ask(n, []), n) for n in range(2, 9)]
    assert searcher.ask(9, [*starts, *failed]) == build_searcher("random", simplex(2), 0).ask(9, [])
