"""CMA-ES over merging coefficients, as the recycling paper searches them.

Khalifa et al., "If You Can't Use Them, Recycle Them: Optimizing Merging at Scale" (arXiv 2412.04144): coefficients
that sum to one, found by CMA-ES on the macro average of the eval tasks. Population, start and step size are not in the
paper's text; ours are Hansen's default population 4 + floor(3 ln n) (arXiv 1604.00772, eq. 48), a start at the uniform
merge, and a step of 1/6 of each variable's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from remelt.errors import RecipeError
from remelt.searchers.spec import SearchSpace, Trial, TrialState

if TYPE_CHECKING:
    from cmaes import CMA

DEFAULT_SIGMA = 1 / 6

SMALLEST_POPULATION = 4
"""Below it one parent alone survives a generation, and the covariance learns nothing (its learning rate is zero)."""


class CmaEs:
    """CMA-ES, rebuilt for every ask by replaying its complete generations.

    A trial belongs to the generation that was open when it was asked for. A generation closes with its first
    `population` complete trials; until then, every ask is one more draw of it. Failed trials are replaced by such
    draws, and trials that finish after their generation closed are not told (they would shift its ranking).
    With many evaluators choose a population of at least their number.

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
        self._lows = np.array([variable.low for variable in space.box])
        self._ranges = np.array([variable.high - variable.low for variable in space.box])
        self._start = (np.array([variable.init for variable in space.box]) - self._lows) / self._ranges

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """A draw of the open generation; see `remelt.searchers.spec.Searcher`."""
        optimiser = self._replay(seen)
        # The generator is seeded by the number alone, so no draw depends on how many were made before it.
        optimiser.reseed_rng(int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0]))
        unit = optimiser.ask()
        return {
            variable.name: min(
                max(variable.low + float(u) * (variable.high - variable.low), variable.low), variable.high
            )
            for variable, u in zip(self.space.box, unit, strict=True)
        }

    def _replay(self, seen: Sequence[Trial]) -> CMA:
        """The optimiser after every generation that `seen` completes."""
        optimiser, generation, members = self._begin(), 0, list[tuple[NDArray[np.float64], float]]()
        open_after = [0]  # the generation that was open after k trials had finished
        for trial in (trial for trial in seen if trial.state is not TrialState.RUNNING):
            if trial.point and trial.score is not None and open_after[trial.asked_after] == generation:
                members.append((self._unit(trial.point), -trial.score))
            if len(members) == self.population:
                optimiser.tell(members)
                generation, members = generation + 1, []
                if optimiser.should_stop():  # converged, or a plateau: begin again rather than repeat one point
                    optimiser = self._begin()
            open_after.append(generation)
        return optimiser

    def _begin(self) -> CMA:
        # Imported here because it costs a second (it brings scipy where that is installed).
        from cmaes import CMA

        bounds = np.tile([0.0, 1.0], (len(self._start), 1))
        return CMA(mean=self._start.copy(), sigma=self.sigma, bounds=bounds, population_size=self.population, seed=0)

    def _unit(self, point: Mapping[str, float]) -> NDArray[np.float64]:
        x = np.array([point[variable.name] for variable in self.space.box])
        unit: NDArray[np.float64] = (x - self._lows) / self._ranges
        return unit
