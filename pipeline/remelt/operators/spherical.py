"""Operators whose coefficients come from inner products: the Gram matrix first, a weighted sum after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from remelt.operators.lazy_torch import torch
from remelt.operators.quantities import (
    float32,
    nuslerp_coefficients,
    nuslerp_t,
    slerp_coefficients,
    stock_ratio,
)
from remelt.operators.spec import Interval
from remelt.operators.steps import as_rows, gram, task_vectors, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def slerp(
    base: Tensor | None,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float] = (),
    *,
    t: Annotated[float, Interval(0, 1)] = 0.5,
) -> Tensor:
    """Spherical interpolation of two whole tensors.

    out = (sin((1-t) omega) x_0 + sin(t omega) x_1) / sin(omega), omega the angle between the two as flat vectors;
    (1-t) x_0 + t x_1 where |cos omega| > 0.9995.

    Args:
        base: not used; a recipe's base is the model at t = 0.
        tensors_K: two tensors of one shape, at t = 0 and t = 1.
        coefficients_K: not used.
        t: place between the two, in [0, 1].

    Returns:
        float32 tensor of the same shape.

    References:
        Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; White 2016, arXiv 1609.04468.

    Differences:
        Inner products in float64 (mergekit: float32). As there, the angle is that of the unit vectors, the combination
        that of the raw ones, and a tensor whose norm is at most 1e-8 is not normalised.
    """
    coefficients = slerp_coefficients(gram([tensor.float() for tensor in tensors_K]).numpy(force=True), t)
    return weighted_sum(tensors_K, coefficients)


def nuslerp(
    base: Tensor | None,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float],
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Spherical interpolation of two tensors, or of two task vectors, by weights.

    As slerp with t = w_1 / (w_0 + w_1), one half where the sum is below 1e-6; linear only where |sin omega| <= 1e-8.
    With a base, of x_i - base, and the base is added.

    Args:
        base: optional ancestor.
        tensors_K: two tensors of one shape.
        coefficients_K: two weights.
        nuslerp_flatten: one angle for the whole tensor; otherwise one for each vector along the last dimension.
        nuslerp_row_wise: without `nuslerp_flatten`, one for each vector across the rows instead (mergekit's meaning of
            the key). A tensor of one row is always one vector.

    Returns:
        float32 tensor of the same shape.

    References:
        Goddard et al. 2024, arXiv 2403.13257 (mergekit, which introduced the method; there is no paper of its own).

    Differences:
        Inner products in float64; a tensor of three dimensions and more is taken as rows of its last dimension.
    """
    bases_RC = None if base is None else as_rows(base).float()
    vectors_KRC = [as_rows(tensor).float() for tensor in tensors_K]
    if bases_RC is not None:
        vectors_KRC = task_vectors(bases_RC, vectors_KRC)
    dim = None if nuslerp_flatten or vectors_KRC[0].shape[0] == 1 else 0 if nuslerp_row_wise else 1
    pairs = torch.from_numpy(
        nuslerp_coefficients(gram(vectors_KRC, dim).numpy(force=True), nuslerp_t(coefficients_K))
    ).to(vectors_KRC[0].device)
    if dim is not None:
        pairs = pairs.unsqueeze(dim)
    merged_RC = vectors_KRC[0] * pairs[..., 0] + vectors_KRC[1] * pairs[..., 1]
    if bases_RC is not None:
        merged_RC = bases_RC + merged_RC
    return merged_RC.reshape(tensors_K[0].shape)


def model_stock(
    base: Tensor,
    tensors_K: Sequence[Tensor],
    coefficients_K: Sequence[float] = (),
    *,
    filter_wise: bool = False,
    clamp: bool = False,
    norm_floor: Annotated[float, Interval(0, 1)] = 0.0,
) -> Tensor:
    """Interpolate between the base and the mean of the models by the angle between their task vectors.

    out = t mean_i(x_i) + (1-t) base, t = N c / (1 + (N-1) c), c the mean cosine over all pairs of task vectors.

    Args:
        base: the common ancestor.
        tensors_K: N >= 2 tensors of the base's shape.
        coefficients_K: not used.
        filter_wise: one angle for each row instead of one for the tensor.
        clamp: keep t within [0, 1]; otherwise task vectors that point apart extrapolate away from the models.
        norm_floor: lower bound of the product of two norms (mergekit: 1e-6, which pulls the cosine of barely trained
            tensors to 0).

    Returns:
        float32 tensor of the same shape; the base where all task vectors are zero.

    Raises:
        OperatorError: 1 + (N-1) c is below 1e-6.

    References:
        Jang et al. 2024, arXiv 2403.19522, eq. 3 for N = 2 and its generalisation in appendix B.

    Differences:
        One angle for each tensor (as mergekit) where the paper groups a layer's; no official code exists.
    """
    count = len(tensors_K)
    base_RC = as_rows(base).float()
    deltas_KRC = task_vectors(base_RC, [as_rows(tensor) for tensor in tensors_K])
    grams = gram(deltas_KRC, 1 if filter_wise else None).numpy(force=True)
    ratio = stock_ratio(grams, clamp=clamp, norm_floor=norm_floor)
    total_RC = weighted_sum(deltas_KRC, (1.0,) * count)
    if filter_wise:
        scale = torch.from_numpy((ratio / count).astype("float32")).to(total_RC.device)[:, None]
        merged_RC = base_RC + total_RC * scale
    else:
        merged_RC = base_RC + weighted_sum(deltas_KRC, (float32(float(ratio) / count),) * count)
    return merged_RC.reshape(base.shape)
