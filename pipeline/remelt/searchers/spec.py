"""What a searcher is: a pure function from the trials seen so far to the next point of a box.

A searcher knows neither the cluster, nor evaluations, nor time. Each `ask` builds its state anew from (study seed,
trial number, trials seen), so a study that was killed and resumed asks what an uninterrupted one would have. It may
be called at any moment, with trials still running: a free evaluator never waits for a generation to end.

Searchers see a box only. What a point of the box means, simplex groups included, is the `SearchSpace`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from remelt.errors import RecipeError
from remelt.recipe import Variable

SMALLEST_SHARE = 0.01
"""Lower end of a simplex variable's search range, in units of its upper end: shares stay positive, so their sum too."""

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


class Searcher(Protocol):
    """Ask and tell, with the telling done by `seen`."""

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """The point for trial `number`: one value for each variable, within `SearchSpace.box`.

        Args:
            number: The trial's number; two numbers give two different points.
            seen: Finished trials in the order in which they finished, then the running ones by number.
        """
        ...


@dataclass(frozen=True)
class SearchSpace:
    """Variables, some of them in simplex groups whose values always sum to one.

    A group is searched in a positive box and scaled by one factor (reference comparisons on noisy quadratics put this
    ahead of softmax, Dirichlet and stick-breaking maps for few variables). The factor is the one redundant direction.
    Where the scaled values would leave their declared intervals, they are clipped and the factor grows or shrinks
    until they sum to one again.

    Raises:
        RecipeError: An interval is empty, a start lies outside of it, or a group cannot sum to one.
    """

    variables: tuple[Variable, ...]
    simplex: tuple[tuple[str, ...], ...] = ()
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
            boxes.update(_group_box(group, by_name))
        object.__setattr__(self, "box", tuple(boxes[variable.name] for variable in self.variables))

    def values(self, point: Mapping[str, float]) -> dict[str, float]:
        """What a point of the box stands for: every variable in its declared interval, every group summing to 1."""
        values = {variable.name: float(point[variable.name]) for variable in self.variables}
        intervals = {variable.name: (variable.low, variable.high) for variable in self.variables}
        for group in self.simplex:
            values.update(_scale(group, values, intervals))
        return values


def _group_box(group: tuple[str, ...], by_name: Mapping[str, Variable]) -> dict[str, Variable]:
    """Positive search intervals for a simplex group, its starts scaled to lie around the middle of their box.

    The scale is free, so the start goes where normal draws are cut least by the bounds.
    """
    members = [by_name[name] for name in group if name in by_name]
    if len(members) != len(group):
        raise RecipeError(f"simplex {list(group)} names {sorted(set(group) - set(by_name))}, which nothing searches")
    low, high = sum(max(0.0, member.low) for member in members), sum(member.high for member in members)
    if low > 1 + SUM_TOLERANCE or high < 1 - SUM_TOLERANCE or any(member.high <= 0 for member in members):
        raise RecipeError(f"simplex {list(group)} cannot sum to 1: its intervals sum to [{low:g}, {high:g}]")
    lows = [max(member.low, SMALLEST_SHARE * member.high) for member in members]
    middle = sum((a + member.high) / 2 for a, member in zip(lows, members, strict=True))
    starts = [max(member.init, 0.0) for member in members]
    scale = middle / sum(starts) if sum(starts) > 0 else 0.0
    return {
        member.name: Variable(member.name, a, member.high, min(max(start * scale, a), member.high))
        for member, a, start in zip(members, lows, starts, strict=True)
    }


def _scale(
    group: tuple[str, ...], values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Scale a group's positive shares by the factor at which they, clipped to their intervals, sum to 1.

    That sum never falls as the factor grows, so halving finds it; the usual case needs no clipping and no halving.
    """

    def clipped(factor: float) -> dict[str, float]:
        return {name: min(max(factor * values[name], intervals[name][0]), intervals[name][1]) for name in group}

    total = sum(values[name] for name in group)
    plain = {name: values[name] / total for name in group}
    if all(intervals[name][0] <= value <= intervals[name][1] for name, value in plain.items()):
        return plain
    below, above = 0.0, max(intervals[name][1] / values[name] for name in group)
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(clipped(middle).values()) < 1 else (below, middle)
    return clipped(above)
