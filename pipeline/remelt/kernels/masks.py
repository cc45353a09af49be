"""Kernels that draw bits and drop: the counter-based generator of `remelt.draws`, and DARE's mask."""

from __future__ import annotations

import numpy as np

from remelt.draws import MIX_MULTIPLIER_1, MIX_MULTIPLIER_2, MIX_SHIFT_1, MIX_SHIFT_2, MIX_SHIFT_3
from remelt.kernels.codec import float_of
from remelt.kernels.compile import part

M1, M2 = np.uint32(MIX_MULTIPLIER_1), np.uint32(MIX_MULTIPLIER_2)
S1, S2, S3 = np.uint32(MIX_SHIFT_1), np.uint32(MIX_SHIFT_2), np.uint32(MIX_SHIFT_3)
SPAN = 1 << 32
"""Flat indexes that share one pair of keys."""


@part
def mix(x):
    """The 32-bit finaliser of `remelt.draws`."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> S1)) * M1)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> S2)) * M2)
    return np.uint32(x ^ np.uint32(x >> S3))


@part
def draw(low, k0, k1):
    """32 bits for the element whose index has these lower 32 bits, under a pair of keys."""
    return mix(np.uint32(mix(np.uint32(low ^ k0)) + k1))


@part
def draw_run(keys, first, size, out):
    """Bits of flat indexes [first, first + size) of one model; `keys` is (spans of 2^32, 2)."""
    done = 0
    while done < size:
        index, num = first + done, min(size - done, SPAN - ((first + done) & (SPAN - 1)))
        k0, k1 = keys[index >> 32, 0], keys[index >> 32, 1]
        piece = out[done : done + num]
        low = np.uint32(index & (SPAN - 1))  # counts in 32 bits, beside j, to be one vector of 32-bit numbers
        for j in range(num):
            piece[j] = draw(low, k0, k1)
            low = np.uint32(low + np.uint32(1))
        done += num


@part
def drop_chunk(values, size, keys, first, threshold):
    """DARE: zero what is drawn out."""
    done = 0
    while done < size:
        index, num = first + done, min(size - done, SPAN - ((first + done) & (SPAN - 1)))
        k0, k1 = keys[index >> 32, 0], keys[index >> 32, 1]
        piece = values[done : done + num]
        low = np.uint32(index & (SPAN - 1))
        for j in range(num):
            piece[j] = piece[j] if draw(low, k0, k1) < threshold else np.float32(0.0)
            low = np.uint32(low + np.uint32(1))
        done += num


@part
def drop_ranked(values, chances, size, keys, first):
    """DELLA: zero what is drawn out under its own threshold, multiply the rest by its own factor.

    `chances` (uint64) holds an element's threshold in the lower 32 bits, the bits of its float32 factor in the upper.
    """
    done = 0
    while done < size:
        index, num = first + done, min(size - done, SPAN - ((first + done) & (SPAN - 1)))
        k0, k1 = keys[index >> 32, 0], keys[index >> 32, 1]
        piece, odds = values[done : done + num], chances[done : done + num]
        low = np.uint32(index & (SPAN - 1))
        for j in range(num):
            chance = odds[j]
            scaled = piece[j] * float_of(np.uint32(chance >> np.uint64(32)))
            piece[j] = scaled if draw(low, k0, k1) < np.uint32(chance) else np.float32(0.0)
            low = np.uint32(low + np.uint32(1))
        done += num
