"""The tree-structured Parzen estimator, through optuna: cheap asks, some 100 to 1,000 trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remelt.searchers.options import whole_number
from remelt.searchers.optuna_study import observe, quiet_optuna, sample
from remelt.searchers.random_search import distinct_point, generator, short_seed
from remelt.searchers.spec import SearchSpace, Trial


class ParzenEstimator:
    """Multivariate TPE: densities of the good and of the other trials, and the draw with the best ratio of the two.

    Running trials count among the others (a constant liar), which keeps evaluators that ask at once apart. Stopped
    trials count as worse than every complete one. Failed ones are not told. The uniform merge and the single parents
    are, where the variables can express them.

    Args:
        space: The search space.
        seed: The study's seed.
        startup: Complete or stopped trials before the first estimate, 2 to 10,000; until then draws are uniform.
        candidates: Draws from the density of the good ones, of which the best ratio is asked for; 1 to 10,000.

    Raises:
        RecipeError: An option is out of its interval.
    """

    def __init__(self, space: SearchSpace, seed: int, *, startup: int = 10, candidates: int = 24) -> None:
        self.space = space
        self.seed = seed
        self.startup = whole_number("tpe", "startup", startup, 2, 10_000)
        self.candidates = whole_number("tpe", "candidates", candidates, 1, 10_000)

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """The most promising draw; see `remelt.searchers.spec.Searcher`."""
        from optuna.samplers import TPESampler

        with quiet_optuna():
            sampler = TPESampler(
                seed=short_seed(self.seed, number), n_startup_trials=self.startup, n_ei_candidates=self.candidates
            )
        point = sample(sampler, self.space, observe(self.space, seen))
        return distinct_point(self.space, point, seen, generator(self.seed, number))
