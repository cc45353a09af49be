"""The one source of randomness: 32 bits for each (seed, stream, tensor name, flat index).

A counter-based generator, so that a mask depends on neither worker count, visiting order nor split. A 64-bit hash of
(seed, stream, name, index >> 32) gives two 32-bit keys k0, k1; then x = mix(low32(index) ^ k0); x = mix(x + k1), with a
two-multiply 32-bit finaliser as `mix`. One round with an added key would give shifted copies of one mask. An element is
kept iff x < floor(p * 2^32).
"""

from __future__ import annotations

import math

import numpy as np
import xxhash
from numpy.typing import NDArray

# The finaliser "lowbias32" by Chris Wellons (public domain): two multiplies, three xor-shifts, low avalanche bias.
MIX_MULTIPLIER_1 = 0x7FEB352D
MIX_MULTIPLIER_2 = 0x846CA68B
MIX_SHIFT_1, MIX_SHIFT_2, MIX_SHIFT_3 = 16, 15, 16


def draw_keys(seed: int, stream: int, name: str, high: int) -> tuple[int, int]:
    """The two 32-bit keys for the elements of a tensor whose flat index has `high` as its upper 32 bits."""
    digest = xxhash.xxh3_64_intdigest(f"{seed}\x00{stream}\x00{name}\x00{high}".encode())
    return digest & 0xFFFFFFFF, digest >> 32


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(MIX_SHIFT_1))) * np.uint32(MIX_MULTIPLIER_1)
    x = (x ^ (x >> np.uint32(MIX_SHIFT_2))) * np.uint32(MIX_MULTIPLIER_2)
    return x ^ (x >> np.uint32(MIX_SHIFT_3))


def draw_bits(seed: int, stream: int, name: str, start: int, count: int) -> NDArray[np.uint32]:
    """Draw 32 bits for each flat index in [start, start + count) of a tensor; shape (count,).

    The NumPy form, which is the definition; the CPU kernels and the torch form give the same bits.
    """
    pieces = []
    while count:
        high, low = start >> 32, start & 0xFFFFFFFF
        num = min(count, (1 << 32) - low)
        k0, k1 = draw_keys(seed, stream, name, high)
        index = np.arange(low, low + num, dtype=np.uint64).astype(np.uint32)
        pieces.append(_mix(_mix(index ^ np.uint32(k0)) + np.uint32(k1)))
        start, count = start + num, count - num
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)


def keep_threshold(probability: float) -> int:
    """floor(p * 2^32) for a keep probability in [0, 1]; an element is kept iff its bits are below it.

    p = 1 gives 2^32, which no 32-bit draw reaches: everything is kept. Callers compare in 64 bits or treat it apart.
    """
    return math.floor(probability * 4294967296.0)
