"""Sine and arc cosine from operations that IEEE 754 rounds exactly, so that they give the same bits on every CPU.

libm and NumPy choose among implementations by CPU features (with and without fused multiply-add), and their last bits
differ. Here are only sums, products, quotients and square roots of float64; errors stay within a few units of 2^-53.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_PI, _PI_REST = np.float64(3.141592653589793), np.float64(1.2246467991473532e-16)
# Taylor coefficients of sine, x^1, x^3, ..., enough for |x| <= pi / 2: the next term is below 2^-55.
_SINE = [1.0]
for _order in range(3, 25, 2):
    _SINE.append(-_SINE[-1] / (_order * (_order - 1)))
_HALVINGS = 3
_ARCTAN_TERMS = 18


def sine(x: ArrayLike) -> Array:
    """sin(x), elementwise; meant for a few turns at most: errors grow with the number of half turns taken off."""
    x = np.asarray(x, np.float64)
    half_turns = np.rint(x / _PI)
    is_odd = half_turns - 2.0 * np.floor(half_turns / 2.0) == 1.0
    x = (x - half_turns * _PI) - half_turns * _PI_REST
    x = np.where(is_odd, -x, x)
    square = x * x
    total = np.zeros_like(x)
    for coefficient in reversed(_SINE):
        total = total * square + coefficient
    return np.asarray(total * x, np.float64)


def _arctan(x: Array) -> Array:
    """atan(x) for x in [0, 1]: halve the angle three times, then the series x - x^3/3 + x^5/5 - ..."""
    for _ in range(_HALVINGS):
        x = x / (1.0 + np.sqrt(1.0 + x * x))
    square = x * x
    total = np.zeros_like(x)
    for term in reversed(range(_ARCTAN_TERMS)):
        total = (1.0 - 2.0 * (term % 2)) / (2 * term + 1) + square * total
    return np.asarray(total * x * 2.0**_HALVINGS, np.float64)


def arc_cosine(d: ArrayLike) -> Array:
    """acos(d) for d in [-1, 1], elementwise, in [0, pi]."""
    d = np.asarray(d, np.float64)
    # sin of the angle, from (1 - d)(1 + d): 1 - d^2 would lose the small angles.
    opposite = np.sqrt((1.0 - d) * (1.0 + d))
    adjacent = np.abs(d)
    is_steep = opposite > adjacent
    small = np.where(is_steep, adjacent, opposite)
    large = np.where(is_steep, opposite, adjacent)
    angle = _arctan(small / large)
    angle = np.where(is_steep, _PI / 2 - angle, angle)
    return np.asarray(np.where(d < 0, _PI - angle, angle), np.float64)
