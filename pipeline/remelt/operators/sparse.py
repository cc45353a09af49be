"""Operators that thin task vectors by magnitude, then add them: TIES and Model Breadcrumbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from remelt.errors import OperatorError
from remelt.operators.quantities import election_weights, float32, folded, per_model
from remelt.operators.spec import Interval, OptionValue, PerModel
from remelt.operators.steps import (
    agreeing,
    disjoint_mean,
    elect_signs,
    l1_scale,
    task_vectors,
    trim,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


class Thinned(NamedTuple):
    """Task vectors after their thinning, and the factor that each is still to be multiplied by."""

    deltas_K: list[Tensor]
    scales_K: list[float]


def merge_by_election(
    base: Tensor,
    thinned: Thinned,
    coefficients_K: Sequence[float],
    *,
    elect: Literal["weighted", "unweighted"],
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """base + lambda times the disjoint mean of w_i delta_i; the tail that TIES, DARE-TIES, DELLA and others share."""
    deltas_K, scales_K = thinned
    weights_K, divisors_K, ballots_K, unit = election_weights(coefficients_K, scales_K, elect, normalize)
    votes_K = [delta * ballot for delta, ballot in zip(deltas_K, ballots_K, strict=True)]
    is_plus = elect_signs(votes_K)
    agrees_K = [agreeing(vote, is_plus) for vote in votes_K]
    weighted_K = [delta * weight for delta, weight in zip(deltas_K, weights_K, strict=True)]
    merged = disjoint_mean(weighted_K, agrees_K, divisors_K, normalize=normalize, unit=unit)
    return base.float() + merged * float32(lambda_)


def merge_by_sum(
    base: Tensor, thinned: Thinned, coefficients_K: Sequence[float], *, normalize: bool, lambda_: float
) -> Tensor:
    """base + lambda times the sum of w_i delta_i."""
    coefficients_K = folded(coefficients_K, lambda_, normalize, thinned.scales_K)
    return base.float() + weighted_sum(thinned.deltas_K, coefficients_K)


def select_by_magnitude(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    *,
    density: PerModel,
    gamma: PerModel = 0.0,
    granularity: Literal["tensor", "row"],
    rescale: Literal["none", "l1"],
    norm_floor: float,
) -> Thinned:
    """Task vectors without their floor(gamma n) largest entries and all but the density n next ones."""
    deltas_K, count = task_vectors(base, tensors_K), len(tensors_K)
    kept_K = [
        trim(delta, fraction, gamma=top, granularity=granularity)
        for delta, fraction, top in zip(deltas_K, per_model(density, count), per_model(gamma, count), strict=True)
    ]
    if rescale == "none":
        return Thinned(kept_K, [1.0] * count)
    return Thinned(kept_K, [l1_scale(*pair, norm_floor) for pair in zip(deltas_K, kept_K, strict=True)])


def ties(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    normalize: bool = True,
    rescale: Literal["none", "l1"] = "none",
    lambda_: Annotated[float, Interval()] = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
    granularity: Literal["tensor", "row"] = "tensor",
    topk: Literal["tensor", "global"] = "tensor",
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Trim task vectors to their largest entries, elect a sign for each element, average what agrees.

    d_i = the k largest magnitudes of x_i - base, zero elsewhere, k = max(1, floor(density n));
    s = sign of sum_i w_i d_i, plus where it is zero; A = {i: sign(w_i d_i) = s};
    out = base + lambda sum_A w_i d_i / sum_A w_i.

    Args:
        base: the common ancestor.
        tensors_K: K tensors of the base's shape.
        coefficients_K: K weights.
        density: kept fraction in (0, 1], for all models or for each.
        normalize: divide by the sum of the agreeing weights (a sum of exactly 0 counts as 1); otherwise by nothing.
        rescale: "l1" restores each task vector's L1 norm after trimming, by one factor.
        lambda_: scale of the merged task vector.
        elect: whether votes are w_i d_i or d_i.
        granularity: n is the tensor's number of elements, or the row's.
        topk: "global" is the paper's one threshold over the model. It needs a survey of all tensors (`remelt.survey`),
            so that this function, which sees one tensor, knows "tensor" only.
        norm_floor: with "l1", norms below it leave the task vector as it is (mergekit: 1e-7).

    Returns:
        float32 tensor of the same shape.

    References:
        Yadav et al. 2023, arXiv 2306.01708, algorithm 1.

    Differences:
        The paper trims over the whole model, keeps k + 1 entries and all ties, gives an undecided element the majority
        sign of the model, and divides by the count of agreeing models. This is mergekit's form, per tensor, with
        exactly k entries kept (the lowest flat index wins among equals), also in tensors with density n < 1. Weights in
        proportion to small integers are counted as such, so that undecided votes are undecided exactly.
    """
    if topk == "global":
        raise OperatorError("`topk: global` ranks whole models; this function sees one tensor: merge by a recipe")
    thinned = select_by_magnitude(
        base, tensors_K, density=density, granularity=granularity, rescale=rescale, norm_floor=norm_floor
    )
    return merge_by_election(base, thinned, coefficients_K, elect=elect, normalize=normalize, lambda_=lambda_)


def check_topk(options: Mapping[str, OptionValue]) -> str | None:
    """A threshold is over the whole model or over a row, not both."""
    if options.get("topk") == "global" and options.get("granularity") == "row":
        return "`topk: global` and `granularity: row` exclude each other; choose one"
    return None


def breadcrumbs(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    gamma: Annotated[PerModel, Interval(0, 1, open_high=True)] = 0.01,
    normalize: bool = False,
    rescale: Literal["none", "l1"] = "none",
    lambda_: Annotated[float, Interval()] = 1.0,
    granularity: Literal["tensor", "row"] = "tensor",
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Drop the outliers and the small entries of each task vector, then add as task arithmetic does.

    d_i = x_i - base without its floor(gamma n) largest magnitudes, then its max(1, floor(density n)) largest;
    out = base + lambda sum_i w_i d_i.

    Args:
        base: the common ancestor.
        tensors_K: K tensors of the base's shape.
        coefficients_K: K weights.
        density: kept fraction in (0, 1], for all models or for each; 1 drops nothing, whatever gamma.
        gamma: fraction dropped on top, in [0, 1); less is dropped where the density would not be reached.
        normalize: divide by the sum of the weights, unless that is below 1e-8 in magnitude.
        rescale: "l1" restores each task vector's L1 norm afterwards, by one factor.
        lambda_: scale of the merged task vector.
        granularity: n is the tensor's number of elements, or the row's.
        norm_floor: with "l1", norms below it leave the task vector as it is (mergekit: 1e-7).

    Returns:
        float32 tensor of the same shape.

    References:
        Davari and Belilovsky 2023, arXiv 2312.06795, section 3.

    Differences:
        The authors' code masks each row (`granularity: row`); mergekit each tensor. The top slice may be empty, where
        mergekit 0.1.4 then loses the whole task vector.
    """
    thinned = select_by_magnitude(
        base,
        tensors_K,
        density=density,
        gamma=gamma,
        granularity=granularity,
        rescale=rescale,
        norm_floor=norm_floor,
    )
    return merge_by_sum(base, thinned, coefficients_K, normalize=normalize, lambda_=lambda_)


def breadcrumbs_ties(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    gamma: Annotated[PerModel, Interval(0, 1, open_high=True)] = 0.01,
    normalize: bool = False,
    rescale: Literal["none", "l1"] = "none",
    lambda_: Annotated[float, Interval()] = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
    granularity: Literal["tensor", "row"] = "tensor",
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Drop the outliers and the small entries of each task vector, then add what has the elected sign.

    d_i as in breadcrumbs; s = sign of sum_i w_i d_i, plus where it is zero; out = base + lambda sum_A w_i d_i over
    A = {i: sign(w_i d_i) = s}, divided by sum_A w_i with `normalize`.

    Args:
        base, tensors_K, coefficients_K, density, gamma, rescale, lambda_, granularity, norm_floor: as in breadcrumbs.
        normalize: divide by the sum of the agreeing weights (a sum of exactly 0 counts as 1).
        elect: whether votes are w_i d_i or d_i.

    Returns:
        float32 tensor of the same shape.

    References:
        Davari and Belilovsky 2023, arXiv 2312.06795, section 3; Yadav et al. 2023, arXiv 2306.01708, algorithm 1.

    Differences:
        As for breadcrumbs and ties.
    """
    thinned = select_by_magnitude(
        base,
        tensors_K,
        density=density,
        gamma=gamma,
        granularity=granularity,
        rescale=rescale,
        norm_floor=norm_floor,
    )
    return merge_by_election(base, thinned, coefficients_K, elect=elect, normalize=normalize, lambda_=lambda_)
