"""What a searcher is: a pure function from the trials seen so far to the next point of a box.

A searcher knows neither the cluster, nor evaluations, nor time. Each `ask` builds its state anew from (study seed,
trial number, trials seen), so a study that was killed and resumed asks what an uninterrupted one would have. It may
be called at any moment, with trials still running: a free evaluator never waits for a generation to end.

Searchers see a box. What a point of it means, simplex groups included, is the `SearchSpace`'s business. Those that know
about simplex groups may leave the box: shares that sum to one inside their declared intervals stand for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from remelt.errors import RecipeError
from remelt.recipe import Variable

SMALLEST_SHARE = 0.01
"""Lower end of a simplex variable's search range, in units of its upper end: shares stay positive, so their sum too."""

SOFTMAX_WIDTH = 1.5
"""Of a softmax's box: logits lie within so much of the start's. Wider boxes lost much on noisy quadratics."""

SUM_TOLERANCE = 1e-9
"""How far the declared bounds of a simplex group may miss a sum of one, for decimal fractions such as three 1/3."""


class TrialState(StrEnum):
    """Where a trial stands. STOPPED is for a fidelity ladder that gave it up early."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a searcher may know of a trial."""

    number: int
    state: TrialState
    point: Mapping[str, float]
    """In the search box; empty for a trial that no searcher asked for (the uniform merge, a single parent)."""
    asked_after: int = 0
    """How many trials had finished when this one was asked for: with the order of `seen`, all there is of history."""
    score: float | None = None
    """Finite, higher is better; None unless COMPLETE."""
    objectives: tuple[float, ...] = ()
    """Finite, each to be maximised, the same number in all trials; empty in a study of one objective, or as `score`."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What was evaluated, in the declared intervals; empty for a parent that the variables cannot express."""


def objectives_of(trial: Trial) -> tuple[float, ...]:
    """A complete trial's objectives, its score where it has no others; nothing for any other trial."""
    return () if trial.score is None else trial.objectives or (trial.score,)


class Searcher(Protocol):
    """Ask and tell, with the telling done by `seen`.

    A class that can do nothing without several objectives says so by `needs_objectives = True`, one that needs a
    simplex group by `needs_simplex = True`; the others lack these attributes.
    """

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """The point for trial `number`: one value for each variable.

        It lies within `SearchSpace.box`, but for simplex groups whose values sum to one within their declared
        intervals: such a point may leave a parent out, which the box does not hold.

        A searcher never runs dry. One whose own procedure has an end says in its docstring what it asks for after it.

        Args:
            number: The trial's number; two numbers give two different points.
            seen: Finished trials in the order in which they finished, then the running ones by number. Scores may
                change from one ask to the next where the objective compares trials with each other.
        """
        ...


@runtime_checkable
class Reporting(Protocol):
    """What a searcher may offer beside `ask`."""

    def report(self, seen: Sequence[Trial]) -> Mapping[str, Any]:
        """What it has learned, as JSON values: fit errors of a surrogate, whether its procedure has ended."""
        ...


@dataclass(frozen=True)
class SearchSpace:
    """Variables, some of them in simplex groups whose values always sum to one.

    A group is searched in a positive box and scaled by one factor (reference comparisons on noisy quadratics put this
    ahead of softmax, Dirichlet and stick-breaking maps for few variables). The factor is the one redundant direction.
    With `softmax`, the box is around the start and its coordinates are logits, which are the shares' logarithms: so it
    was ahead for eight variables and more. No share then leaves the start by more than a factor of exp(3). A point
    holds shares either way, and means the same in both.

    Where the scaled values would leave their declared intervals, they are clipped and the factor grows or shrinks
    until they sum to one again.

    Raises:
        RecipeError: An interval is empty, a start lies outside of it, or a group cannot sum to one.
    """

    variables: tuple[Variable, ...]
    simplex: tuple[tuple[str, ...], ...] = ()
    softmax: bool = False
    """Whether simplex groups are searched by their logarithms, in a tight box around the start."""
    box: tuple[Variable, ...] = field(init=False)
    """The variables with the intervals and starts that a searcher works in; in the order of `variables`."""

    def __post_init__(self) -> None:
        if not self.variables:
            raise RecipeError("the search space has no variable: give the recipe a number as {search: [low, high]}")
        by_name = {variable.name: variable for variable in self.variables}
        if len(by_name) != len(self.variables):
            raise RecipeError(f"the search space names a variable twice: {[v.name for v in self.variables]}")
        for variable in self.variables:
            if not variable.low <= variable.init <= variable.high or not variable.low < variable.high:
                raise RecipeError(
                    f"variable {variable.name!r} starts at {variable.init:g} in [{variable.low:g}, {variable.high:g}]: "
                    "its interval must have low < high and hold the start"
                )
        boxes = dict(by_name)
        for group in self.simplex:
            boxes.update(_group_box(group, by_name, softmax=self.softmax))
        object.__setattr__(self, "box", tuple(boxes[variable.name] for variable in self.variables))

    def values(self, point: Mapping[str, float]) -> dict[str, float]:
        """What a point stands for: every variable in its declared interval, every group summing to 1.

        A group's shares are divided by their sum, so that a point made of values stands for these very values.
        """
        values = {variable.name: float(point[variable.name]) for variable in self.variables}
        intervals = {variable.name: (variable.low, variable.high) for variable in self.variables}
        for group in self.simplex:
            values.update(_scale(group, values, intervals))
        return values

    def is_log(self, name: str) -> bool:
        """Whether a variable's coordinate of the box is a logarithm."""
        return self.softmax and any(name in group for group in self.simplex)

    def at(self, unit_PV: NDArray[np.float64]) -> NDArray[np.float64]:
        """The points of the box at places of the unit cube, a row for each, a column for each variable."""
        columns = [self._line(variable)[0](unit_PV[:, place]) for place, variable in enumerate(self.box)]
        return np.stack(columns, axis=1)

    def point_at(self, unit: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
        """The point of the box at a place of the unit cube, one coordinate for each variable."""
        (point,) = self.at(np.asarray(unit, np.float64)[None]).tolist()
        return {variable.name: value for variable, value in zip(self.box, point, strict=True)}

    def unit_of(self, point: Mapping[str, float]) -> NDArray[np.float64]:
        """The place of a point in the unit cube; outside of it where the point leaves the box."""
        return np.array([self._line(variable)[1](point[variable.name]) for variable in self.box])

    def _line(self, variable: Variable) -> tuple[Callable[[Any], Any], Callable[[float], float]]:
        """From a coordinate of the unit cube to the variable's value, and back."""
        low, high = variable.low, variable.high
        if not self.is_log(variable.name):
            return lambda u: np.clip(low + u * (high - low), low, high), lambda value: (value - low) / (high - low)
        width = math.log(high / low)
        # A parent that a point leaves out has no logarithm: the box's edge stands for it.
        return (
            lambda u: np.clip(low * np.exp(u * width), low, high),
            lambda value: math.log(max(value, low) / low) / width,
        )

    def nearest_point(self, values: Mapping[str, float]) -> dict[str, float] | None:
        """The point of the box that comes nearest to standing for `values`; None where a variable has no value.

        Exact where the box holds it. A simplex parent that is left out gets the smallest share instead.
        """
        if any(variable.name not in values for variable in self.variables):
            return None
        shares = dict(values)
        boxes = {variable.name: variable for variable in self.box}
        for group in self.simplex:
            members = [(boxes[name].low, boxes[name].high, max(values[name], 0.0)) for name in group]
            # Of all factors, one with which the shares lie inside their box, if there is any.
            least = max((low / share for low, _, share in members if share > 0), default=0.0)
            most = min((high / share for _, high, share in members if share > 0), default=0.0)
            scale = min(max(_middle_scale(members), least), most)
            shares.update({name: scale * values[name] for name in group})
        return {name: min(max(shares[name], variable.low), variable.high) for name, variable in boxes.items()}


def _group_box(group: tuple[str, ...], by_name: Mapping[str, Variable], *, softmax: bool) -> dict[str, Variable]:
    """Positive search intervals for a simplex group, its starts scaled to lie around the middle of their box.

    The scale is free, so the start goes where normal draws are cut least by the bounds. With `softmax` the start is the
    middle of each interval's logarithms.
    """
    members = [by_name[name] for name in group if name in by_name]
    if len(members) != len(group):
        raise RecipeError(f"simplex {list(group)} names {sorted(set(group) - set(by_name))}, which nothing searches")
    low, high = sum(max(0.0, member.low) for member in members), sum(member.high for member in members)
    if low > 1 + SUM_TOLERANCE or high < 1 - SUM_TOLERANCE or any(member.high <= 0 for member in members):
        raise RecipeError(f"simplex {list(group)} cannot sum to 1: its intervals sum to [{low:g}, {high:g}]")
    if softmax:
        shares = {member.name: max(member.init, SMALLEST_SHARE * member.high) for member in members}
        reach = math.exp(SOFTMAX_WIDTH)
        return {name: Variable(name, share / reach, share * reach, share) for name, share in shares.items()}
    lows = [max(member.low, SMALLEST_SHARE * member.high) for member in members]
    starts = [max(member.init, 0.0) for member in members]
    scale = _middle_scale([(a, member.high, start) for a, member, start in zip(lows, members, starts, strict=True)])
    return {
        member.name: Variable(member.name, a, member.high, min(max(start * scale, a), member.high))
        for member, a, start in zip(members, lows, starts, strict=True)
    }


def _middle_scale(members: Sequence[tuple[float, float, float]]) -> float:
    """The factor that brings shares around the middle of their box; of each member its low, high and share."""
    total = sum(share for _, _, share in members)
    return sum((low + high) / 2 for low, high, _ in members) / total if total > 0 else 0.0


def _scale(
    group: tuple[str, ...], values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Scale a group's shares to a sum of 1; where that leaves an interval, to the nearest that does not.

    Positive shares keep their ratios as far as their intervals allow: they grow by the factor at which they, clipped,
    sum to 1. Where a share is zero or negative no factor may reach that, so there they all move by one amount instead,
    which is the Euclidean projection.
    """
    total = sum(values[name] for name in group)
    if total > 0:
        plain = {name: values[name] / total for name in group}
        if all(intervals[name][0] <= value <= intervals[name][1] for name, value in plain.items()):
            return plain
    if all(values[name] > 0 for name in group):
        enough = max(intervals[name][1] / values[name] for name in group)
        return _until_one(lambda factor: {name: factor * values[name] for name in group}, intervals, 0.0, enough)
    return project(group, values, intervals)


def project(
    group: Sequence[str], values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """The nearest values, by Euclidean distance, that lie in their intervals and sum to 1.

    Args:
        group: Names of a simplex group.
        values: Any finite value for each of them.
        intervals: The declared low and high of each of them; the lows sum to at most 1, the highs to at least 1.
    """
    far = max(abs(bound - values[name]) for name in group for bound in intervals[name])
    return _until_one(lambda amount: {name: values[name] + amount for name in group}, intervals, -far, far)


def _until_one(
    moved: Callable[[float], dict[str, float]],
    intervals: Mapping[str, tuple[float, float]],
    below: float,
    above: float,
) -> dict[str, float]:
    """Values moved by the amount at which they, clipped to their intervals, sum to 1.

    That sum never falls as the amount grows, so halving finds it.
    """

    def clipped(amount: float) -> dict[str, float]:
        return {name: min(max(value, intervals[name][0]), intervals[name][1]) for name, value in moved(amount).items()}

    for _ in range(200):
        middle = (below + above) / 2
        if not below < middle < above:
            break
        below, above = (middle, above) if sum(clipped(middle).values()) < 1 else (below, middle)
    return clipped(above)
