"""What every searcher of the table must hold. A new row gets these for free."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from remelt.errors import RecipeError
from remelt.recipe import Variable
from remelt.searchers import (
    SEARCHERS,
    Searcher,
    SearchSpace,
    Trial,
    TrialState,
    build_searcher,
    needs_objectives,
    needs_simplex,
    searcher_options,
    searcher_report,
)


def simplex(num: int) -> SearchSpace:
    names = tuple(f"w{k}" for k in range(num))
    return SearchSpace(tuple(Variable(name, 0.0, 1.0, 1 / num) for name in names), (names,))


BOX = SearchSpace((Variable("density", 0.2, 0.9, 0.5), Variable("scale", -1.0, 3.0, 1.0)))
SIMPLEX = SearchSpace(
    (*(Variable(f"w{k}", 0.0, 1.0, 0.25) for k in range(4)), Variable("density", 0.2, 0.9, 0.5)),
    simplex=(("w0", "w1", "w2", "w3"),),
)
NARROW = SearchSpace(tuple(Variable(f"w{k}", 0.1, 0.5, 1 / 3) for k in range(3)), simplex=(("w0", "w1", "w2"),))
LAYERS = SearchSpace(
    tuple(Variable(f"{part}{k}", 0.0, 1.0, 0.5) for part in ("early", "late") for k in range(2)),
    simplex=(("early0", "early1"), ("late0", "late1")),
)
SPACES = {
    "box": BOX,
    "simplex": SIMPLEX,
    "narrow": NARROW,
    "layers": LAYERS,
    "softmax": replace(NARROW, softmax=True),
    "single": SearchSpace((Variable("t", 0.0, 1.0, 0.5),)),
    "sixteen": simplex(16),
    "sixteen free": SearchSpace(tuple(Variable(f"w{k}", -1.0, 1.0, 0.1) for k in range(16))),
}
TARGET = {"w0": 0.5, "w1": 0.3, "w2": 0.15, "w3": 0.05, "density": 0.8, "scale": 0.2, "t": 0.9}

OPTIONS: dict[str, dict[str, float]] = {
    "gp": {"startup": 2},
    "tpe": {"startup": 5},
    "nsga3": {"population": 6},
    "map": {"design": 8},
    "lcsc": {"population": 6},
}
"""Smaller than the defaults, so that short studies come to what an algorithm does when it has learned something."""

REFUSED = {("grid", "sixteen free"), ("greedy_soup", "narrow"), ("greedy_soup", "softmax")}
"""Spaces that a searcher refuses though it has what it needs; for each a test below or of its own says the words."""

LONGEST = {"gp": 4, "map": 11}
"""Trials at most in a study of searchers whose ask takes a tenth of a second or more."""

pytestmark = pytest.mark.parametrize("name", list(SEARCHERS))


def quadratic(values: Mapping[str, float]) -> float:
    return -sum((value - TARGET.get(name, 0.0)) ** 2 for name, value in values.items())


def build(name: str, space: SearchSpace, seed: int = 0) -> Searcher:
    return build_searcher(name, space, seed, OPTIONS.get(name))


def length(name: str, num_trials: int) -> int:
    return min(num_trials, LONGEST.get(name, num_trials))


def skip_where_refused(name: str, kind: str) -> None:
    if (name, kind) in REFUSED or (needs_simplex(name) and not SPACES[kind].simplex):
        with pytest.raises(RecipeError):
            build(name, SPACES[kind])
        pytest.skip("refuses this space, as it should")


def run(
    name: str,
    space: SearchSpace,
    num_trials: int,
    *,
    seed: int = 0,
    num_evaluators: int = 2,
    score: Callable[[Mapping[str, float]], float] = quadratic,
    state: Callable[[int], TrialState] = lambda number: TrialState.COMPLETE,
    starts: Sequence[Trial] = (),
    rebuild: bool = False,
) -> list[Trial]:
    """A study without a cluster: `num_evaluators` trials run at once, the oldest finishes first."""
    searcher = build(name, space, seed)
    finished: list[Trial] = list(starts)
    running: list[Trial] = []
    for number in range(len(starts), len(starts) + num_trials):
        if rebuild:
            searcher = build(name, space, seed)
        point = searcher.ask(number, [*finished, *running])
        values = space.values(point)
        running.append(Trial(number, TrialState.RUNNING, point, len(finished), values=values))
        if len(running) == num_evaluators:
            trial = replace(running.pop(0), state=state(number))
            if trial.state is TrialState.COMPLETE:
                value = score(trial.values)
                several = (value, -sum(x * x for x in trial.values.values())) if needs_objectives(name) else ()
                trial = replace(trial, score=value, objectives=several)
            finished.append(trial)
    return [*finished, *running]


@functools.cache
def short_study(name: str, kind: str) -> tuple[Trial, ...]:
    """A study of 40 trials, shorter where asks are costly; several tests look at it."""
    return tuple(run(name, SPACES[kind], length(name, 40)))


def is_allowed(space: SearchSpace, point: Mapping[str, float]) -> bool:
    """In the box, but for groups that stand for themselves."""
    own = {name for group in space.simplex if abs(sum(point[name] for name in group) - 1) < 1e-9 for name in group}
    declared = {variable.name: variable for variable in space.variables}
    return all(
        bounds.low <= point[bounds.name] <= bounds.high
        for bounds in (declared[variable.name] if variable.name in own else variable for variable in space.box)
    )


@pytest.mark.parametrize("kind", list(SPACES))
def test_points_are_allowed_and_values_in_their_intervals(name: str, kind: str) -> None:
    skip_where_refused(name, kind)
    space = SPACES[kind]
    for trial in short_study(name, kind):
        assert list(trial.point) == [variable.name for variable in space.variables]
        assert is_allowed(space, trial.point)
        values = space.values(trial.point)
        assert all(variable.low <= values[variable.name] <= variable.high for variable in space.variables)
        for group in space.simplex:
            assert math.isclose(sum(values[member] for member in group), 1.0, abs_tol=1e-12)


@pytest.mark.parametrize("kind", list(SPACES))
def test_different_numbers_give_different_points(name: str, kind: str) -> None:
    skip_where_refused(name, kind)
    points = [tuple(trial.point.values()) for trial in short_study(name, kind)]
    assert len(set(points)) == len(points)


def test_points_are_plain_floats_that_survive_json(name: str) -> None:
    for trial in short_study(name, "simplex"):
        assert all(type(value) is float for value in trial.point.values())
        assert json.loads(json.dumps(dict(trial.point))) == trial.point


def test_a_rebuilt_searcher_asks_the_same(name: str) -> None:
    num_trials = length(name, 40)
    assert list(short_study(name, "simplex")) == run(name, SIMPLEX, num_trials, rebuild=True)


def test_a_study_killed_at_any_moment_and_resumed_asks_the_same(name: str) -> None:
    """What a searcher keeps between asks, and in which order it is asked, changes nothing."""
    trials = {trial.number: trial for trial in short_study(name, "simplex")}
    order = list(short_study(name, "simplex"))
    searcher = build(name, SIMPLEX)
    numbers = list(trials)
    for number in [*numbers[::-2], *numbers[1::2]]:
        trial = trials[number]
        # What the ask saw: what had finished by then, in that order, and what ran.
        finished = order[: trial.asked_after]
        running = [
            replace(other, state=TrialState.RUNNING, score=None, objectives=())
            for other in sorted(order[trial.asked_after :], key=lambda one: one.number)
            if other.number < number
        ]
        assert searcher.ask(number, [*finished, *running]) == trial.point, number


def test_an_ask_has_no_side_effect(name: str) -> None:
    seen = list(short_study(name, "simplex"))
    searcher = build(name, SIMPLEX)
    first = searcher.ask(len(seen), seen)
    searcher.ask(3, [])
    assert searcher.ask(len(seen), seen) == first
    assert seen == list(short_study(name, "simplex"))


def test_scores_that_change_afterwards_are_not_mistaken_for_those_seen_before(name: str) -> None:
    """Objectives that compare trials give old trials new scores."""
    seen = list(short_study(name, "simplex"))
    other = [
        t if t.score is None else replace(t, score=-t.score, objectives=tuple(-x for x in t.objectives)) for t in seen
    ]
    kept = build(name, SIMPLEX)
    kept.ask(len(seen), seen)
    assert kept.ask(len(seen), other) == build(name, SIMPLEX).ask(len(seen), other)


def test_another_seed_gives_other_points(name: str) -> None:
    if name == "greedy_soup":
        pytest.skip("its procedure draws nothing")
    first, second = (run(name, SIMPLEX, length(name, 12), seed=seed) for seed in (0, 1))
    assert [trial.point for trial in first] != [trial.point for trial in second]


@pytest.mark.parametrize(
    "state",
    [
        lambda number: TrialState.FAILED if number % 3 == 0 else TrialState.COMPLETE,
        lambda number: TrialState.STOPPED if number % 3 else TrialState.COMPLETE,
        lambda number: TrialState.FAILED,
        lambda number: TrialState.STOPPED,
    ],
    ids=["third failed", "most stopped", "all failed", "all stopped"],
)
def test_failed_and_stopped_trials_do_not_break_it(name: str, state: Callable[[int], TrialState]) -> None:
    num_trials = length(name, 40)
    trials = run(name, SIMPLEX, num_trials, state=state)
    assert len({tuple(trial.point.values()) for trial in trials}) == num_trials


def test_a_constant_score_does_not_break_it(name: str) -> None:
    num_trials = length(name, 40)
    trials = run(name, SIMPLEX, num_trials, score=lambda values: 0.25)
    assert len({tuple(trial.point.values()) for trial in trials}) == num_trials


def test_many_running_trials_do_not_break_it(name: str) -> None:
    trials = run(name, SIMPLEX, max(10, length(name, 24)), num_evaluators=8)
    assert sum(trial.state is TrialState.RUNNING for trial in trials) == 7
    assert len({tuple(trial.point.values()) for trial in trials}) == len(trials)


def starts() -> list[Trial]:
    """The uniform merge and the single parents, one of them failed, one that the variables cannot express."""
    values = [{f"w{k}": 0.25 for k in range(4)}, *({f"w{k}": float(k == one) for k in range(4)} for one in range(4))]
    trials = [
        Trial(n, TrialState.COMPLETE, {}, n, quadratic(each), (quadratic(each), 0.1 * n), each | {"density": 0.5})
        for n, each in enumerate(values)
    ]
    failed = replace(trials[3], state=TrialState.FAILED, score=None, objectives=())
    return [*trials[:3], failed, replace(trials[4], values={})]


def test_trials_that_no_searcher_asked_for_are_allowed(name: str) -> None:
    begin = starts() if needs_objectives(name) else [replace(trial, objectives=()) for trial in starts()]
    num_trials = length(name, 12)
    trials = run(name, SIMPLEX, num_trials, starts=begin)
    assert trials == run(name, SIMPLEX, num_trials, starts=begin, rebuild=True)
    assert len({tuple(trial.point.values()) for trial in trials[5:]}) == num_trials


@pytest.mark.parametrize("num_evaluators", [1, 5])
def test_beats_the_start_on_a_quadratic(name: str, num_evaluators: int) -> None:
    start = quadratic(SIMPLEX.values({variable.name: variable.init for variable in SIMPLEX.box}))
    num_trials = LONGEST[name] + 2 if name in LONGEST else 48
    scores = [trial.score for trial in run(name, SIMPLEX, num_trials, num_evaluators=num_evaluators)]
    assert max(score for score in scores if score is not None) > start


def test_options_are_numbers_or_words_with_defaults_that_work(name: str) -> None:
    options = searcher_options(name)
    assert all(value is None or isinstance(value, int | float | str) for value in options.values())
    given = {option: value for option, value in options.items() if value is not None}
    space = SIMPLEX
    assert build_searcher(name, space, 0, given).ask(0, []) == build_searcher(name, space, 0).ask(0, [])


def test_options_out_of_their_intervals_are_refused_in_words(name: str) -> None:
    for option, default in searcher_options(name).items():
        value = "no such word" if isinstance(default, str) else -1
        with pytest.raises(RecipeError, match=f"searcher {name}: {option} is"):
            build_searcher(name, SIMPLEX, 0, {option: value})


def test_a_report_is_json(name: str) -> None:
    json.dumps(searcher_report(build(name, SIMPLEX), short_study(name, "simplex")), allow_nan=False)


@functools.cache
def points_of_another_process() -> dict[str, list[dict[str, float]]]:
    """The first asks of every searcher in a process whose string hashes are other ones."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_searchers as t; "
        "points = lambda name: [dict(trial.point) for trial in t.run(name, t.SIMPLEX, t.length(name, 12))]; "
        "print(json.dumps({name: points(name) for name in t.SEARCHERS}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stderr == ""
    points: dict[str, list[dict[str, float]]] = json.loads(out.stdout)
    return points


def test_asks_do_not_depend_on_the_process_and_print_nothing(name: str) -> None:
    assert points_of_another_process()[name] == [trial.point for trial in run(name, SIMPLEX, length(name, 12))]
