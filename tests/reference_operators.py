"""Every merge operator again, slow and obvious, in float64 NumPy: what the fast ones are tested against.

Nothing here is shared with `remelt`. Every function has the shape of an operator,
`(base, tensors_K, coefficients_K, *, options) -> float64 array`; randomness comes in as `bits_K`, one uint32 for each
element of each model, so that a test can inject the draws that the merge under test has used.

Shape legend: K checkpoints, N elements of one tensor, R rows (all leading dimensions), C the last dimension.
A per-model option is a number for all models or a sequence of K.

Conventions: floor(density * n) is `int(density * n)` in Python floats; among equal magnitudes the lowest flat index is
the larger one when the largest are kept, and ranks first when ranks ascend (a stable sort in both cases).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
Bits: TypeAlias = Sequence[NDArray[np.uint32]]
PerModel: TypeAlias = float | Sequence[float]
Rescale: TypeAlias = Literal["keep", "l1", "none"]
Elect: TypeAlias = Literal["weighted", "unweighted"]
Granularity: TypeAlias = Literal["tensor", "row"]

SLERP_DOT_THRESHOLD = 0.9995  # |cos| above this interpolates linearly (an angle of 1.8 degrees)
SLERP_NORM_FLOOR = 1e-8  # a tensor of this norm or less is not normalised before the dot product
NUSLERP_SIN_FLOOR = 1e-8  # |sin| of the angle below this interpolates linearly
NUSLERP_SUM_FLOOR = 1e-6  # weights whose sum is smaller than this in magnitude give t = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def as_float64(values: ArrayLike) -> Array:
    """Widen to float64, which is exact for every dtype that a checkpoint stores."""
    return np.asarray(values, dtype=np.float64)


def per_model(option: PerModel, num_models: int) -> list[float]:
    """Spread a per-model option over the models."""
    values = [float(option)] * num_models if isinstance(option, (int, float)) else [float(value) for value in option]
    assert len(values) == num_models
    return values


def as_rows(values: Array) -> Array:
    """View as (R, C): the last dimension is the row; a tensor with fewer than two dimensions is one row."""
    return values.reshape(1, -1) if values.ndim < 2 else values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def keep_mask_middle(delta_N: Array, density: float, gamma: float) -> NDArray[np.bool_]:
    """Mark the max(1, floor(density * n)) largest magnitudes after the floor(gamma * n) largest have been dropped.

    Fewer of the largest are dropped where the tensor has not enough elements to keep its density. At density 1 or more
    nothing is dropped at all, whatever gamma. Exactly so many are marked; of equal ones the lowest flat indexes.
    """
    flat_N = np.abs(delta_N).reshape(-1)
    n = flat_N.size
    if density >= 1:
        return np.ones(delta_N.shape, np.bool_)
    num_keep, num_top = min(n, max(1, int(density * n))), int(gamma * n)
    num_bottom = n - num_keep - num_top
    if num_bottom < 0:
        num_top += num_bottom
    mask_N = np.zeros(n, np.bool_)
    mask_N[np.argsort(-flat_N, kind="stable")[num_top : num_top + num_keep]] = True
    return mask_N.reshape(delta_N.shape)


def keep_probabilities_della(delta_N: Array, density: float, epsilon: float) -> Array:
    """Keep probability of each element from the rank of its magnitude in its row.

    r = 0..n-1 ascending; p = density - epsilon + 2 epsilon r / (n - 1); a row of one element has p = density.
    """
    rows_RC = as_rows(np.abs(delta_N))
    n = rows_RC.shape[1]
    if n == 1:
        return np.full(delta_N.shape, float(density))
    order_RC = np.argsort(rows_RC, axis=1, kind="stable")
    ranks_RC = np.empty(rows_RC.shape, np.int64)
    np.put_along_axis(ranks_RC, order_RC, np.arange(n)[None, :], axis=1)
    p_RC = (density - epsilon) + 2 * epsilon * ranks_RC / (n - 1)
    return as_float64(p_RC.reshape(delta_N.shape))


def keep_by_bits(bits_N: NDArray[np.uint32], p_N: Array) -> NDArray[np.bool_]:
    """Keep an element iff its draw is below floor(p * 2^32); p = 1 keeps everything."""
    thresholds_N = np.floor(p_N * 4294967296.0).astype(np.uint64)
    return bits_N.reshape(p_N.shape).astype(np.uint64) < thresholds_N


def rescaled(
    delta_N: Array, mask_N: NDArray[np.bool_], p_N: Array | float, rescale: Rescale, norm_floor: float
) -> Array:
    """Apply a mask, then make up for what it took away.

    "keep" divides every kept element by its own keep probability (the papers' form, unbiased); "l1" multiplies the
    tensor by the ratio of the L1 norms before and after (mergekit's form), unless one of them is below `norm_floor`.
    """
    masked_N: Array = np.where(mask_N, delta_N, 0.0)
    if rescale == "keep":
        return as_float64(masked_N / p_N)
    if rescale == "l1":
        before, after = float(np.abs(delta_N).sum()), float(np.abs(masked_N).sum())
        if before > 0 and after > 0 and before >= norm_floor and after >= norm_floor:
            return masked_N * (before / after)
    return masked_N


def elect_and_merge(
    deltas_KN: Sequence[Array],
    weights_K: Sequence[float],
    *,
    elect: Elect | Literal["none"],
    normalize: bool,
) -> Array:
    """Sum w * delta, over the entries with the elected sign where there is an election.

    Votes are w * delta ("unweighted": delta). The elected sign is that of their sum, plus where it is zero. An entry
    agrees iff the sign of its vote is the elected one, so a zero never agrees. `normalize` divides by the sum of w over
    agreeing entries (over all models where there is no election); an exact zero divides by 1.
    """
    weighted_KN = [w * delta_N for w, delta_N in zip(weights_K, deltas_KN, strict=True)]
    if elect == "none":
        merged_N: Array = np.sum(weighted_KN, axis=0)
        divisor = math.fsum(weights_K)
        return merged_N / divisor if normalize and abs(divisor) >= 1e-8 else merged_N
    votes_KN = weighted_KN if elect == "weighted" else deltas_KN
    # Votes under decimal weights that cancel leave a remainder in float64, too: within 1e-12 of their sum it is a zero.
    undecided_N = 1e-12 * np.sum(np.abs(votes_KN), axis=0)
    elected_N = np.where(np.sum(votes_KN, axis=0) >= -undecided_N, 1.0, -1.0)
    agrees_KN = [np.sign(vote_N) == elected_N for vote_N in votes_KN]
    merged_N = np.sum([np.where(a_N, x_N, 0.0) for a_N, x_N in zip(agrees_KN, weighted_KN, strict=True)], axis=0)
    if not normalize:
        return merged_N
    divisor_N = np.sum([np.where(a_N, w, 0.0) for a_N, w in zip(agrees_KN, weights_K, strict=True)], axis=0)
    is_zero_N = np.abs(divisor_N) < 1e-12 * np.sum(np.abs(weights_K))
    return as_float64(merged_N / np.where(is_zero_N, 1.0, divisor_N))


def task_vectors(base: ArrayLike, tensors_K: Sequence[ArrayLike]) -> tuple[Array, list[Array]]:
    """The base and each checkpoint minus the base, in float64."""
    base_N = as_float64(base)
    return base_N, [as_float64(tensor) - base_N for tensor in tensors_K]


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------


def linear(
    base: ArrayLike | None, tensors_K: Sequence[ArrayLike], coefficients_K: Sequence[float], *, normalize: bool = True
) -> Array:
    """Weighted sum of checkpoints, divided by the sum of the weights where `normalize` holds. The base is ignored."""
    total = np.sum([w * as_float64(x) for w, x in zip(coefficients_K, tensors_K, strict=True)], axis=0)
    return as_float64(total / math.fsum(coefficients_K) if normalize else total)


def task_arithmetic(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """base + lambda * sum of w * task vector."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    return base_N + lambda_ * elect_and_merge(deltas_KN, coefficients_K, elect="none", normalize=normalize)


def slerp(
    base: ArrayLike | None, tensors_K: Sequence[ArrayLike], coefficients_K: Sequence[float] = (), *, t: float = 0.5
) -> Array:
    """Spherical interpolation of two whole tensors from t = 0 (the first) to t = 1. The base is ignored.

    The angle is that of the unit vectors; the combination is of the raw ones.
    """
    v0, v1 = (as_float64(tensor) for tensor in tensors_K)
    norms = [float(np.linalg.norm(v.reshape(-1))) for v in (v0, v1)]
    u0, u1 = (v / norm if norm > SLERP_NORM_FLOOR else v for v, norm in zip((v0, v1), norms, strict=True))
    dot = float(np.clip((u0 * u1).sum(), -1, 1))
    if abs(dot) > SLERP_DOT_THRESHOLD:
        return (1 - t) * v0 + t * v1
    omega = math.acos(dot)
    return (math.sin((1 - t) * omega) * v0 + math.sin(t * omega) * v1) / math.sin(omega)


def nuslerp(
    base: ArrayLike | None,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    """Spherical interpolation at t = w1 / (w0 + w1), of task vectors where there is a base.

    Whole tensors, or (`nuslerp_flatten` false) each row, or (`nuslerp_row_wise`) each column of the matrix of rows.
    Linear only where the two are all but parallel.
    """
    w0, w1 = coefficients_K
    t = 0.5 if abs(w0 + w1) < NUSLERP_SUM_FLOOR else w1 / (w0 + w1)
    shape = as_float64(tensors_K[0]).shape
    base_RC = np.zeros_like(as_rows(as_float64(tensors_K[0]))) if base is None else as_rows(as_float64(base))
    v0, v1 = (as_rows(as_float64(tensor)) - base_RC for tensor in tensors_K)
    axis: int | None = None if nuslerp_flatten or len(v0) == 1 else 0 if nuslerp_row_wise else 1
    norm0, norm1 = (np.sqrt((v * v).sum(axis=axis, keepdims=True)) for v in (v0, v1))
    product = norm0 * norm1
    cos = np.where(product > 0, (v0 * v1).sum(axis=axis, keepdims=True) / np.where(product > 0, product, 1), 0.0)
    cos = np.clip(cos, -1, 1)
    is_parallel = 1 - cos * cos <= NUSLERP_SIN_FLOOR**2
    omega = np.where(is_parallel, 1.0, np.arccos(np.where(is_parallel, 0.0, cos)))
    spherical = (np.sin((1 - t) * omega) * v0 + np.sin(t * omega) * v1) / np.sin(omega)
    return as_float64(base_RC + np.where(is_parallel, (1 - t) * v0 + t * v1, spherical)).reshape(shape)


def _thinned(
    deltas_KN: list[Array],
    *,
    density: PerModel,
    gamma: PerModel,
    granularity: Granularity,
    rescale: Rescale,
    norm_floor: float,
) -> list[Array]:
    """Drop the largest and the smallest of each task vector, or of each of its rows."""
    densities_K, gammas_K = per_model(density, len(deltas_KN)), per_model(gamma, len(deltas_KN))
    out_KN = []
    for delta_N, p, g in zip(deltas_KN, densities_K, gammas_K, strict=True):
        if granularity == "row":
            mask_N = np.stack([keep_mask_middle(row_C, p, g) for row_C in as_rows(delta_N)]).reshape(delta_N.shape)
        else:
            mask_N = keep_mask_middle(delta_N, p, g)
        out_KN.append(rescaled(delta_N, mask_N, 1.0, rescale, norm_floor))
    return out_KN


def ties(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    density: PerModel = 1.0,
    normalize: bool = True,
    rescale: Rescale = "none",
    lambda_: float = 1.0,
    elect: Elect = "weighted",
    granularity: Granularity = "tensor",
    norm_floor: float = 0.0,
) -> Array:
    """Keep the largest of each task vector, elect a sign for each element, average what agrees."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _thinned(
        deltas_KN, density=density, gamma=0.0, granularity=granularity, rescale=rescale, norm_floor=norm_floor
    )
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect=elect, normalize=normalize)


def _dropped(
    deltas_KN: list[Array], bits_K: Bits, *, density: PerModel, rescale: Rescale, norm_floor: float
) -> list[Array]:
    """DARE's drop: every element with the same probability."""
    densities_K = per_model(density, len(deltas_KN))
    out_KN = []
    for delta_N, bits_N, p in zip(deltas_KN, bits_K, densities_K, strict=True):
        mask_N = keep_by_bits(np.asarray(bits_N), np.full(delta_N.shape, min(p, 1.0)))
        out_KN.append(delta_N if p >= 1 else rescaled(delta_N, mask_N, p, rescale, norm_floor))
    return out_KN


def dare_linear(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    bits_K: Bits,
    density: PerModel = 1.0,
    normalize: bool = False,
    rescale: Rescale = "keep",
    lambda_: float = 1.0,
    norm_floor: float = 0.0,
) -> Array:
    """Drop elements of each task vector at random, rescale the rest, sum."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _dropped(deltas_KN, bits_K, density=density, rescale=rescale, norm_floor=norm_floor)
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect="none", normalize=normalize)


def dare_ties(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    bits_K: Bits,
    density: PerModel = 1.0,
    normalize: bool = False,
    rescale: Rescale = "keep",
    lambda_: float = 1.0,
    elect: Elect = "weighted",
    norm_floor: float = 0.0,
) -> Array:
    """Drop elements of each task vector at random, rescale the rest, sum what has the elected sign."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _dropped(deltas_KN, bits_K, density=density, rescale=rescale, norm_floor=norm_floor)
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect=elect, normalize=normalize)


def half_widths(epsilon: PerModel, window: PerModel, num_models: int) -> list[float]:
    """DELLA's half width: half of `window` (the paper's full width) where that is above 0, else `epsilon`."""
    pairs = zip(per_model(epsilon, num_models), per_model(window, num_models), strict=True)
    return [full / 2 if full > 0 else half for half, full in pairs]


def _pruned(
    deltas_KN: list[Array],
    bits_K: Bits,
    *,
    density: PerModel,
    epsilon: PerModel,
    rescale: Rescale,
    norm_floor: float,
) -> list[Array]:
    """MAGPRUNE: drop at random, the smaller of its row the likelier. Density 1 drops nothing."""
    densities_K, epsilons_K = per_model(density, len(deltas_KN)), per_model(epsilon, len(deltas_KN))
    out_KN = []
    for delta_N, bits_N, p, e in zip(deltas_KN, bits_K, densities_K, epsilons_K, strict=True):
        if p >= 1:
            out_KN.append(delta_N)
            continue
        p_N = keep_probabilities_della(delta_N, p, e)
        out_KN.append(rescaled(delta_N, keep_by_bits(np.asarray(bits_N), p_N), p_N, rescale, norm_floor))
    return out_KN


def della(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    bits_K: Bits,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    window: PerModel = 0.0,
    normalize: bool = True,
    rescale: Rescale = "keep",
    lambda_: float = 1.0,
    elect: Elect = "weighted",
    norm_floor: float = 0.0,
) -> Array:
    """Drop by magnitude rank in the row, rescale by each element's own keep probability, elect, average what agrees."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _pruned(
        deltas_KN,
        bits_K,
        density=density,
        epsilon=half_widths(epsilon, window, len(deltas_KN)),
        rescale=rescale,
        norm_floor=norm_floor,
    )
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect=elect, normalize=normalize)


def della_linear(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    bits_K: Bits,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    window: PerModel = 0.0,
    normalize: bool = False,
    rescale: Rescale = "keep",
    lambda_: float = 1.0,
    norm_floor: float = 0.0,
) -> Array:
    """Drop by magnitude rank in the row, rescale by each element's own keep probability, sum."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _pruned(
        deltas_KN,
        bits_K,
        density=density,
        epsilon=half_widths(epsilon, window, len(deltas_KN)),
        rescale=rescale,
        norm_floor=norm_floor,
    )
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect="none", normalize=normalize)


def breadcrumbs(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: bool = False,
    rescale: Rescale = "none",
    lambda_: float = 1.0,
    granularity: Granularity = "tensor",
    norm_floor: float = 0.0,
) -> Array:
    """Drop outliers and the smallest of each task vector, sum."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _thinned(
        deltas_KN, density=density, gamma=gamma, granularity=granularity, rescale=rescale, norm_floor=norm_floor
    )
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect="none", normalize=normalize)


def breadcrumbs_ties(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: bool = False,
    rescale: Rescale = "none",
    lambda_: float = 1.0,
    elect: Elect = "weighted",
    granularity: Granularity = "tensor",
    norm_floor: float = 0.0,
) -> Array:
    """Drop outliers and the smallest of each task vector, sum what has the elected sign."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    kept_KN = _thinned(
        deltas_KN, density=density, gamma=gamma, granularity=granularity, rescale=rescale, norm_floor=norm_floor
    )
    return base_N + lambda_ * elect_and_merge(kept_KN, coefficients_K, elect=elect, normalize=normalize)


def mean_pairwise_cosine(vectors_KC: Sequence[Array], norm_floor: float = 0.0) -> float:
    """Mean cosine over all pairs; a zero vector's count 0. `norm_floor` bounds a product of norms below."""
    cosines = []
    for a_C, b_C in combinations(vectors_KC, 2):
        product = max(float(np.linalg.norm(a_C)) * float(np.linalg.norm(b_C)), norm_floor)
        cosines.append(min(1.0, max(-1.0, float(np.dot(a_C, b_C)) / product)) if product > 0 else 0.0)
    return math.fsum(cosines) / len(cosines)


def model_stock_t(cosine: float, num_models: int, clamp: bool = False) -> float:
    """t = N c / (1 + (N - 1) c); a denominator below 1e-6 in magnitude has no meaning and raises ZeroDivisionError."""
    denominator = 1 + (num_models - 1) * cosine
    if abs(denominator) < 1e-6:
        raise ZeroDivisionError(f"1 + (N - 1) c = {denominator} with N = {num_models}, c = {cosine}")
    t = num_models * cosine / denominator
    return min(1.0, max(0.0, t)) if clamp else t


def model_stock(
    base: ArrayLike,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float] = (),
    *,
    filter_wise: bool = False,
    clamp: bool = False,
    norm_floor: float = 0.0,
) -> Array:
    """t * mean of the checkpoints + (1 - t) * base, t from the mean pairwise cosine of task vectors (or rows)."""
    base_N, deltas_KN = task_vectors(base, tensors_K)
    mean_N = np.mean([as_float64(x) for x in tensors_K], axis=0)
    if not filter_wise:
        c = mean_pairwise_cosine([delta_N.reshape(-1) for delta_N in deltas_KN], norm_floor)
        t: Array | float = model_stock_t(c, len(tensors_K), clamp)
    else:
        rows_KRC = [as_rows(delta_N) for delta_N in deltas_KN]
        cosines_R = [mean_pairwise_cosine(rows_KC, norm_floor) for rows_KC in zip(*rows_KRC, strict=True)]
        t_R = np.array([model_stock_t(c, len(tensors_K), clamp) for c in cosines_R])
        t = np.broadcast_to(t_R[:, None], rows_KRC[0].shape).reshape(base_N.shape)
    return as_float64(t * mean_N + (1 - t) * base_N)


def difference_norm(first: ArrayLike, other: ArrayLike, normaliser: Literal["abs", "rms", "relative"] = "rms") -> float:
    """How far two tensors lie apart: the norm of the difference, per root element, or per norm of the first."""
    first_N = as_float64(first).reshape(-1)
    norm = float(np.linalg.norm(first_N - as_float64(other).reshape(-1)))
    if normaliser == "rms":
        return norm / math.sqrt(max(1, first_N.size))
    if normaliser == "relative":
        first_norm = float(np.linalg.norm(first_N))
        return norm / first_norm if first_norm else (math.inf if norm else 0.0)
    return norm


def assembly_of_experts(
    base: ArrayLike | None,
    tensors_K: Sequence[ArrayLike],
    coefficients_K: Sequence[float],
    *,
    threshold: float = 0.0,
    normaliser: Literal["abs", "rms", "relative"] = "rms",
    normalize: bool = True,
) -> Array:
    """As linear where some checkpoint differs from the first by more than the threshold; else the first."""
    largest = max(difference_norm(tensors_K[0], other, normaliser) for other in tensors_K)
    if largest > threshold:
        return linear(None, tensors_K, coefficients_K, normalize=normalize)
    return as_float64(tensors_K[0])


OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        linear,
        task_arithmetic,
        slerp,
        nuslerp,
        ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        breadcrumbs,
        breadcrumbs_ties,
        model_stock,
        assembly_of_experts,
    )
}
