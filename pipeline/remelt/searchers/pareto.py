"""Pareto fronts: who is dominated, who survives, and the front of a function that costs nothing to evaluate.

Selection is NSGA-III's (Deb and Jain, IEEE TEVC 18(4), 2014): nondominated sorting, then reference directions that
have fewest survivors first. Shapes: P points, V variables, M objectives, all to be maximised; D directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

POPULATION = 100
GENERATIONS = 40
CROSSOVER = 0.7
MUTATION = 0.3
SPREAD = 20.0
"""Distribution index of crossover and mutation."""


def front(objectives_PM: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other point dominates, (P,); of thousands too.

    A point dominates another if it is at least as good on all objectives and better on one; equal points do not
    dominate each other.
    """
    is_front = np.zeros(len(objectives_PM), dtype=bool)
    kept_FM = objectives_PM[:0]
    # By the first objective, then the second, and so on: a dominating point comes first.
    for place in np.lexsort(-objectives_PM.T[::-1]):
        point = objectives_PM[place]
        if not ((kept_FM >= point).all(axis=1) & (kept_FM > point).any(axis=1)).any():
            is_front[place] = True
            kept_FM = np.vstack([kept_FM, point])
    return is_front


def nondominated_ranks(objectives_PM: NDArray[np.float64]) -> NDArray[np.int64]:
    """The front that each point belongs to, (P,): 0 for the Pareto front, 1 for that of the rest, and so on."""
    no_worse_PP = np.all(objectives_PM[:, None, :] >= objectives_PM[None, :, :], axis=2)
    dominates_PP = no_worse_PP & ~no_worse_PP.T
    num_above_P = dominates_PP.sum(axis=0)
    ranks = np.full(len(objectives_PM), -1)
    rank = 0
    while (ranks < 0).any():
        current = (ranks < 0) & (num_above_P == 0)
        ranks[current] = rank
        num_above_P = num_above_P - dominates_PP[current].sum(axis=0)
        rank += 1
    return ranks


def reference_directions(num_objectives: int, most: int) -> NDArray[np.float64]:
    """Evenly spaced directions of the simplex (Das and Dennis), (D, M), as fine as `most` directions allow."""
    if num_objectives == 1:
        return np.ones((1, 1))
    divisions = 1
    while math.comb(divisions + num_objectives, num_objectives - 1) <= most:
        divisions += 1
    shares = []
    for bars in itertools.combinations(range(divisions + num_objectives - 1), num_objectives - 1):
        edges = (-1, *bars, divisions + num_objectives - 1)
        shares.append([(b - a - 1) / divisions for a, b in itertools.pairwise(edges)])
    return np.array(shares)


def survivors(
    objectives_PM: NDArray[np.float64], count: int, directions_DM: NDArray[np.float64], draws: np.random.Generator
) -> NDArray[np.int64]:
    """Places of the `count` points that NSGA-III keeps."""
    ranks = nondominated_ranks(objectives_PM)
    sizes = np.cumsum(np.bincount(ranks))
    last = int(np.searchsorted(sizes, count))
    kept = np.flatnonzero(ranks < last).tolist()
    border = np.flatnonzero(ranks == last).tolist()
    if len(kept) + len(border) > count:
        nearest_P, distance_P = _associate(objectives_PM, ranks <= last, directions_DM)
        border = _spread(kept, border, count - len(kept), nearest_P, distance_P, draws)
    return np.array(kept + border)


def find_front(
    evaluate: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    first_PV: NDArray[np.float64],
    num_objectives: int,
    draws: np.random.Generator,
) -> NDArray[np.float64]:
    """The Pareto set of a function on the unit cube, (P, V), by NSGA-III with simulated binary crossover.

    Args:
        evaluate: (P, V) to (P, M).
        first_PV: Points to begin with, some good ones among them; at most 100, the rest is drawn.
        num_objectives: M.
        draws: Decides everything that is random.
    """
    num_variables = first_PV.shape[1]
    filling = draws.random((max(0, POPULATION - len(first_PV)), num_variables))
    points_PV = np.vstack([first_PV[:POPULATION], filling])
    objectives_PM = evaluate(points_PV)
    directions = reference_directions(num_objectives, POPULATION)
    for _ in range(GENERATIONS):
        children_PV = _children(points_PV, draws)
        points_PV = np.vstack([points_PV, children_PV])
        objectives_PM = np.vstack([objectives_PM, evaluate(children_PV)])
        kept = survivors(objectives_PM, POPULATION, directions, draws)
        points_PV, objectives_PM = points_PV[kept], objectives_PM[kept]
    return points_PV[front(objectives_PM)]


def _associate(
    objectives_PM: NDArray[np.float64], is_candidate: NDArray[np.bool_], directions_DM: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each point's nearest reference line, and the distance to it, after scaling by the candidates' ranges."""
    candidates = objectives_PM[is_candidate]
    best, worst = candidates.max(axis=0), candidates.min(axis=0)
    loss_PM = (best - objectives_PM) / np.where(best > worst, best - worst, 1.0)
    unit_DM = directions_DM / np.linalg.norm(directions_DM, axis=1, keepdims=True)
    along_PD = loss_PM @ unit_DM.T
    squared_PD = np.maximum((loss_PM**2).sum(axis=1)[:, None] - along_PD**2, 0.0)
    nearest = squared_PD.argmin(axis=1)
    return nearest, squared_PD[np.arange(len(nearest)), nearest]


def _spread(
    kept: list[int],
    border: list[int],
    count: int,
    nearest_P: NDArray[np.int64],
    distance_P: NDArray[np.float64],
    draws: np.random.Generator,
) -> list[int]:
    """`count` of the border's points: from the directions with fewest survivors first, the nearest point first."""
    num_at = {int(d): 0 for d in nearest_P[border]}
    for place in kept:
        if int(nearest_P[place]) in num_at:
            num_at[int(nearest_P[place])] += 1
    waiting: dict[int, list[int]] = {direction: [] for direction in num_at}
    for place in sorted(border, key=lambda p: (-float(distance_P[p]), p)):
        waiting[int(nearest_P[place])].append(place)
    tie = {d: float(x) for d, x in zip(num_at, draws.random(len(num_at)), strict=True)}
    chosen: list[int] = []
    while len(chosen) < count:
        direction = min((d for d in waiting if waiting[d]), key=lambda d: (num_at[d], tie[d]))
        chosen.append(waiting[direction].pop())
        num_at[direction] += 1
    return chosen


def _children(points_PV: NDArray[np.float64], draws: np.random.Generator) -> NDArray[np.float64]:
    """As many children as there are points: simulated binary crossover of random pairs, then polynomial mutation."""
    first = points_PV[draws.permutation(len(points_PV))]
    second = points_PV[draws.permutation(len(points_PV))]
    u = draws.random(points_PV.shape)
    power = 1 / (SPREAD + 1)
    stretch = np.where(u <= 0.5, (2 * u) ** power, (1 / (2 * (1 - u))) ** power)
    crossed = 0.5 * ((1 + stretch) * first + (1 - stretch) * second)
    children = np.where(draws.random((len(first), 1)) < CROSSOVER, crossed, first)
    u = draws.random(points_PV.shape)
    step = np.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)
    is_mutated = draws.random(points_PV.shape) < MUTATION
    mutated: NDArray[np.float64] = np.clip(np.where(is_mutated, children + step, children), 0.0, 1.0)
    return mutated
