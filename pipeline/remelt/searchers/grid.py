"""Grid search: every combination of a few values of each variable, from coarse to fine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remelt.errors import RecipeError
from remelt.searchers.options import whole_number
from remelt.searchers.random_search import generator, uniform_point
from remelt.searchers.replay import num_starts
from remelt.searchers.spec import SearchSpace, Trial

MOST_POINTS = 10_000
"""A larger grid is refused: nobody evaluates it, and ordering it would take longer than an ask may."""

SAME = 1e-9


class Grid:
    """The points of a regular grid, each once, the point farthest from all before it next.

    So any budget covers the whole space, first coarsely, then finely. A variable outside of simplex groups takes
    `points` evenly spaced values of its interval, ends included. A simplex group of n takes the simplex lattice: all
    values that are multiples of 1 / (points - 1) and sum to 1, C(points + n - 2, n - 1) of them, those outside of
    their declared intervals left out. Points that a start has tried already, such as a single parent, are left out
    too. After the last point of the grid, asks are uniform draws; `report` says so.

    Args:
        space: The search space.
        seed: The study's seed; it decides among points that are equally far.
        points: Values of each variable, 2 to 10,000.

    Raises:
        RecipeError: The option is out of its interval, the grid has more than 10,000 points, or none.
    """

    def __init__(self, space: SearchSpace, seed: int, *, points: int = 5) -> None:
        self.space = space
        self.seed = seed
        self.points = whole_number("grid", "points", points, 2, MOST_POINTS)
        self._axes = self._build_axes()
        size = math.prod(len(axis) for axis in self._axes)
        if not 0 < size <= MOST_POINTS:
            raise RecipeError(
                f"searcher grid: {self.points} points for each of {len(space.variables)} variables make a grid of "
                f"{size:,}; at most {MOST_POINTS:,} are allowed: take fewer points or variables, or another searcher"
                if size
                else f"searcher grid: no share that is a multiple of 1/{self.points - 1} lies in the intervals of the "
                "simplex; take more points"
            )
        self._grid_PV = self._multiply(self._axes)
        self._order: list[int] = []
        self._left_out: tuple[int, ...] = ()

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """The next point of the grid; see `remelt.searchers.spec.Searcher`."""
        index = number - num_starts(seen)
        order = self._ordered(self._tried(seen), index + 1)
        if index >= len(order):
            return uniform_point(self.space, generator(self.seed, number))
        row = self._grid_PV[order[index]]
        return {variable.name: float(x) for variable, x in zip(self.space.variables, row, strict=True)}

    def report(self, seen: Sequence[Trial]) -> Mapping[str, Any]:
        """The size of the grid, how many of its points were asked for, and whether that was all."""
        size = len(self._grid_PV) - len(self._tried(seen))
        asked = len(seen) - num_starts(seen)
        return {"points": size, "asked": min(asked, size), "is_finished": asked >= size}

    def _build_axes(self) -> list[list[dict[str, float]]]:
        """What is multiplied to make the grid: the values of one variable, or the lattice of one simplex group."""
        grouped = {name for group in self.space.simplex for name in group}
        axes = []
        for variable in self.space.variables:
            if variable.name not in grouped:
                steps = np.linspace(variable.low, variable.high, self.points)
                axes.append([{variable.name: float(x)} for x in steps])
        intervals = {variable.name: (variable.low - SAME, variable.high + SAME) for variable in self.space.variables}
        for group in self.space.simplex:
            size = math.comb(self.points + len(group) - 2, len(group) - 1)
            if size > MOST_POINTS:
                raise RecipeError(
                    f"searcher grid: {self.points} points for a simplex of {len(group)} make a lattice of {size:,}; at "
                    f"most {MOST_POINTS:,} are allowed: take fewer points, or another searcher"
                )
            lattice = (dict(zip(group, shares, strict=True)) for shares in _lattice(self.points - 1, len(group)))
            axes.append(
                [one for one in lattice if all(intervals[n][0] <= x <= intervals[n][1] for n, x in one.items())]
            )
        return axes

    def _multiply(self, axes: Sequence[Sequence[Mapping[str, float]]]) -> NDArray[np.float64]:
        names = [variable.name for variable in self.space.variables]
        rows = []
        for parts in itertools.product(*axes):
            values = {name: x for part in parts for name, x in part.items()}
            rows.append([values[name] for name in names])
        return np.array(rows)

    def _tried(self, seen: Sequence[Trial]) -> tuple[int, ...]:
        """Grid points that a start stands for; starts come first, so this is settled before the first ask."""
        names = [variable.name for variable in self.space.variables]
        tried: list[int] = []
        for trial in seen:
            if not trial.point and all(name in trial.values for name in names):
                row = np.array([trial.values[name] for name in names])
                tried.extend(np.flatnonzero(np.abs(self._grid_PV - row).max(axis=1) < SAME).tolist())
        return tuple(sorted(set(tried)))

    def _ordered(self, left_out: tuple[int, ...], count: int) -> list[int]:
        """The first `count` places of the farthest-point order, or all there are; kept between asks."""
        if left_out != self._left_out:
            self._order, self._left_out = [], left_out
        size = len(self._grid_PV) - len(left_out)
        if min(count, size) > len(self._order):
            self._order = self._farthest_first(left_out, min(max(count, 2 * len(self._order)), size))
        return self._order

    def _farthest_first(self, left_out: tuple[int, ...], count: int) -> list[int]:
        lows = np.array([variable.low for variable in self.space.variables])
        ranges = np.array([variable.high - variable.low for variable in self.space.variables])
        # Among equally far points the first of a fixed shuffle is taken, so that no corner is preferred.
        shuffle = generator(self.seed).permutation(len(self._grid_PV))
        unit_PV = ((self._grid_PV - lows) / ranges)[shuffle]
        order: list[int] = np.flatnonzero(np.isin(shuffle, left_out)).tolist()
        if not order:
            order.append(int(np.argmin(_squared_distances(unit_PV, unit_PV.mean(axis=0)))))
        nearest_P = np.full(len(unit_PV), np.inf)
        for place in order:
            nearest_P = np.minimum(nearest_P, _squared_distances(unit_PV, unit_PV[place]))
        nearest_P[order] = -np.inf
        while len(order) < len(left_out) + count:
            place = int(np.argmax(nearest_P))
            order.append(place)
            nearest_P = np.minimum(nearest_P, _squared_distances(unit_PV, unit_PV[place]))
            nearest_P[place] = -np.inf
        return [int(shuffle[place]) for place in order[len(left_out) :]]


def _squared_distances(rows_PV: NDArray[np.float64], row_V: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounded, so that equal distances tie however they were summed.
    distances: NDArray[np.float64] = np.round(((rows_PV - row_V) ** 2).sum(axis=1), 12)
    return distances


def _lattice(divisions: int, num_members: int) -> Iterator[tuple[float, ...]]:
    """All ways to share `divisions` equal parts of 1 among the members."""
    for bars in itertools.combinations(range(divisions + num_members - 1), num_members - 1):
        edges = (-1, *bars, divisions + num_members - 1)
        yield tuple((b - a - 1) / divisions for a, b in itertools.pairwise(edges))
