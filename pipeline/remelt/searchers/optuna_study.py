"""An optuna study for one ask: rebuilt in memory from the trials seen, and thrown away.

Nothing of optuna's is kept between asks or written down: its storages pickle samplers or keep running trials of dead
drivers, and its samplers carry a generator from ask to ask. Our journal is the study; here a sampler is seeded for one
ask. optuna costs 0.4 s to import, so it is imported inside functions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from remelt.searchers.spec import SearchSpace, Trial, TrialState

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study


class Observation(NamedTuple):
    """A trial as a sampler may know it."""

    point: Mapping[str, float]
    """In the box."""
    state: TrialState
    objectives: tuple[float, ...] = ()
    """To be maximised; empty unless COMPLETE."""


def observe(space: SearchSpace, seen: Sequence[Trial]) -> list[Observation]:
    """What can be told of the trials, with their scores: searchers' own, and starts by the nearest point of the box.

    Failed trials are left out: a failure says nothing of its neighbours that a score would.
    """
    observations = []
    for trial in seen:
        point = trial.point or space.nearest_point(trial.values)
        if point and trial.state is not TrialState.FAILED:
            observations.append(Observation(point, trial.state, () if trial.score is None else (trial.score,)))
    return observations


def sample(
    sampler: BaseSampler,
    space: SearchSpace,
    observations: Iterable[Observation],
    num_objectives: int = 1,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """What a fresh sampler asks for after these observations: a point of the box.

    Args:
        sampler: Seeded for this ask alone.
        space: The search space.
        observations: In an order that is a function of the trials seen.
        num_objectives: Of each complete observation.
        attributes: System attributes of every observation.
    """
    with quiet_optuna():
        study = build_study(sampler, space, observations, num_objectives, attributes)
        asked = study.ask(_distributions(space)).params
    return {variable.name: min(max(float(asked[variable.name]), variable.low), variable.high) for variable in space.box}


def build_study(
    sampler: BaseSampler,
    space: SearchSpace,
    observations: Iterable[Observation],
    num_objectives: int = 1,
    attributes: Mapping[str, Any] | None = None,
) -> Study:
    """A study in memory with these trials; stopped ones are pruned trials, running ones stay running.

    Args:
        attributes: System attributes of every trial.
    """
    import optuna

    states = {
        TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
        TrialState.STOPPED: optuna.trial.TrialState.PRUNED,
        TrialState.RUNNING: optuna.trial.TrialState.RUNNING,
    }
    distributions = _distributions(space)
    study = optuna.create_study(directions=["maximize"] * num_objectives, sampler=sampler)
    for one in observations:
        study.add_trial(
            optuna.trial.create_trial(
                state=states[one.state],
                values=list(one.objectives) or None,
                params={
                    variable.name: min(max(one.point[variable.name], variable.low), variable.high)
                    for variable in space.box
                },
                distributions=distributions,
                system_attrs=dict(attributes or {}),
            )
        )
    return study


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without optuna's lines on stderr for every new study, and its warnings that NSGA-III is experimental."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distributions(space: SearchSpace) -> dict[str, Any]:
    shared = _shared_distribution()
    return {variable.name: shared(variable.low, variable.high, space.is_log(variable.name)) for variable in space.box}


@functools.cache
def _shared_distribution() -> Any:
    """optuna's interval of floats, one object for all trials: copying it for each was half of what a rebuild took."""
    from optuna.distributions import FloatDistribution

    return type("SharedFloatDistribution", (FloatDistribution,), {"__deepcopy__": lambda self, memo: self})
