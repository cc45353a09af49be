"""NSGA-III over several objectives, through optuna: a population that spreads over the Pareto front.

Deb and Jain, "An Evolutionary Many-Objective Optimization Algorithm Using Reference-Point-Based Nondominated Sorting
Approach" (IEEE TEVC 18(4), 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from remelt.searchers.options import whole_number
from remelt.searchers.optuna_study import Observation, build_study, quiet_optuna, sample
from remelt.searchers.random_search import distinct_point, generator, short_seed, uniform_point
from remelt.searchers.replay import Generations, Replay
from remelt.searchers.spec import SearchSpace, Trial, TrialState, objectives_of

SPREAD = 20.0
"""Distribution index of crossover and mutation: children stay near their parents."""

MUTATION = 0.3
"""Probability that a variable is mutated."""


@dataclass(slots=True)
class _Lineage:
    """What is known after some trials."""

    generations: Generations
    starts: list[Trial] = field(default_factory=list)
    parents: list[Observation] = field(default_factory=list)
    """Of the open generation; none in the first."""


class Nsga3:
    """Generations of draws by crossover and mutation of the survivors of all before.

    The first generation is uniform; the uniform merge and the single parents compete with it, where the variables can
    express them. Which trials make up a generation is said in `remelt.searchers.replay.Generations`. Survivors of a
    generation are chosen once, by a sampler seeded by (study seed, generation); each ask then draws from them.

    Args:
        space: The search space.
        seed: The study's seed.
        population: Trials of one generation, and survivors, 4 to 1,000.

    Raises:
        RecipeError: An option is out of its interval.
    """

    needs_objectives: ClassVar[bool] = True

    def __init__(self, space: SearchSpace, seed: int, *, population: int = 20) -> None:
        self.space = space
        self.seed = seed
        self.population = whole_number("nsga3", "population", population, 4, 1_000)
        self._lineage = Replay(lambda: _Lineage(Generations(self.population)), self._tell)

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """A child of the survivors; see `remelt.searchers.spec.Searcher`."""
        parents = self._lineage.after(seen).parents
        draws = generator(self.seed, number)
        if len(parents) < 2:
            return distinct_point(self.space, uniform_point(self.space, draws), seen, draws)
        sampler = self._sampler(short_seed(self.seed, number), len(parents), len(parents[0].objectives))
        point = sample(sampler, self.space, parents, len(parents[0].objectives), self._generation(sampler, 0))
        return distinct_point(self.space, point, seen, draws)

    def _tell(self, lineage: _Lineage, trial: Trial) -> None:
        if not trial.point:
            lineage.starts.append(trial)
        members = lineage.generations.tell(trial)
        if members:
            candidates = lineage.parents + _observations(self.space, lineage.starts + members)
            lineage.starts = []
            lineage.parents = self._survivors(candidates, lineage.generations.number)

    def _survivors(self, candidates: Sequence[Observation], generation: int) -> list[Observation]:
        num_objectives = max(len(one.objectives) for one in candidates)
        candidates = [one for one in candidates if len(one.objectives) == num_objectives]
        if len(candidates) <= self.population:
            return list(candidates)
        with quiet_optuna():
            sampler = self._sampler(short_seed(self.seed, generation, 1), self.population, num_objectives)
            study = build_study(sampler, self.space, candidates, num_objectives, self._generation(sampler, 0))
            return [candidates[survivor.number] for survivor in sampler.select_parent(study, 1)]

    def _sampler(self, seed: int, population: int, num_objectives: int) -> Any:
        from optuna.samplers import NSGAIIISampler
        from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover

        with quiet_optuna():
            return NSGAIIISampler(
                population_size=population,
                # Whole children, not variables of parents and children mixed as optuna would: measured over its
                # crossovers on fronts along and across the axes, this found most in 100 and 200 trials.
                crossover=SBXCrossover(eta=SPREAD, use_child_gene_prob=1.0, uniform_crossover_prob=0.0),
                mutation=PolynomialMutation(eta=SPREAD),
                mutation_prob=MUTATION,
                seed=seed,
                dividing_parameter=_divisions(num_objectives, population),
            )

    @staticmethod
    def _generation(sampler: Any, generation: int) -> dict[str, int]:
        # optuna counts generations by this attribute of its trials; it has no public name for it.
        return {sampler._get_generation_key(): generation}


def _observations(space: SearchSpace, trials: Sequence[Trial]) -> list[Observation]:
    observations = []
    for trial in trials:
        point, objectives = trial.point or space.nearest_point(trial.values), objectives_of(trial)
        if point and objectives:
            observations.append(Observation(point, TrialState.COMPLETE, objectives))
    return observations


def _divisions(num_objectives: int, population: int) -> int:
    """Divisions of each axis, the most that make no more reference points than survivors (the paper's choice)."""
    if num_objectives == 1:
        return 1
    divisions = 1
    while math.comb(divisions + num_objectives, num_objectives - 1) <= population:
        divisions += 1
    return divisions
