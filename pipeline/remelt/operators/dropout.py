"""Operators that thin task vectors at random: DARE, and DELLA, which drops the small entries likelier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from remelt.operators.quantities import keep_scale, per_model
from remelt.operators.sparse import Thinned, merge_by_election, merge_by_sum
from remelt.operators.spec import Interval, OptionValue, PerModel
from remelt.operators.steps import (
    Draws,
    draws_of,
    drop,
    drop_by_rank,
    l1_scale,
    task_vectors,
)
from remelt.operators.steps import rescale as rescaled

if TYPE_CHECKING:
    from torch import Tensor

Rescale: TypeAlias = Literal["keep", "l1", "none"]


def _dropped(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    draws: Draws,
    *,
    density: PerModel,
    rescale: Rescale,
    norm_floor: float,
) -> Thinned:
    """DARE's drop and rescale of each task vector."""
    thinned = Thinned([], [])
    densities_K = per_model(density, len(tensors_K))
    for model, (delta, kept) in enumerate(zip(task_vectors(base, tensors_K), densities_K, strict=True)):
        masked = drop(delta, draws_of(draws, model), kept) if kept < 1 else delta
        thinned.deltas_K.append(masked)
        if rescale == "l1" and kept < 1:
            thinned.scales_K.append(l1_scale(delta, masked, norm_floor))
        else:
            thinned.scales_K.append(keep_scale(kept) if rescale == "keep" else 1.0)
    return thinned


def dare_linear(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    draws: Draws,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    normalize: bool = False,
    rescale: Rescale = "keep",
    lambda_: Annotated[float, Interval()] = 1.0,
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Drop entries of each task vector at random, rescale the rest, then add as task arithmetic does.

    d_i = m_i (x_i - base) / density, m_i = 1 with probability density; out = base + lambda sum_i w_i d_i.

    Args:
        base: the common ancestor.
        tensors_K: K tensors of the base's shape.
        coefficients_K: K weights.
        draws: 32 random bits for each element of each model.
        density: keep probability in (0, 1], for all models or for each.
        normalize: divide by the sum of the weights, unless that is below 1e-8 in magnitude.
        rescale: "keep" divides by the keep probability, which makes the merge unbiased; "l1" restores the L1 norm of
            the tensor instead (mergekit since 0.1.0); "none" leaves it.
        lambda_: scale of the merged task vector.
        norm_floor: with "l1", norms below it leave the task vector as it is (mergekit: 1e-7).

    Returns:
        float32 tensor of the same shape.

    References:
        Yu et al. 2023, arXiv 2311.03099, eq. 2 and 3.

    Differences:
        Draws depend on seed, model, tensor and flat index alone, where the public codes use a global generator in the
        order of their visits.
    """
    thinned = _dropped(base, tensors_K, draws, density=density, rescale=rescale, norm_floor=norm_floor)
    return merge_by_sum(base, thinned, coefficients_K, normalize=normalize, lambda_=lambda_)


def dare_ties(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    draws: Draws,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    normalize: bool = False,
    rescale: Rescale = "keep",
    lambda_: Annotated[float, Interval()] = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Drop entries of each task vector at random, rescale the rest, then add what has the elected sign.

    d_i as in dare_linear; s = sign of sum_i w_i d_i, plus where it is zero; out = base + lambda sum_A w_i d_i over
    A = {i: sign(w_i d_i) = s}, divided by sum_A w_i with `normalize`.

    Args:
        base, tensors_K, coefficients_K, draws, density, rescale, lambda_, norm_floor: as in dare_linear.
        normalize: divide by the sum of the agreeing weights (a sum of exactly 0 counts as 1).
        elect: whether votes are w_i d_i or d_i.

    Returns:
        float32 tensor of the same shape.

    References:
        Yu et al. 2023, arXiv 2311.03099, eq. 2 and 3; Yadav et al. 2023, arXiv 2306.01708, algorithm 1.

    Differences:
        As for dare_linear and ties.
    """
    thinned = _dropped(base, tensors_K, draws, density=density, rescale=rescale, norm_floor=norm_floor)
    return merge_by_election(base, thinned, coefficients_K, elect=elect, normalize=normalize, lambda_=lambda_)


def half_widths(epsilon: PerModel, window: PerModel, num_models: int) -> tuple[float, ...]:
    """DELLA's half width for each model: `window` / 2 where a window is given (above 0), else `epsilon`."""
    pairs = zip(per_model(epsilon, num_models), per_model(window, num_models), strict=True)
    return tuple(full / 2 if full > 0 else half for half, full in pairs)


def check_widths(options: Mapping[str, OptionValue]) -> str | None:
    """Refuse keep probabilities that reach 0 or 1: density -/+ epsilon must stay inside, unless density is 1."""
    sequences = [options[key] for key in ("density", "epsilon", "window") if key in options]
    num_models = max((len(value) for value in sequences if isinstance(value, tuple)), default=1)
    density, epsilon, window = (
        per_model(options.get(key, default), num_models)  # type: ignore[arg-type]
        for key, default in (("density", 1.0), ("epsilon", 0.15), ("window", 0.0))
    )
    for kept, half in zip(density, half_widths(epsilon, window, num_models), strict=True):
        if kept < 1 and not (kept - half > 0 and kept + half < 1):
            return (
                f"keep probabilities would run from {kept - half:g} to {kept + half:g} (density {kept:g}, epsilon "
                f"{half:g}) and must stay between 0 and 1; choose epsilon below {min(kept, 1 - kept):g}"
            )
    return None


def _pruned(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    draws: Draws,
    *,
    density: PerModel,
    halves_K: Sequence[float],
    rescale: Rescale,
    norm_floor: float,
) -> Thinned:
    """DELLA's MAGPRUNE of each task vector."""
    thinned = Thinned([], [])
    densities_K = per_model(density, len(tensors_K))
    for model, delta in enumerate(task_vectors(base, tensors_K)):
        kept, reciprocals = delta, None
        if densities_K[model] < 1:
            kept, reciprocals = drop_by_rank(delta, draws_of(draws, model), densities_K[model], halves_K[model])
        thinned.deltas_K.append(rescaled(kept, reciprocals if rescale == "keep" else None))
        is_scaled = rescale == "l1" and densities_K[model] < 1
        thinned.scales_K.append(l1_scale(delta, kept, norm_floor) if is_scaled else 1.0)
    return thinned


def della(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    draws: Draws,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    epsilon: Annotated[PerModel, Interval(0, 0.5, open_high=True)] = 0.15,
    window: Annotated[PerModel, Interval(0, 1, open_high=True)] = 0.0,
    normalize: bool = True,
    rescale: Rescale = "keep",
    lambda_: Annotated[float, Interval()] = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Drop entries at random, the smaller in its row the likelier, rescale each by its keep probability, elect, merge.

    q = density - epsilon + 2 epsilon r / (n - 1), r = 0..n-1 the ascending rank of |x_i - base| in its row of n;
    d_i = m_i (x_i - base) / q, m_i = 1 with probability q; then as ties: out = base + lambda sum_A w_i d_i / sum_A w_i.

    Args:
        base: the common ancestor.
        tensors_K: K tensors of the base's shape; rows run along the last dimension, and a tensor with fewer than two
            dimensions is one row.
        coefficients_K: K weights.
        draws: 32 random bits for each element of each model.
        density: mean keep probability in (0, 1], for all models or for each; 1 drops nothing.
        epsilon: half width of the range of keep probabilities, 0 < density - epsilon and density + epsilon < 1.
        window: the full width (the paper's epsilon, its code's window_size); above 0 it replaces `epsilon`.
        normalize: divide by the sum of the agreeing weights (a sum of exactly 0 counts as 1).
        rescale: "keep" divides each entry by its own q (unbiased); "l1" restores the L1 norm of the tensor by one
            factor (mergekit since 0.1.0); "none" leaves it.
        lambda_: scale of the merged task vector.
        elect: whether votes are w_i d_i (both public codes) or d_i (the paper).
        norm_floor: with "l1", norms below it leave the task vector as it is (mergekit: 1e-7).

    Returns:
        float32 tensor of the same shape.

    References:
        Deep et al. 2024, arXiv 2406.11617, section 2 (steps Drop, Elect, Fuse).

    Differences:
        The paper's ramp steps by 2 epsilon / n, its code's and ours by 2 epsilon / (n - 1), so that the mean is exactly
        the density. Equal magnitudes rank by index; rows of one element keep it with probability `density` (0/0 in both
        codes); fused experts are ranked along their last dimension (both codes: along dimension 1).
    """
    halves_K = half_widths(epsilon, window, len(tensors_K))
    thinned = _pruned(
        base, tensors_K, draws, density=density, halves_K=halves_K, rescale=rescale, norm_floor=norm_floor
    )
    return merge_by_election(base, thinned, coefficients_K, elect=elect, normalize=normalize, lambda_=lambda_)


def della_linear(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    draws: Draws,
    density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
    epsilon: Annotated[PerModel, Interval(0, 0.5, open_high=True)] = 0.15,
    window: Annotated[PerModel, Interval(0, 1, open_high=True)] = 0.0,
    normalize: bool = False,
    rescale: Rescale = "keep",
    lambda_: Annotated[float, Interval()] = 1.0,
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Drop entries at random, the smaller in its row the likelier, rescale, then add as task arithmetic does.

    d_i as in della; out = base + lambda sum_i w_i d_i.

    Args:
        base, tensors_K, coefficients_K, draws, density, epsilon, window, rescale, lambda_, norm_floor: as in della.
        normalize: divide by the sum of the weights, unless that is below 1e-8 in magnitude.

    Returns:
        float32 tensor of the same shape.

    References:
        Deep et al. 2024, arXiv 2406.11617, section 2, without its Elect step.

    Differences:
        As for della.
    """
    halves_K = half_widths(epsilon, window, len(tensors_K))
    thinned = _pruned(
        base, tensors_K, draws, density=density, halves_K=halves_K, rescale=rescale, norm_floor=norm_floor
    )
    return merge_by_sum(base, thinned, coefficients_K, normalize=normalize, lambda_=lambda_)
