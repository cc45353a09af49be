"""The numbers behind the operators that are no tensors: counts, probabilities, folded coefficients.

Both the torch functions and the CPU kernels take theirs from here, in float64, so that they cannot disagree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.draws import keep_threshold
from remelt.errors import OperatorError
from remelt.operators.angles import arc_cosine, sine
from remelt.operators.spec import PerModel

NO_ELECTION_SUM_FLOOR = 1e-8
"""A sum of weights smaller than this in magnitude divides nothing where all models count (as mergekit)."""

MAX_DENOMINATOR, MAX_PROPORTION = 1000, 4096
"""Weights with up to three decimals, and thirds, count as fractions; integers stay below 13 bits so that their products
with 16-bit differences are exact in float32."""

STOCK_DENOMINATOR_FLOOR = 1e-6
"""Model Stock's 1 + (N - 1) c below this is a pole, not a number."""

SLERP_DOT_THRESHOLD = 0.9995
"""SLERP interpolates linearly where |cos| exceeds this: an angle of 1.8 degrees."""

SLERP_NORM_FLOOR = 1e-8
"""SLERP leaves a tensor of this norm or less un-normalised when it takes the angle."""

NUSLERP_SIN_FLOOR = 1e-8
"""NuSLERP interpolates linearly where |sin| of the angle is at most this."""

NUSLERP_SUM_FLOOR = 1e-6
"""NuSLERP takes t = 0.5 where the weights sum to less than this in magnitude."""


def per_model(option: PerModel, num_models: int) -> tuple[float, ...]:
    """Spread an option over K models; a sequence must hold K numbers."""
    if isinstance(option, int | float):
        return (float(option),) * num_models
    if len(option) != num_models:
        raise ValueError(f"{len(option)} values of a per-model option for {num_models} models")
    return tuple(float(value) for value in option)


def float32(value: float) -> float:
    """Round to float32, the precision that coefficients are applied in."""
    return float(np.float32(value))


def kept_range(n: int, density: float, gamma: float = 0.0) -> tuple[int, int]:
    """Descending magnitude ranks [start, stop) that survive: after the floor(gamma n) on top, max(1, floor(density n)).

    Fewer are dropped on top where the density would not be reached otherwise; at density 1 nothing is dropped.
    """
    kept = min(n, max(1, math.floor(density * n)))
    top = min(math.floor(gamma * n), n - kept)
    return top, top + kept


def rank_probabilities(length: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """DELLA's keep probability for each ascending magnitude rank of a row of `length`: density -/+ epsilon, linear.

    A row of one element keeps it with probability `density`; density 1 keeps everything.
    """
    if density >= 1 or length == 1:
        return np.full(length, min(1.0, density))
    return (density - epsilon) + 2 * epsilon * np.arange(length, dtype=np.float64) / (length - 1)


def thresholds_of(probabilities: NDArray[np.float64]) -> NDArray[np.uint32]:
    """floor(p * 2^32) for probabilities below 1 (see `remelt.draws.keep_threshold`)."""
    return np.floor(probabilities * 4294967296.0).astype(np.uint32)


def draw_threshold(probability: float) -> int | None:
    """What a draw must stay below to keep its element, or None where everything is kept."""
    return None if probability >= 1 else keep_threshold(probability)


def folded(
    coefficients_K: Sequence[float], lambda_: float, normalize: bool, scales_K: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Coefficients with lambda, scales and, where `normalize` holds, the divisor taken in; rounded once, to float32."""
    divisor = math.fsum(coefficients_K) if normalize else 1.0
    if abs(divisor) < NO_ELECTION_SUM_FLOOR:
        divisor = 1.0
    scales_K = scales_K or (1.0,) * len(coefficients_K)
    return tuple(float32(w * s * lambda_ / divisor) for w, s in zip(coefficients_K, scales_K, strict=True))


def normalized(coefficients_K: Sequence[float], normalize: bool, name: str = "") -> tuple[float, ...]:
    """Coefficients divided by their sum where `normalize` holds; a sum of zero is refused."""
    divisor = math.fsum(coefficients_K) if normalize else 1.0
    if abs(divisor) < NO_ELECTION_SUM_FLOOR:
        raise OperatorError(
            f"{name or 'a tensor'}: the weights {list(coefficients_K)} sum to {divisor:g} and cannot be normalised; "
            "change a weight or set `normalize: false`"
        )
    return tuple(float32(w / divisor) for w in coefficients_K)


def proportions(coefficients_K: Sequence[float]) -> tuple[float, ...]:
    """Coefficients as the small integers that they are in proportion to, where there are such; else as they are.

    Votes are counted, and divisors summed, with these: what cancels in decimals (0.1 + 0.2 - 0.3, or task vectors of
    4, -3 and 1 steps under weights of 0.3, 0.4 and 0.0) then cancels exactly, also in float32. A hundredth of all
    elements of bfloat16 task vectors have such undecided votes, and rounding would elect their signs.
    """
    return _proportions(tuple(coefficients_K))


# A model has few distinct coefficients and many small tensors.
@functools.lru_cache(maxsize=1024)
def _proportions(coefficients_K: tuple[float, ...]) -> tuple[float, ...]:
    fractions = [Fraction(w).limit_denominator(MAX_DENOMINATOR) for w in coefficients_K]
    if any(abs(float(fraction) - w) > 1e-12 * abs(w) for fraction, w in zip(fractions, coefficients_K, strict=True)):
        return coefficients_K
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers) or 1
    if max(abs(number) for number in integers) > MAX_PROPORTION * divisor:
        return coefficients_K
    return tuple(float(number // divisor) for number in integers)


class ElectionWeights(NamedTuple):
    """What an election is computed with, as float32 values."""

    weights_K: tuple[float, ...]
    """What entries are summed with."""
    divisors_K: tuple[float, ...]
    """What divisors are summed of."""
    ballots_K: tuple[float, ...]
    """What votes are counted with."""
    unit: float
    """What a divisor of exactly zero is replaced by: 1, in the unit of the divisors."""


def election_weights(
    coefficients_K: Sequence[float], scales_K: Sequence[float], elect: str, normalize: bool
) -> ElectionWeights:
    """Numbers of an election among scale * entry, "weighted" (votes are w * scale * entry) or "unweighted".

    A common factor of weights and divisors cancels where `normalize` holds, and that of ballots always.
    """
    voting = [w * s for w, s in zip(coefficients_K, scales_K, strict=True)] if elect == "weighted" else scales_K
    shares = proportions(coefficients_K) if normalize else tuple(coefficients_K)
    return ElectionWeights(
        tuple(float32(w * s) for w, s in zip(shares, scales_K, strict=True)),
        tuple(float32(w) for w in shares),
        tuple(float32(u) for u in proportions(voting)),
        next((float32(share / w) for share, w in zip(shares, coefficients_K, strict=True) if w), 1.0),
    )


def keep_scale(density: float) -> float:
    """What makes up for dropping: 1 / keep probability."""
    return 1 / min(1.0, density)


def l1_factor(before: float, after: float, norm_floor: float) -> float:
    """What restores the L1 norm that a mask took away; 1 where either norm is zero or below the floor."""
    if before <= 0 or after <= 0 or before < norm_floor or after < norm_floor:
        return 1.0
    return before / after


def slerp_coefficients(gram: NDArray[np.float64], t: float) -> tuple[float, float]:
    """SLERP's two coefficients from the 2 x 2 Gram matrix of the raw tensors."""
    norm0, norm1 = math.sqrt(gram[0, 0]), math.sqrt(gram[1, 1])
    scale0 = norm0 if norm0 > SLERP_NORM_FLOOR else 1.0
    scale1 = norm1 if norm1 > SLERP_NORM_FLOOR else 1.0
    dot = min(1.0, max(-1.0, gram[0, 1] / scale0 / scale1))
    if abs(dot) > SLERP_DOT_THRESHOLD:
        return float32(1 - t), float32(t)
    omega = arc_cosine(dot)
    first, second = sine((1 - t) * omega) / sine(omega), sine(t * omega) / sine(omega)
    return float32(float(first)), float32(float(second))


def nuslerp_t(coefficients_K: Sequence[float]) -> float:
    """t = w1 / (w0 + w1), or one half where the sum vanishes."""
    w0, w1 = coefficients_K
    return 0.5 if abs(w0 + w1) < NUSLERP_SUM_FLOOR else w1 / (w0 + w1)


def nuslerp_coefficients(gram: NDArray[np.float64], t: float) -> NDArray[np.float32]:
    """NuSLERP's two coefficients from Gram matrices (..., 2, 2); shape (..., 2)."""
    product = np.sqrt(gram[..., 0, 0]) * np.sqrt(gram[..., 1, 1])
    cos = np.clip(np.where(product > 0, gram[..., 0, 1] / np.where(product > 0, product, 1.0), 0.0), -1.0, 1.0)
    is_parallel = 1 - cos * cos <= NUSLERP_SIN_FLOOR**2
    omega = arc_cosine(np.where(is_parallel, 0.0, cos))
    first = np.where(is_parallel, 1 - t, sine((1 - t) * omega) / sine(omega))
    second = np.where(is_parallel, t, sine(t * omega) / sine(omega))
    return np.stack([first, second], axis=-1).astype(np.float32)


def mean_cosine(gram: NDArray[np.float64], norm_floor: float = 0.0) -> NDArray[np.float64]:
    """Mean cosine over all pairs from Gram matrices (..., K, K); a zero vector's cosines count as 0."""
    num_models = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    total = np.zeros(gram.shape[:-2])
    for i in range(num_models):
        for j in range(i + 1, num_models):
            product = np.maximum(norms[..., i] * norms[..., j], norm_floor)
            cos = np.where(product > 0, gram[..., i, j] / np.where(product > 0, product, 1.0), 0.0)
            total = total + np.clip(cos, -1.0, 1.0)
    mean: NDArray[np.float64] = total / (num_models * (num_models - 1) / 2)
    return mean


def stock_ratio(
    gram: NDArray[np.float64], *, clamp: bool, norm_floor: float, name: str = "", first_row: int = 0
) -> NDArray[np.float64]:
    """Model Stock's t = N c / (1 + (N - 1) c) from Gram matrices (..., N, N); a pole is refused by name."""
    num_models = gram.shape[-1]
    cosine = mean_cosine(gram, norm_floor)
    denominator = 1 + (num_models - 1) * cosine
    if np.any(denominator < STOCK_DENOMINATOR_FLOOR):
        place = int(np.argmax(denominator < STOCK_DENOMINATOR_FLOOR))
        where = f" (row {first_row + place})" if denominator.ndim else ""
        raise OperatorError(
            f"{name or 'a tensor'}{where}: model_stock divides by 1 + (N - 1) c = {denominator.flat[place]:.3g}, c "
            f"being the mean cosine of {num_models} task vectors that cancel each other; give this tensor another "
            "merge_method by a rule"
        )
    ratio = num_models * cosine / denominator
    bounded: NDArray[np.float64] = np.clip(ratio, 0.0, 1.0) if clamp else ratio
    return bounded


def difference_norms(
    squares_K: Sequence[float], first_square: float, num_elements: int, normaliser: str
) -> tuple[float, ...]:
    """Norms of the differences from the first model, from their sums of squares: as they are, per root element, or
    relative to the first model's norm (infinite where that is zero and the difference is not)."""
    norms = [math.sqrt(square) for square in squares_K]
    if normaliser == "rms":
        return tuple(norm / math.sqrt(max(1, num_elements)) for norm in norms)
    if normaliser == "relative":
        first = math.sqrt(first_square)
        return tuple(norm / first if first else (math.inf if norm else 0.0) for norm in norms)
    return tuple(norms)
