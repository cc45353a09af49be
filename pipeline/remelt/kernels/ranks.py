"""Row ranks by magnitude: a radix sort that looks only at the bits in which the row's magnitudes differ.

Magnitudes of one row share their sign, most of their exponent, and, for differences of 16-bit numbers, a tail of zero
bits. Shifted and counted from the smallest that is not zero, 20 bits or fewer are usually left: two passes of at most
11 bits; a row whose range fits one digit needs no sort, since counting alone gives stable ranks.
"""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import bits_of
from remelt.kernels.compile import compiled

DIGIT_BITS = 11
MAX_DIGITS = 3
MAGNITUDE = 0x7FFFFFFF


@compiled
def compact_keys(values, size, keys):  # type: ignore[no-untyped-def]
    """Order-preserving integers of the magnitudes, without shared and unused bits; returns how many bits they take."""
    smallest = np.uint32(0xFFFFFFFF)
    largest = np.uint32(0)
    used = np.uint32(0)
    for j in range(size):
        key = np.uint32(bits_of(values[j]) & np.uint32(MAGNITUDE))
        keys[j] = key
        largest = max(largest, key)
        used = np.uint32(used | key)
        nonzero = key if key != np.uint32(0) else np.uint32(0xFFFFFFFF)
        smallest = min(smallest, nonzero)
    if largest == 0:
        return 0
    shift = np.uint32(0)
    while np.uint32(np.uint32(used >> shift) & np.uint32(1)) == np.uint32(0):
        shift = np.uint32(shift + np.uint32(1))
    # Zero, which untouched elements have, is 0; the smallest magnitude above it is 1.
    low = np.uint32(np.uint32(smallest >> shift) - np.uint32(1))
    for j in range(size):
        key = np.uint32(keys[j] >> shift)
        keys[j] = np.uint32(key - low) if key != np.uint32(0) else np.uint32(0)
    span = np.uint32(np.uint32(largest >> shift) - low)
    bits = 0
    while span:
        bits += 1
        span = np.uint32(span >> np.uint32(1))
    return bits


@compiled
def ranks_of(values, size, descending, keys, work, counts, ranks):  # type: ignore[no-untyped-def]
    """Stable ranks of the magnitudes of a row, from 0, into `ranks` (uint32).

    `keys` is uint32 (size,); `work` uint32 (3, size); `counts` uint32 (MAX_DIGITS, 2 ** DIGIT_BITS).
    """
    bits = compact_keys(values, size, keys)
    if bits == 0:
        for j in range(size):
            ranks[j] = j
        return
    if descending:
        top = np.uint32((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
        for j in range(size):
            keys[j] = np.uint32(top - keys[j])
    num_digits = (bits + DIGIT_BITS - 1) // DIGIT_BITS
    width = np.uint32((bits + num_digits - 1) // num_digits)
    mask = np.uint32((1 << width) - 1)
    for digit in range(num_digits):
        count = counts[digit][: 1 << width]
        count[:] = 0
        down = np.uint32(np.uint32(digit) * width)
        for j in range(size):
            count[np.uint32(np.uint32(keys[j] >> down) & mask)] += np.uint32(1)
        total = np.uint32(0)
        for place in range(1 << width):
            here = count[place]
            count[place] = total
            total = np.uint32(total + here)
    if num_digits == 1:
        count = counts[0]
        for j in range(size):
            place = np.uint32(keys[j] & mask)
            ranks[j] = count[place]
            count[place] += np.uint32(1)
        return
    count = counts[0]
    order, rest = work[0], work[1]
    for j in range(size):
        place = np.uint32(keys[j] & mask)
        to = count[place]
        count[place] += np.uint32(1)
        order[to] = np.uint32(j)
        rest[to] = np.uint32(keys[j] >> width)
    if num_digits == 3:
        # The middle digit, from (order, rest) into (work[2], keys), which is free by now.
        count = counts[1]
        order_next, rest_next = work[2], keys
        for j in range(size):
            place = np.uint32(rest[j] & mask)
            to = count[place]
            count[place] += np.uint32(1)
            order_next[to] = order[j]
            rest_next[to] = np.uint32(rest[j] >> width)
        order, rest = order_next, rest_next
    count = counts[num_digits - 1]
    for j in range(size):
        place = np.uint32(rest[j] & mask)
        ranks[order[j]] = count[place]
        count[place] += np.uint32(1)
