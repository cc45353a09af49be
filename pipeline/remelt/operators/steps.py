"""The small steps that operators are made of; all pure, on torch tensors.

K checkpoints, N elements of one tensor, R rows of C. Arithmetic is float32 with every product and every sum an IEEE
operation of its own (no `alpha=`, `addcmul`, `lerp`, `matmul`: fused forms differ by CPU); reductions are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from remelt.operators.lazy_torch import torch
from remelt.operators.quantities import (
    draw_threshold,
    kept_range,
    l1_factor,
    rank_probabilities,
    thresholds_of,
)

if TYPE_CHECKING:
    from torch import Tensor

Draws: TypeAlias = "Callable[[int], Tensor] | Sequence[Tensor]"
"""Gives 32 random bits for each element of model i: int32 (or uint32) tensors of N elements, any shape."""

Granularity: TypeAlias = Literal["tensor", "row"]

_SIGN_BIT = -(1 << 31)


def draws_of(draws: Draws, model: int) -> Tensor:
    """The bits of one model, as int32."""
    bits = draws(model) if callable(draws) else draws[model]
    return bits.view(torch.int32)


def task_vectors(base: Tensor, tensors_K: Sequence[Tensor]) -> list[Tensor]:
    """Each checkpoint minus the base, in float32."""
    base = base.float()
    return [tensor.float() - base for tensor in tensors_K]


def weighted_sum(tensors_K: Sequence[Tensor], coefficients_K: Sequence[float]) -> Tensor:
    """c_0 x_0 + c_1 x_1 + ..., from left to right; coefficients are float32 values."""
    total = tensors_K[0].float() * coefficients_K[0]
    for tensor, coefficient in zip(tensors_K[1:], coefficients_K[1:], strict=True):
        total = total + tensor.float() * coefficient
    return total


def gram(tensors_K: Sequence[Tensor], dim: int | None = None) -> Tensor:
    """K x K inner products in float64: of whole tensors, or along `dim` (then of shape (..., K, K))."""
    wide_K = [tensor.double() for tensor in tensors_K]
    rows = []
    for a in wide_K:
        products = [a * b for b in wide_K]
        rows.append(torch.stack([p.sum() if dim is None else p.sum(dim) for p in products], dim=-1))
    return torch.stack(rows, dim=-2)


def as_rows(tensor: Tensor) -> Tensor:
    """View as (R, C): the last dimension is the row; fewer than two dimensions are one row."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def row_ranks(delta: Tensor, *, descending: bool = False) -> Tensor:
    """Rank of each magnitude in its row, from 0; among equals the lowest index comes first. Shape (R, C), int64."""
    rows_RC = as_rows(delta).abs()
    order_RC = torch.argsort(rows_RC, dim=1, descending=descending, stable=True)
    places = torch.arange(rows_RC.shape[1], device=delta.device).expand_as(order_RC)
    return torch.empty_like(order_RC).scatter_(1, order_RC, places)


def trim(delta: Tensor, density: float, *, gamma: float = 0.0, granularity: Granularity = "tensor") -> Tensor:
    """Zero all but max(1, floor(density n)) magnitudes of a tensor or of each row, after dropping the floor(gamma n)
    largest; among equals the lowest flat index counts as larger."""
    if delta.numel() == 0:
        return delta
    rows_RC = as_rows(delta) if granularity == "row" else delta.reshape(1, -1)
    start, stop = kept_range(rows_RC.shape[1], density, gamma)
    ranks_RC = row_ranks(rows_RC, descending=True)
    is_kept = (ranks_RC >= start) & (ranks_RC < stop)
    return torch.where(is_kept, rows_RC, 0.0).reshape(delta.shape)


def is_below(bits: Tensor, threshold: Tensor | int) -> Tensor:
    """Compare 32-bit draws, held as int32, with a threshold below 2^32 as unsigned numbers."""
    flipped = threshold ^ _SIGN_BIT if isinstance(threshold, torch.Tensor) else threshold + _SIGN_BIT
    return (bits ^ _SIGN_BIT) < flipped


def drop(delta: Tensor, bits: Tensor, probability: float) -> Tensor:
    """Zero every element whose draw does not fall below its keep probability."""
    threshold = draw_threshold(probability)
    return delta if threshold is None else torch.where(is_below(bits.reshape(delta.shape), threshold), delta, 0.0)


def drop_by_rank(delta: Tensor, bits: Tensor, density: float, epsilon: float) -> tuple[Tensor, Tensor | None]:
    """MAGPRUNE: the keep probability grows linearly with the rank of the magnitude in its row.

    Returns the masked tensor and, for each element, float32 of 1 / its keep probability (None where all are kept).
    """
    if density >= 1 or delta.numel() == 0:
        return delta, None
    ranks_RC = row_ranks(delta)
    probabilities_C = rank_probabilities(ranks_RC.shape[1], density, epsilon)
    thresholds_C = torch.from_numpy(thresholds_of(probabilities_C).view("int32")).to(delta.device)
    reciprocals_C = torch.from_numpy((1.0 / probabilities_C).astype("float32")).to(delta.device)
    is_kept = is_below(bits.reshape(ranks_RC.shape), thresholds_C[ranks_RC]).reshape(delta.shape)
    return torch.where(is_kept, delta, 0.0), reciprocals_C[ranks_RC].reshape(delta.shape)


def rescale(masked: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply what was kept by a factor for each element; None leaves it.

    Factors of whole tensors are numbers, and go into the coefficients.
    """
    return masked if factor is None else masked * factor


def l1_scale(delta: Tensor, masked: Tensor, norm_floor: float) -> float:
    """The factor that restores the tensor's L1 norm after a mask (mergekit's form; biased per element)."""
    before, after = (float(tensor.abs().sum(dtype=torch.float64)) for tensor in (delta, masked))
    return l1_factor(before, after, norm_floor)


def elect_signs(votes_K: Sequence[Tensor]) -> Tensor:
    """Whether the elected sign is plus: the sign of the sum of the votes, plus where it is zero."""
    total = votes_K[0]
    for vote in votes_K[1:]:
        total = total + vote
    return total >= 0


def agreeing(vote: Tensor, is_plus: Tensor) -> Tensor:
    """Whether a vote has the elected sign; a zero never has."""
    return torch.where(is_plus, vote > 0, vote < 0)


def disjoint_mean(
    weighted_K: Sequence[Tensor],
    agrees_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    normalize: bool,
    unit: float = 1.0,
) -> Tensor:
    """Sum of the agreeing entries, divided by the sum of their coefficients where `normalize` holds (0 -> `unit`)."""
    total = divisor = torch.zeros_like(weighted_K[0])
    for weighted, agrees, coefficient in zip(weighted_K, agrees_K, coefficients_K, strict=True):
        total = total + torch.where(agrees, weighted, 0.0)
        divisor = divisor + agrees.to(total.dtype) * coefficient
    if not normalize:
        return total
    return total / torch.where(divisor == 0, unit, divisor)
