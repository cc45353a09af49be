"""CMA-ES over merging coefficients, as the recycling paper searches them.

Khalifa et al., "If You Can't Use Them, Recycle Them: Optimizing Merging at Scale" (arXiv 2412.04144): coefficients
that sum to one, found by CMA-ES on the macro average of the eval tasks. Population, start and step size are not in the
paper's text; ours are Hansen's default population 4 + floor(3 ln n) (arXiv 1604.00772, eq. 48), a start at the uniform
merge, and a step of 1/6 of each variable's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remelt.errors import RecipeError
from remelt.searchers.random_search import short_seed
from remelt.searchers.replay import Generations, Replay
from remelt.searchers.spec import SearchSpace, Trial

if TYPE_CHECKING:
    from cmaes import CMA

DEFAULT_SIGMA = 1 / 6

SMALLEST_POPULATION = 4
"""Below it one parent alone survives a generation, and the covariance learns nothing (its learning rate is zero)."""


@dataclass(slots=True)
class _Told:
    """What is known after some trials."""

    optimiser: CMA
    generations: Generations


class CmaEs:
    """CMA-ES, rebuilt by replaying the complete generations of the trials seen.

    Which trials make up a generation is said in `remelt.searchers.replay.Generations`: late ones are not told, since
    they would shift its ranking. With many evaluators choose a population of at least their number.

    Args:
        space: The search space; its box is scaled to the unit cube.
        seed: The study's seed.
        sigma: First step size, in units of each variable's range; above 0.
        population: Trials of one generation, at least 4; by default 4 + floor(3 ln n) for n variables.

    Raises:
        RecipeError: An option is out of its interval.
    """

    def __init__(
        self, space: SearchSpace, seed: int, *, sigma: float = DEFAULT_SIGMA, population: int | None = None
    ) -> None:
        if not 0 < sigma <= 1:
            raise RecipeError(f"searcher cmaes: sigma is {sigma:g}; it must lie in (0, 1], a part of each range")
        if population is not None and (population < SMALLEST_POPULATION or population != int(population)):
            raise RecipeError(
                f"searcher cmaes: population is {population}; it must be a whole number from {SMALLEST_POPULATION}"
            )
        self.space = space
        self.seed = seed
        self.sigma = sigma
        self.population = int(population or 4 + math.floor(3 * math.log(len(space.variables))))
        self._start = space.unit_of({variable.name: variable.init for variable in space.box})
        self._told = Replay(lambda: _Told(self._begin(), Generations(self.population)), self._tell)

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """A draw of the open generation; see `remelt.searchers.spec.Searcher`."""
        optimiser = self._replay(seen)
        # The generator is seeded by the number alone, so no draw depends on how many were made before it.
        optimiser.reseed_rng(short_seed(self.seed, number))
        return self.space.point_at(optimiser.ask())

    def _replay(self, seen: Sequence[Trial]) -> CMA:
        """The optimiser after every generation that `seen` completes."""
        return self._told.after(seen).optimiser

    def _tell(self, state: _Told, trial: Trial) -> None:
        members = state.generations.tell(trial)
        if members:
            state.optimiser.tell(
                [(self.space.unit_of(one.point), -one.score) for one in members if one.score is not None]
            )
            if state.optimiser.should_stop():  # converged, or a plateau: begin again rather than repeat one point
                state.optimiser = self._begin()

    def _begin(self) -> CMA:
        # Imported here because it costs a second (it brings scipy where that is installed).
        from cmaes import CMA

        bounds = np.tile([0.0, 1.0], (len(self._start), 1))
        return CMA(mean=self._start.copy(), sigma=self.sigma, bounds=bounds, population_size=self.population, seed=0)
