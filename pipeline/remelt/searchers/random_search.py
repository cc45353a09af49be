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
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, number))))
        return {variable.name: float(generator.uniform(variable.low, variable.high)) for variable in self.space.box}
