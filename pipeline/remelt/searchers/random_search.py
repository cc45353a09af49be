"""Random search: independent uniform draws of the box. The baseline that every other searcher has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from remelt.searchers.spec import SearchSpace, Trial


class RandomSearch:
    """Uniform draws of the box, each from a generator of its own, seeded by (study seed, trial number).

    Of a simplex group the shares are uniform in their positive box before they are divided by their sum, so that
    draws gather around the uniform merge rather than fill the simplex evenly.

    Args:
        space: The search space.
        seed: The study's seed.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self.seed = seed

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """One draw; the trials seen change nothing. See `remelt.searchers.spec.Searcher`."""
        return uniform_point(self.space, generator(self.seed, number))


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for each key, such as (study seed, trial number)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def short_seed(*key: int) -> int:
    """32 bits for libraries that take no longer seed, from the same keys."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def uniform_point(space: SearchSpace, draws: np.random.Generator) -> dict[str, float]:
    """A uniform draw of the box."""
    return space.point_at(draws.random(len(space.box)))


def distinct_point(
    space: SearchSpace, point: Mapping[str, float], seen: Sequence[Trial], draws: np.random.Generator
) -> dict[str, float]:
    """The point itself, or one beside it where that very point was asked for before.

    A model that has converged, or that likes a corner of the box, names one point again and again; evaluating it again
    on the same items says nothing new. The neighbour lies within some 2 % of each range, on the box's side.
    """
    asked = {tuple(trial.point[variable.name] for variable in space.box) for trial in seen if trial.point}
    moved = {variable.name: float(point[variable.name]) for variable in space.box}
    while tuple(moved.values()) in asked:
        moved = {
            variable.name: _beside(moved[variable.name], variable.low, variable.high, draws) for variable in space.box
        }
    return moved


def _beside(value: float, low: float, high: float, draws: np.random.Generator) -> float:
    step = abs(float(draws.normal(0.0, 0.02))) * (high - low)
    near_high = value + step > high
    near_low = value - step < low
    away = -1.0 if near_high else 1.0 if near_low else float(draws.choice((-1.0, 1.0)))
    return min(max(value + away * step, low), high)
