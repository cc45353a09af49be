"""Stored bits as numbers, with NumPy alone: for measuring checkpoints, not for merging them.

Every dtype of the byte table is decoded exactly, 64-bit integers beyond 2^53 excepted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remelt.dtypes import DTYPES


def _e4m3_values() -> NDArray[np.float32]:
    """The 256 values of float8_e4m3fn: bias 7, no infinities, S.1111.111 is NaN (https://arxiv.org/abs/2209.05433)."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    subnormal = np.ldexp(mantissa / 8.0, -6)
    values = np.where(exponent == 0, subnormal, normal)
    values[(codes & 127) == 127] = np.nan
    return np.where(codes >> 7 == 1, -values, values).astype(np.float32)


E4M3_VALUES = _e4m3_values()


def decode(bits: NDArray[np.generic], dtype: str) -> NDArray[Any]:
    """The numbers that `bits` (any shape, C-contiguous in the last dimension) stand for, in that shape.

    Args:
        bits: stored bits as `stored_bits.as_stored` gives them.
        dtype: safetensors' name.

    Returns:
        float64 for F64 and 64-bit integers, else float32 or a dtype that float64 arithmetic takes exactly.
    """
    match dtype:
        case "F64" | "F32":
            return bits
        case "BF16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "F16":
            return bits.view(np.float16).astype(np.float32)
        case "F8_E4M3":
            return E4M3_VALUES[bits.astype(np.intp)]
        case "F8_E5M2":
            return (bits.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
        case "F8_E8M0":
            exponents = bits.astype(np.int32) - 127
            return np.where(exponents == 128, np.nan, np.ldexp(1.0, exponents))
    if dtype == "BOOL":
        return bits.astype(np.float64)
    signed = np.dtype(f"{'i' if dtype.startswith('I') else 'u'}{DTYPES[dtype].item_bits // 8}")
    return bits.view(signed).astype(np.float64)
