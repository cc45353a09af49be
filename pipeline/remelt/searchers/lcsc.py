"""Evolution of linear combinations of saved checkpoints (LCSC), for the checkpoints of one training run.

Liu et al., "Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better" (arXiv 2404.02241):
coefficients sum to one, may be negative, and are found by an evolutionary search with crossover and mutation. The code
of that search was not released, so population, crossover and mutation here are ours and are said below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from remelt.searchers.options import choice, number_above, number_between, whole_number
from remelt.searchers.random_search import generator, uniform_point
from remelt.searchers.replay import num_starts
from remelt.searchers.spec import SearchSpace, Trial, project

STARTS = ("averages", "random")

DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Of the exponential averages that the first population holds."""

FINEST = 0.01
"""The smallest mutation, as a part of the largest: one that is too coarse everywhere never settles."""

MOST_CHILDREN = 100
"""Draws of one ask until a child is none that was tried before."""


class Lcsc:
    """A steady population: every ask is a child of two of the best trials so far, so no evaluator ever waits.

    The first `population` asks are exponential moving averages over each simplex group, whose names are taken in
    the order of training, oldest first, with decays of 0.5, 0.7, 0.8, 0.9 and 0.95 between one checkpoint and the next
    (`start: averages`), then uniform draws. After them the parents of each ask are two tournament winners
    (each the better of two) among the `population` best complete trials, the uniform merge and the single parents
    included. The child lies on the line through both, up to half their distance beyond either (with probability
    `crossover`, else at the first), and every coefficient is moved by a normal step. The step's deviation is drawn for
    each child between `mutation` times each range and a hundredth of that, evenly in its logarithm.

    Groups are then projected onto a sum of one inside their intervals, so a coefficient is negative where its interval
    says so, and the free directions are one fewer than the coefficients.

    Args:
        space: The search space.
        seed: The study's seed.
        population: Best trials that may become parents, and draws before the first child; 4 to 1,000.
        crossover: Probability of it, in [0, 1].
        mutation: Largest deviation of a step, as a part of each range, in (0, 1].
        start: `averages`, or `random` for draws alone, where the checkpoints are of no one run.

    Raises:
        RecipeError: An option is out of its interval.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        *,
        population: int = 16,
        crossover: float = 0.8,
        mutation: float = 0.1,
        start: str = "averages",
    ) -> None:
        self.space = space
        self.seed = seed
        self.population = whole_number("lcsc", "population", population, 4, 1_000)
        self.crossover = number_between("lcsc", "crossover", crossover, 0, 1)
        self.mutation = number_above("lcsc", "mutation", mutation, 0, 1)
        self.start = choice("lcsc", "start", start, STARTS)
        self._intervals = {variable.name: (variable.low, variable.high) for variable in space.variables}
        self._inits = space.values({variable.name: variable.init for variable in space.box})

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """A child of two good trials; see `remelt.searchers.spec.Searcher`."""
        draws = generator(self.seed, number)
        index = number - num_starts(seen)
        parents = self._parents(seen)
        if index < self.population or len(parents) < 2:
            return self._first(index, draws)
        # Projection puts many children on the same corner of a simplex; each is tried once.
        tried = {self._key(trial.values or self.space.values(trial.point)) for trial in seen if self._is_known(trial)}
        for _ in range(MOST_CHILDREN):
            child = self._child(parents, draws)
            if self._key(child) not in tried:
                return child
        return uniform_point(self.space, draws)

    def _key(self, values: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(round(values[name], 12) for name in self._intervals)

    def _is_known(self, trial: Trial) -> bool:
        """Whether the variables say what it evaluated."""
        return bool(trial.point) or all(name in trial.values for name in self._intervals)

    def _parents(self, seen: Sequence[Trial]) -> list[Mapping[str, float]]:
        """Values of the best trials, best first; of equals the earlier to finish."""
        scored = [
            (trial.score, trial.values or self.space.values(trial.point))
            for trial in seen
            if trial.score is not None and self._is_known(trial)
        ]
        return [values for _, values in sorted(scored, key=lambda one: -one[0])[: self.population]]

    def _first(self, index: int, draws: np.random.Generator) -> dict[str, float]:
        """One of the first population: an average of the run, or a draw."""
        if self.start == "random" or not self.space.simplex or index >= len(DECAYS):
            return uniform_point(self.space, draws)
        averages = dict(self._inits)
        for group in self.space.simplex:
            averages.update(zip(group, average_coefficients(len(group), DECAYS[index]), strict=True))
        return self._inside(averages)

    def _child(self, parents: Sequence[Mapping[str, float]], draws: np.random.Generator) -> dict[str, float]:
        # The better of two draws is the smaller place: parents are ranked.
        first, second = (parents[int(draws.integers(len(parents), size=2).min())] for _ in range(2))
        along = float(draws.uniform(-0.5, 1.5)) if draws.random() < self.crossover else 0.0
        deviation = self.mutation * FINEST ** float(draws.random())
        steps = draws.normal(0.0, deviation, size=len(self.space.variables))
        return self._inside(
            {
                name: first[name] + along * (second[name] - first[name]) + float(step) * (high - low)
                for (name, (low, high)), step in zip(self._intervals.items(), steps, strict=True)
            }
        )

    def _inside(self, values: Mapping[str, float]) -> dict[str, float]:
        """The nearest values in all intervals whose groups sum to one."""
        inside = {name: min(max(values[name], low), high) for name, (low, high) in self._intervals.items()}
        for group in self.space.simplex:
            inside.update(project(group, values, self._intervals))
        return inside


def average_coefficients(count: int, decay: float) -> tuple[float, ...]:
    """Coefficients of the exponential moving average over checkpoints, oldest first, which sum to 1.

    The average after each checkpoint is `decay` times the one before plus (1 - decay) times the checkpoint, beginning
    with the oldest.
    """
    oldest = decay ** (count - 1)
    return (oldest, *((1 - decay) * decay ** (count - 1 - place) for place in range(1, count)))
