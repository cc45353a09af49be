"""Bayesian optimisation with a Gaussian process, through optuna: for up to some 20 variables and some 500 trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from remelt.searchers.options import whole_number
from remelt.searchers.optuna_study import Observation, observe, quiet_optuna, sample
from remelt.searchers.random_search import distinct_point, generator, short_seed
from remelt.searchers.spec import SearchSpace, Trial, TrialState


class GaussianProcess:
    """Matérn 5/2 with a length scale for each variable, and the logarithm of expected improvement (arXiv 2310.20708).

    Running trials are pending: improvement is expected over what they may bring, so evaluators that ask at once are
    sent to different places. The uniform merge and the single parents are told as well, where the variables can
    express them. Stopped and failed trials are not.

    An ask costs the cube of the observations, so above `observations` complete trials the better half of that number
    and the latest half are told. Asks of one study are the same on one machine; the model is fitted by an iterative
    optimiser, so another kind of CPU may differ in late digits. The journal keeps what was asked.

    Args:
        space: The search space.
        seed: The study's seed.
        startup: Complete trials before the first fit, 2 to 10,000; until then draws are uniform.
        observations: The most trials that one fit takes, 10 to 5,000.

    Raises:
        RecipeError: An option is out of its interval.
    """

    def __init__(self, space: SearchSpace, seed: int, *, startup: int = 10, observations: int = 300) -> None:
        self.space = space
        self.seed = seed
        self.startup = whole_number("gp", "startup", startup, 2, 10_000)
        self.observations = whole_number("gp", "observations", observations, 10, 5_000)

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """Where most improvement is expected; see `remelt.searchers.spec.Searcher`."""
        from optuna.samplers import GPSampler

        with quiet_optuna():
            sampler = GPSampler(seed=short_seed(self.seed, number), n_startup_trials=self.startup)
        told = [one for one in observe(self.space, seen) if one.state is not TrialState.STOPPED]
        with _one_torch_thread():
            point = sample(sampler, self.space, self._thinned(told))
        return distinct_point(self.space, point, seen, generator(self.seed, number))

    def _thinned(self, told: Sequence[Observation]) -> list[Observation]:
        """The observations, of too many complete ones the latest half and the best of those before."""
        complete = [one for one in told if one.state is TrialState.COMPLETE]
        running = [one for one in told if one.state is TrialState.RUNNING]
        if len(complete) > self.observations:
            num_latest = self.observations // 2
            earlier = complete[:-num_latest]
            ranked = sorted(range(len(earlier)), key=lambda place: (-earlier[place].objectives[0], place))
            kept = sorted(ranked[: self.observations - num_latest])
            complete = [earlier[place] for place in kept] + complete[-num_latest:]
        return complete + running


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Fits are thousands of tiny operations: on a busy machine threads make them five times slower, and sums differ."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
