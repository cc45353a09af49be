"""Bytes as kernels take them: floats of 32 bits and more as such, all else as unsigned integers of their width."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remelt.dtypes import DTYPES

_KINDS = {
    name: np.dtype({"F64": "f8", "F32": "f4"}.get(name, f"u{max(1, dtype.item_bits // 8)}"))
    for name, dtype in DTYPES.items()
}


def as_stored(data: NDArray[np.uint8], dtype: str) -> NDArray[np.generic]:
    """View contiguous bytes as the stored bits of `dtype` (safetensors' name), without a copy."""
    return data.view(_KINDS[dtype])
