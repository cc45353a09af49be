"""What a search maximises: one number for each trial, from its values on the suite's entries.

Entries have scales of their own (accuracy, bits per byte, perplexity), so that a plain mean weighs them by accident.
Three objectives do without a common scale: standardised by the starts, by rank, or by the worst entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from remelt.errors import EvaluationError

Values: TypeAlias = Mapping[int, Sequence[float]]
"""Trial number -> its values on the suite's entries, oriented so that higher is better."""

_Score: TypeAlias = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(values (N, T), reference values (R, T), weights (T,)) -> scores (N,)."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A row of `OBJECTIVES`."""

    name: str
    meaning: str
    score: _Score
    is_relative: bool
    """Whether a trial's score depends on other trials, so that it moves as they come in."""
    is_several: bool = False
    """Whether searchers are to see the entries themselves; the score then only ranks for display and publication."""

    def scores(
        self, values: Values, weights_T: Sequence[float], reference: Sequence[Sequence[float]] = ()
    ) -> dict[int, float]:
        """Score trials, all of them together.

        Args:
            values: of the trials that have any; all of the same length T.
            weights_T: of the entries, positive.
            reference: values that set the scale: those of the uniform merge and the single parents; where there are
                none, all trials are the reference.

        Returns:
            Trial number -> score, higher is better, in the order of `values`.

        Raises:
            EvaluationError: a trial has another number of entries.
        """
        if not values:
            return {}
        if any(len(entries) != len(weights_T) for entries in values.values()):
            raise EvaluationError(f"objective {self.name}: a trial has not the {len(weights_T)} entries of the suite")
        matrix_NT = np.array(list(values.values()), np.float64)
        scale_RT = np.array(reference, np.float64) if reference else matrix_NT
        scores = self.score(matrix_NT, scale_RT, np.array(weights_T, np.float64))
        return dict(zip(values, scores.tolist(), strict=True))


def _macro_mean(
    values: NDArray[np.float64], reference: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    # Summed entry by entry, so that a trial's score is the same bits alone or among others.
    total = np.zeros(len(values))
    for place, weight in enumerate(weights):
        total += weight * values[:, place]
    return total / float(sum(weights.tolist()))


def _standardise(values: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances from the reference's mean in units of its standard deviation; entries that do not vary keep theirs."""
    mean = reference.mean(axis=0)
    spread = reference.std(axis=0, ddof=1) if len(reference) > 1 else np.zeros(reference.shape[1])
    unit = np.where(spread > 0, spread, 1.0)
    standardised: NDArray[np.float64] = (values - mean) / unit
    return standardised


def _standardised_mean(
    values: NDArray[np.float64], reference: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    return _macro_mean(_standardise(values, reference), reference, weights)


def _worst_task(
    values: NDArray[np.float64], reference: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    worst: NDArray[np.float64] = _standardise(values, reference).min(axis=1)
    return worst


def average_ranks(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0 (worst), equal values sharing the mean of theirs; shape as given."""
    order = np.sort(column)
    lowest = np.searchsorted(order, column, "left")
    ranks: NDArray[np.float64] = (lowest + np.searchsorted(order, column, "right") - 1) / 2
    return ranks


def _mean_rank(
    values: NDArray[np.float64], reference: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    ranks = np.stack([average_ranks(column) for column in values.T], axis=1)
    return _macro_mean(ranks / max(1, len(values) - 1), reference, weights)


OBJECTIVES: Mapping[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("macro mean", "weighted mean of the entries' values", _macro_mean, False),
        Objective(
            "standardised mean",
            "weighted mean of the values in standard deviations of the uniform merge and the single parents",
            _standardised_mean,
            True,
        ),
        Objective(
            "mean rank",
            "weighted mean of the rank among all trials, 0 to 1 (Borda; Colombo et al., arXiv 2202.03799)",
            _mean_rank,
            True,
        ),
        Objective("worst task", "the lowest of the standardised values", _worst_task, True),
        Objective(
            "several", "every entry an objective of its own; the macro mean picks what is published", _macro_mean,
            False, True,
        ),
    )
}  # fmt: skip
