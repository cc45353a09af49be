"""Kernels that draw bits and drop: the counter-based generator of `remelt.draws`, and DARE's mask."""

from __future__ import annotations

import numpy as np

from remelt.draws import MIX_MULTIPLIER_1, MIX_MULTIPLIER_2, MIX_SHIFT_1, MIX_SHIFT_2, MIX_SHIFT_3
from remelt.kernels.compile import part

M1, M2 = np.uint32(MIX_MULTIPLIER_1), np.uint32(MIX_MULTIPLIER_2)
S1, S2, S3 = np.uint32(MIX_SHIFT_1), np.uint32(MIX_SHIFT_2), np.uint32(MIX_SHIFT_3)
SPAN = 1 << 32
"""Flat indexes that share one pair of keys."""


@part
def mix(x):  # type: ignore[no-untyped-def]
    """The 32-bit finaliser of `remelt.draws`."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> S1)) * M1)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> S2)) * M2)
    return np.uint32(x ^ np.uint32(x >> S3))


@part
def draw(low, k0, k1):  # type: ignore[no-untyped-def]
    """32 bits for the element whose index has these lower 32 bits, under a pair of keys."""
    return mix(np.uint32(mix(np.uint32(low ^ k0)) + k1))


@part
def draw_run(keys, first, size, out):  # type: ignore[no-untyped-def]
    """Bits of flat indexes [first, first + size) of one model; `keys` is (spans of 2^32, 2)."""
    done = 0
    while done < size:
        index = first + done
        low = index & (SPAN - 1)
        num = min(size - done, SPAN - low)
        k0, k1 = keys[index >> 32, 0], keys[index >> 32, 1]
        piece = out[done : done + num]
        for j in range(num):
            piece[j] = draw(np.uint32(low + j), k0, k1)
        done += num


@part
def drop_chunk(values, size, keys, first, threshold):  # type: ignore[no-untyped-def]
    """DARE: zero what is drawn out."""
    done = 0
    while done < size:
        index = first + done
        low = np.uint32(index & (SPAN - 1))
        num = min(size - done, SPAN - (index & (SPAN - 1)))
        k0, k1 = keys[index >> 32, 0], keys[index >> 32, 1]
        piece = values[done : done + num]
        for j in range(num):
            bits = draw(np.uint32(low + np.uint32(j)), k0, k1)
            piece[j] = piece[j] if bits < threshold else np.float32(0.0)
        done += num


@part
def drop_by_rank(values, ranks, size, keys, first, thresholds, factors, bits, limits, scales):  # type: ignore[no-untyped-def]
    """DELLA: zero what is drawn out under the threshold of its rank, multiply the rest by the factor of its rank.

    `bits`, `limits` (uint32) and `scales` (float32) are scratch of at least `size`: look-ups and comparisons are loops of
    their own because a look-up inside the conditional would become a branch that is mispredicted half of the time.
    """
    draw_run(keys, first, size, bits)
    for j in range(size):
        rank = ranks[j]
        limits[j] = thresholds[rank]
        scales[j] = factors[rank]
    for j in range(size):
        scales[j] = values[j] * scales[j]
    for j in range(size):
        values[j] = scales[j] if bits[j] < limits[j] else np.float32(0.0)
