"""Operators that weigh whole checkpoints or task vectors by given coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from remelt.operators.quantities import NO_ELECTION_SUM_FLOOR, difference_norms, folded, normalized
from remelt.operators.spec import Interval, OptionValue
from remelt.operators.steps import task_vectors, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def linear(
    base: Tensor | None, tensors_K: Sequence[Tensor], coefficients_K: Sequence[float], *, normalize: bool = True
) -> Tensor:
    """Weighted mean of checkpoints.

    out = sum_i w_i x_i / sum_i w_i; without `normalize`, sum_i w_i x_i.

    Args:
        base: not used; a base is an ordinary model here.
        tensors_K: K tensors of one shape.
        coefficients_K: K weights of any sign.
        normalize: divide by the sum of the weights, which must not be zero.

    Returns:
        float32 tensor of the same shape.

    References:
        Izmailov et al. 2018, arXiv 1803.05407, equation in section 3.2; Wortsman et al. 2022, arXiv 2203.05482, eq. 1.

    Differences:
        The weights are normalised in float64 and rounded once, instead of dividing the sum. mergekit computes in the
        stored dtype and does not guard against a zero sum.
    """
    return weighted_sum(tensors_K, normalized(coefficients_K, normalize))


def task_arithmetic(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: Annotated[float, Interval()] = 1.0,
) -> Tensor:
    """Base plus the weighted sum of the task vectors.

    out = base + lambda sum_i w_i (x_i - base); with `normalize` the sum is divided by sum_i w_i.

    Args:
        base: the common ancestor.
        tensors_K: K tensors of the base's shape.
        coefficients_K: K weights of any sign (negative ones forget).
        normalize: divide by the sum of the weights, unless that is below 1e-8 in magnitude.
        lambda_: scale of the merged task vector.

    Returns:
        float32 tensor of the same shape; equal to the base where every task vector is zero.

    References:
        Ilharco et al. 2022, arXiv 2212.04089, section 2.

    Differences:
        lambda and the divisor are folded into the weights in float64. The paper's code skips integer tensors, which
        never reach an operator here.
    """
    deltas_K = task_vectors(base, tensors_K)
    return base.float() + weighted_sum(deltas_K, folded(coefficients_K, lambda_, normalize))


def assembly_of_experts(
    base: Tensor | None,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    threshold: Annotated[float, Interval(0)] = 0.0,
    normaliser: Literal["abs", "rms", "relative"] = "rms",
    normalize: bool = True,
) -> Tensor:
    """Interpolate the tensors that differ enough, keep the first model's elsewhere.

    out = sum_i w_i x_i (divided by sum_i w_i with `normalize`) if max_i d(x_0, x_i) > threshold, else x_0;
    d is the Frobenius norm of the difference: as it is (abs), per root element (rms), or over that of x_0 (relative).

    Args:
        base: not used.
        tensors_K: K tensors of one shape; the first is the one that is kept.
        coefficients_K: K weights.
        threshold: at least 0; 0 interpolates every tensor in which the models differ at all.
        normaliser: the unit of `threshold`.
        normalize: divide by the sum of the weights.

    Returns:
        float32 tensor of the same shape, or the first tensor itself, in its own dtype, bit for bit.

    References:
        Klagges et al. 2025, arXiv 2506.14794. Subsets of tensors (routed experts only, say) are `rules` of a recipe,
        and so are grafts, which are copies.

    Differences:
        The paper's unit of the threshold is not known to us, hence the explicit `normaliser`; there is no public code.
    """
    first = tensors_K[0].float()
    squares_K = [float((tensor.float() - first).double().square().sum()) for tensor in tensors_K[1:]]
    first_square = float(first.double().square().sum())
    distances_K = difference_norms(squares_K, first_square, first.numel(), normaliser)
    if max(distances_K, default=0.0) > threshold:
        return weighted_sum(tensors_K, normalized(coefficients_K, normalize))
    return tensors_K[0]


def check_sum_of_weights(coefficients_K: Sequence[float], options: Mapping[str, OptionValue]) -> str | None:
    """A sentence where weights that must be normalised sum to zero."""
    if options.get("normalize", True) and abs(math.fsum(coefficients_K)) < NO_ELECTION_SUM_FLOOR:
        return (
            f"the weights {list(coefficients_K)} sum to zero and cannot be normalised; "
            "change a weight or set `normalize: false`"
        )
    return None
