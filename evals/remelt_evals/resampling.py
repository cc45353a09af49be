"""Values and bootstrap resamples of item scores.

N items, R resamples. The items of one eval task have scores s_N and weights v_N (bytes, words, or ones).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remelt_evals.eval_report import Aggregation

# Draws held at once; 4M int64 are 32 MB.
_CHUNK_DRAWS = 1 << 22


def aggregate(sums: NDArray[np.float64], weights: NDArray[np.float64], aggregation: Aggregation) -> NDArray[np.float64]:
    """Values from sums of v s and sums of v."""
    means = sums / weights
    return np.exp(means) if aggregation == "exp_weighted_mean" else means


def resampled_values(
    scores_KN: NDArray[np.float64],
    weights_N: NDArray[np.float64],
    aggregation: Aggregation,
    num_resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The values of K systems on R resamples of the same N items, drawn with replacement; shape (K, R).

    One draw serves all K, which is what makes differences between them paired.
    """
    num_items = scores_KN.shape[1]
    weighted_KN = scores_KN * weights_N
    values = []
    step = max(1, _CHUNK_DRAWS // num_items)
    for start in range(0, num_resamples, step):
        index = rng.integers(num_items, size=(min(step, num_resamples - start), num_items))
        weights_R = weights_N[index].sum(axis=1)
        sums_KR = np.stack([row[index].sum(axis=1) for row in weighted_KN])
        values.append(aggregate(sums_KR, weights_R, aggregation))
    return np.concatenate(values, axis=1)


def standard_error(
    scores_N: NDArray[np.float64], weights_N: NDArray[np.float64], aggregation: Aggregation, num_resamples: int = 1000
) -> float | None:
    """The standard error of a value: s / sqrt(N) for a mean, else the deviation over seeded resamples.

    None for fewer than two items.
    """
    if len(scores_N) < 2:
        return None
    if aggregation == "mean":
        return float(scores_N.std(ddof=1) / np.sqrt(len(scores_N)))
    rng = np.random.default_rng(0)
    values = resampled_values(scores_N[None], weights_N, aggregation, num_resamples, rng)
    return float(values[0].std(ddof=1))
