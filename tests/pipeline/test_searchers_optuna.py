"""The searchers that ask optuna: its traps, and that they learn."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from remelt.recipe import Variable
from remelt.searchers import Searcher, SearchSpace, Trial, TrialState, build_searcher
from remelt.searchers.gaussian_process import GaussianProcess
from remelt.searchers.map_front import MapFront
from remelt.searchers.nsga3 import Nsga3
from remelt.searchers.optuna_study import Observation, observe

FOUR = SearchSpace(tuple(Variable(f"w{k}", 0.0, 1.0, 0.25) for k in range(4)), (("w0", "w1", "w2", "w3"),))
PLANE = SearchSpace((Variable("x", 0.0, 1.0, 0.5), Variable("y", 0.0, 1.0, 0.5)))
TARGET = {"w0": 0.55, "w1": 0.25, "w2": 0.15, "w3": 0.05, "x": 0.7, "y": 0.3}


def score(values: Mapping[str, float]) -> float:
    return -sum((value - TARGET[name]) ** 2 for name, value in values.items())


def study(searcher: Searcher, space: SearchSpace, num_trials: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(num_trials):
        point = searcher.ask(number, trials)
        values = space.values(point)
        trials.append(Trial(number, TrialState.COMPLETE, point, number, score(values), values=values))
    return trials


def best(trials: Sequence[Trial]) -> float:
    return max(trial.score for trial in trials if trial.score is not None)


def at(number: int, x: float, y: float, value: float | None = None, state: TrialState | None = None) -> Trial:
    state = state or (TrialState.RUNNING if value is None else TrialState.COMPLETE)
    return Trial(number, state, {"x": x, "y": y}, 0, value, values={"x": x, "y": y})


@pytest.mark.parametrize(("name", "num_trials", "num_seeds"), [("gp", 16, 1), ("tpe", 64, 5)])
def test_it_beats_random_search_on_a_quadratic(name: str, num_trials: int, num_seeds: int) -> None:
    searchers = [build_searcher(name, FOUR, seed, {"startup": 8}) for seed in range(num_seeds)]
    found = np.median([-best(study(searcher, FOUR, num_trials)) for searcher in searchers])
    drawn = np.median([-best(study(build_searcher("random", FOUR, seed), FOUR, num_trials)) for seed in range(15)])
    assert found < drawn / 2


@pytest.mark.parametrize("name", ["gp", "tpe", "nsga3"])
def test_an_ask_warns_of_nothing_and_leaves_optunas_logging_as_it_was(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """optuna writes a line for every new study, and warns where an argument is deprecated or experimental."""
    import optuna

    before = optuna.logging.get_verbosity(), logging.getLogger("optuna").handlers[:]
    options = {"population": 4} if name == "nsga3" else {"startup": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study(build_searcher(name, PLANE, 0, options), PLANE, 6)
    assert (optuna.logging.get_verbosity(), logging.getLogger("optuna").handlers[:]) == before
    assert capfd.readouterr() == ("", "")


def test_cmaes_does_without_optunas_sampler_that_pickles_itself_into_the_study() -> None:
    code = (
        "import sys; from remelt.recipe import Variable; from remelt.searchers import SearchSpace, build_searcher; "
        "space = SearchSpace((Variable('x', 0, 1, 0.5),)); "
        "build_searcher('cmaes', space, 0).ask(0, []); print('optuna' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_a_running_trial_sends_the_next_ask_elsewhere(name: str) -> None:
    """Fantasies or a constant liar; without them evaluators that ask at once would all get the same place."""
    seen = study(build_searcher("random", PLANE, 0), PLANE, 14)
    searcher = build_searcher(name, PLANE, 0, {"startup": 4})
    alone = searcher.ask(14, seen)
    crowd = [Trial(14 + k, TrialState.RUNNING, dict(alone), 14) for k in range(6)]
    beside = searcher.ask(14, [*seen, *crowd])
    assert np.hypot(beside["x"] - alone["x"], beside["y"] - alone["y"]) > 0.01


def test_tpe_keeps_away_from_where_trials_were_stopped() -> None:
    """A stopped trial has no score; it counts as worse than any that has one."""
    draws = np.random.default_rng(0).random((30, 2)).tolist()
    seen = [at(n, x, y, 0.5) if x < 0.5 else at(n, x, y, state=TrialState.STOPPED) for n, (x, y) in enumerate(draws)]
    asked = [build_searcher("tpe", PLANE, seed).ask(30, seen)["x"] for seed in range(12)]
    assert sum(x < 0.5 for x in asked) >= 9


def test_failed_trials_are_not_told_and_stopped_ones_have_no_score() -> None:
    seen = [at(0, 0.1, 0.1, 1.0), at(1, 0.2, 0.2, state=TrialState.FAILED), at(2, 0.3, 0.3, state=TrialState.STOPPED)]
    assert observe(PLANE, [*seen, at(3, 0.4, 0.4)]) == [
        Observation({"x": 0.1, "y": 0.1}, TrialState.COMPLETE, (1.0,)),
        Observation({"x": 0.3, "y": 0.3}, TrialState.STOPPED),
        Observation({"x": 0.4, "y": 0.4}, TrialState.RUNNING),
    ]


def test_starts_are_told_by_the_nearest_point_of_the_box() -> None:
    parent = Trial(1, TrialState.COMPLETE, {}, 1, 0.3, values={"w0": 1.0, "w1": 0.0, "w2": 0.0, "w3": 0.0})
    unknown = Trial(2, TrialState.COMPLETE, {}, 2, 0.4)
    (told,) = observe(FOUR, [parent, unknown])
    assert told.point == {"w0": 1.0, "w1": 0.01, "w2": 0.01, "w3": 0.01}
    assert told.objectives == (0.3,)


def test_gp_takes_the_best_and_the_latest_of_too_many_trials() -> None:
    searcher = GaussianProcess(PLANE, 0, observations=10)
    seen = [at(n, n / 100, 0.5, float(-abs(n - 20))) for n in range(40)]
    told = searcher._thinned(observe(PLANE, [*seen, at(40, 0.5, 0.5)]))
    assert [round(one.point["x"] * 100) for one in told] == [18, 19, 20, 21, 22, 35, 36, 37, 38, 39, 50]


# NSGA-III


EIGHT = SearchSpace(tuple(Variable(f"v{k}", 0.0, 1.0, 0.5) for k in range(8)))


def two_objectives(values: Mapping[str, float]) -> tuple[float, float]:
    """Best where all are 0.2 and where all are 0.8; the Pareto set is the line between."""
    x = np.array(list(values.values()))
    return -2 * float(((x - 0.2) ** 2).mean()), -2 * float(((x - 0.8) ** 2).mean())


def front_study(searcher: Searcher, num_trials: int, num_evaluators: int = 1) -> list[Trial]:
    finished: list[Trial] = []
    running: list[Trial] = []
    for number in range(num_trials):
        point = searcher.ask(number, [*finished, *running])
        running.append(Trial(number, TrialState.RUNNING, point, len(finished), values=point))
        if len(running) == num_evaluators:
            trial = running.pop(number % num_evaluators if number % 3 == 0 else 0)
            objectives = two_objectives(trial.values)
            score = sum(objectives)
            finished.append(replace(trial, state=TrialState.COMPLETE, score=score, objectives=objectives))
    return [*finished, *running]


def hypervolume(trials: Sequence[Trial]) -> float:
    """Area that the trials dominate above the point (-1, -1)."""
    area, covered = 0.0, -1.0
    for first, second in sorted((trial.objectives for trial in trials if trial.objectives), reverse=True):
        if first > -1 and second > covered:
            area += (first + 1) * (second - covered)
            covered = second
    return area


def test_the_front_of_nsga3_dominates_more_than_that_of_random_search() -> None:
    found = np.median([hypervolume(front_study(Nsga3(EIGHT, seed), 160)) for seed in range(3)])
    drawn = [hypervolume(front_study(build_searcher("random", EIGHT, seed), 160)) for seed in range(9)]
    assert found > max(drawn)


def test_the_front_of_map_dominates_more_than_that_of_random_search_with_twice_its_trials() -> None:
    found = hypervolume(front_study(MapFront(PLANE, 0, design=12), 20))
    drawn = [hypervolume(front_study(build_searcher("random", PLANE, seed), 40)) for seed in range(9)]
    assert found > max(drawn)


def test_nsga3_of_hundreds_of_generations_does_not_recurse() -> None:
    """optuna finds the parents of a generation by way of those of all before, which Python's stack does not hold."""
    draws = np.random.default_rng(0).random((2000, 2)).tolist()
    seen = [replace(at(n, x, y, 0.0), asked_after=n) for n, (x, y) in enumerate(draws)]
    seen = [replace(trial, objectives=two_objectives(trial.values)) for trial in seen]
    searcher = Nsga3(PLANE, 0, population=4)
    searcher.ask(2000, seen)
    assert searcher._lineage.after(seen).generations.number == 500


def test_nsga3_survivors_of_a_generation_are_chosen_once() -> None:
    """Late trials, later asks and a restart must not give a generation other parents."""
    trials = front_study(Nsga3(PLANE, 0, population=6), 60, num_evaluators=4)
    kept = Nsga3(PLANE, 0, population=6)
    parents: dict[int, list[Mapping[str, float]]] = {}
    for end in range(len(trials) + 1):
        lineage = kept._lineage.after(trials[:end])
        parents.setdefault(lineage.generations.number, [one.point for one in lineage.parents])
        assert parents[lineage.generations.number] == [one.point for one in lineage.parents]
        fresh = Nsga3(PLANE, 0, population=6)._lineage.after(trials[:end])
        assert [one.point for one in fresh.parents] == parents[lineage.generations.number]
    assert len(parents) >= 6


def test_nsga3_children_stay_near_their_parents() -> None:
    trials = front_study(Nsga3(PLANE, 0, population=8), 80)
    distances = [abs(t.point["x"] - t.point["y"]) for t in trials]
    assert np.median(distances[-24:]) < np.median(distances[:8]) / 2
    assert all(first.point != second.point for first, second in pairwise(trials))


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 5])
def test_nsga3_takes_any_number_of_objectives(num_objectives: int) -> None:
    draws = np.random.default_rng(0).random((20, 2)).tolist()
    seen = [
        replace(at(n, x, y, 0.0), asked_after=n, objectives=tuple(-((x - k / 5) ** 2) for k in range(num_objectives)))
        for n, (x, y) in enumerate(draws)
    ]
    assert set(Nsga3(PLANE, 0, population=6).ask(20, seen)) == {"x", "y"}


def test_nsga3_lets_the_starts_compete_with_the_first_generation() -> None:
    perfect = {"x": 0.5, "y": 0.5}
    start = Trial(0, TrialState.COMPLETE, {}, 0, 9.0, (9.0, 9.0), perfect)
    others = [replace(at(n, 0.1 * n, 0.9, 0.0), objectives=(0.0, 0.0), asked_after=n) for n in range(1, 5)]
    parents = Nsga3(PLANE, 0, population=4)._lineage.after([start, *others]).parents
    assert perfect in [one.point for one in parents]
    assert len(parents) == 4
