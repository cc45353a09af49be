"""Is B better than A, and where? Paired bootstrap over the items that both answered.

Items are paired by their hash and drawn together, eval task by eval task (strata), so that what makes an item hard for
both cancels. Intervals are percentiles of the resampled differences (Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, section 13.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, SampleScore, TaskReport
from remelt_evals.resampling import aggregate, resampled_values

_PERCENTILES = (2.5, 97.5)


class Difference(NamedTuple):
    """B minus A, with its 95 % interval."""

    name: str
    """The ability, or `macro`."""
    metric: str
    """Empty for the macro average."""
    a: float
    b: float
    """Values on the common items, in the metric's unit; for the macro average as `objective` has them."""
    difference: float
    """b - a, negated where lower is better: above zero, B is better."""
    low: float
    high: float
    n: int
    """Items that both answered."""

    @property
    def is_better(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a paired bootstrap found."""

    abilities: tuple[Difference, ...]
    """One for each entry of the suite, in its order."""
    macro: Difference
    """The weighted mean over the entries."""


class _Stratum(NamedTuple):
    """One eval task's common items: scores of A and B (2, N), weights (N,)."""

    task: TaskReport
    scores_2N: NDArray[np.float64]
    weights_N: NDArray[np.float64]

    @property
    def sign(self) -> float:
        return 1.0 if self.task.higher_is_better else -1.0


def compare(a: EvalReport, b: EvalReport, *, num_resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare two evaluations of the same suite and role, item by item.

    Args:
        num_resamples: at least 2000 for a steady 95 % interval.
        seed: of the resampling; the same reports and seed give the same intervals.

    Raises:
        EvaluationError: one of them failed; they have no suite, role or item in common; or a metric has no item scores.
    """
    for report in (a, b):
        if not report.is_ok:
            raise EvaluationError(
                f"evaluation {report.evaluation_id[:12]} failed and cannot be compared: {report.error}"
            )
    if (a.suite_digest, a.role) != (b.suite_digest, b.role):
        raise EvaluationError(
            f"{a.checkpoint} was scored on {a.role} items of suite {a.suite} ({a.suite_digest[:12]}), "
            f"{b.checkpoint} on {b.role} items of {b.suite} ({b.suite_digest[:12]}): evaluate both on the same"
        )
    others = {(task.ability, task.task, task.metric, task.filter): task for task in b.tasks}
    strata = [_pair(task, others[task.ability, task.task, task.metric, task.filter]) for task in a.tasks]
    rng = np.random.default_rng(seed)
    weights_T = np.array([stratum.task.weight for stratum in strata])
    resampled_TR = np.stack([_resampled_difference(stratum, num_resamples, rng) for stratum in strata])
    values_T2 = np.array([_values(stratum) for stratum in strata])
    abilities = tuple(
        _difference(stratum, values, resampled)
        for stratum, values, resampled in zip(strata, values_T2, resampled_TR, strict=True)
    )
    signs_T = np.array([stratum.sign for stratum in strata])
    macro_2 = (weights_T * signs_T) @ values_T2 / weights_T.sum()
    low, high = np.percentile(weights_T @ resampled_TR / weights_T.sum(), _PERCENTILES)
    macro = Difference(
        "macro",
        "",
        float(macro_2[0]),
        float(macro_2[1]),
        float(macro_2[1] - macro_2[0]),
        float(low),
        float(high),
        sum(ability.n for ability in abilities),
    )
    return Comparison(abilities, macro)


def _pair(a: TaskReport, b: TaskReport) -> _Stratum:
    by_key = keyed_samples(b.samples)
    pairs = [(sample, by_key[key]) for key, sample in keyed_samples(a.samples).items() if key in by_key]
    if not pairs:
        raise EvaluationError(f"the two evaluations of {a.task} have no item in common")
    if a.aggregation == "other" or any(one.score is None or two.score is None for one, two in pairs):
        raise EvaluationError(f"{a.metric} of {a.task} has no score for each item, so it cannot be compared in pairs")
    scores = np.array([[sample.score for sample in pair] for pair in pairs], dtype=np.float64).T
    return _Stratum(a, scores, np.array([one.weight for one, _ in pairs], dtype=np.float64))


def keyed_samples(samples: Sequence[SampleScore]) -> dict[tuple[str, int], SampleScore]:
    """Samples by item hash; an item that an eval task holds twice is told apart by its count."""
    seen: dict[str, int] = {}
    keyed = {}
    for sample in samples:
        count = seen.get(sample.doc_hash, 0)
        seen[sample.doc_hash] = count + 1
        keyed[sample.doc_hash, count] = sample
    return keyed


def _values(stratum: _Stratum) -> NDArray[np.float64]:
    """Values of A and B on the common items; shape (2,)."""
    sums_2 = (stratum.scores_2N * stratum.weights_N).sum(axis=1)
    return aggregate(sums_2, np.full(2, stratum.weights_N.sum()), stratum.task.aggregation)


def _resampled_difference(stratum: _Stratum, num_resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Oriented differences; shape (R,)."""
    values_2R = resampled_values(stratum.scores_2N, stratum.weights_N, stratum.task.aggregation, num_resamples, rng)
    difference: NDArray[np.float64] = stratum.sign * (values_2R[1] - values_2R[0])
    return difference


def _difference(stratum: _Stratum, values: NDArray[np.float64], resampled: NDArray[np.float64]) -> Difference:
    low, high = np.percentile(resampled, _PERCENTILES)
    a, b = float(values[0]), float(values[1])
    task = stratum.task
    return Difference(
        task.ability,
        task.metric,
        a,
        b,
        stratum.sign * (b - a),
        float(low),
        float(high),
        stratum.scores_2N.shape[1],
    )
