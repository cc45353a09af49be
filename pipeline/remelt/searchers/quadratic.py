"""A quadratic fitted to scores by least squares, and how far it can be trusted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Shapes: N trials, V free variables, F features (1 + V + V (V + 1) / 2), M objectives.


class Quadratic(NamedTuple):
    """One quadratic for each objective."""

    coefficients_FM: NDArray[np.float64]
    errors: tuple[FitError, ...]
    """Of each objective."""

    def predict(self, variables_NV: NDArray[np.float64]) -> NDArray[np.float64]:
        """Predicted objectives, (N, M)."""
        predicted: NDArray[np.float64] = features(variables_NV) @ self.coefficients_FM
        return predicted


class FitError(NamedTuple):
    """How well one quadratic fits."""

    observations: int
    coefficients: int
    """Rank of the design: how many of the quadratic's coefficients the observations determine."""
    r_squared: float
    """Part of the variance that the fit explains, on what it was fitted to."""
    residual: float
    """Root mean square of the residuals, in units of the objective."""
    left_out: float | None
    """Root mean square of the errors at trials left out of the fit, one by one; None where some leave it undetermined.

    This is the honest one of the three: a quadratic with as many coefficients as observations has no residuals.
    """


def num_coefficients(num_variables: int) -> int:
    """Constant, linear and quadratic terms: (V + 1) (V + 2) / 2."""
    return (num_variables + 1) * (num_variables + 2) // 2


def features(variables_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    """The terms of a quadratic, (N, F): one, the variables, and their products in pairs, squares included."""
    rows, columns = np.triu_indices(variables_NV.shape[1])
    products_NP = variables_NV[:, rows] * variables_NV[:, columns]
    return np.hstack([np.ones((len(variables_NV), 1)), variables_NV, products_NP])


def fit_quadratic(variables_NV: NDArray[np.float64], objectives_NM: NDArray[np.float64]) -> Quadratic:
    """Least squares; where the observations determine too little, the solution of smallest norm.

    Args:
        variables_NV: In units of about 1.
        objectives_NM: Finite.
    """
    design_NF = features(variables_NV)
    # One decomposition serves the solution, the rank, and the leverages that the left-out errors need.
    left_NR, singular, right_RF = np.linalg.svd(design_NF, full_matrices=False)
    rank = int((singular > singular[0] * max(design_NF.shape) * np.finfo(np.float64).eps).sum())
    left_NR, singular, right_RF = left_NR[:, :rank], singular[:rank], right_RF[:rank]
    coefficients_FM = right_RF.T @ ((left_NR.T @ objectives_NM) / singular[:, None])
    residuals_NM = objectives_NM - design_NF @ coefficients_FM
    free_N = 1 - (left_NR**2).sum(axis=1)
    is_determined = bool((free_N > 1e-9).all())
    errors = []
    for m in range(objectives_NM.shape[1]):
        residual_N = residuals_NM[:, m]
        variance = float(np.mean((objectives_NM[:, m] - objectives_NM[:, m].mean()) ** 2))
        square = float(np.mean(residual_N**2))
        left_out = float(np.sqrt(np.mean((residual_N / free_N) ** 2))) if is_determined else None
        r_squared = 1 - square / variance if variance > 0 else 1.0
        errors.append(FitError(len(design_NF), rank, r_squared, float(np.sqrt(square)), left_out))
    return Quadratic(coefficients_FM, tuple(errors))
