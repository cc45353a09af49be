"""Row ranks by magnitude: counting on the upper bits, then a look at who still stands in the wrong place.

Rows of differences of 16-bit numbers have few distinct magnitudes, and their upper 16 bits as float32 nearly always
tell them apart. So one stable counting sort on those bits leaves the row in order but for a few neighbours, which an
insertion sort mends. Where the bins would leave it much to do (long rows of float32, or magnitudes that crowd far below
the row's largest), a radix sort over all bits in which the magnitudes differ takes over.
"""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import bits_of
from remelt.kernels.compile import part

DIGIT_BITS = 11
MAX_DIGITS = 3
MAGNITUDE = 0x7FFFFFFF
SWAPS = 2
"""Expected insertion steps for each element above which the radix sort is quicker."""


@part
def magnitude_keys(values, size, keys):  # type: ignore[no-untyped-def]
    """Bits of the magnitudes; returns the largest."""
    largest = np.uint32(0)
    for j in range(size):
        key = np.uint32(bits_of(values[j]) & np.uint32(MAGNITUDE))
        keys[j] = key
        largest = max(largest, key)
    return largest


@part
def upper_digits(keys, size, shift, floor, digits):  # type: ignore[no-untyped-def]
    """Bin of each key: 0 for zero, 1 for upper bits below `floor`, then one for each value of the upper bits.

    Returns how many keys their bin does not determine.
    """
    unsure = np.uint32(0)
    low = np.uint32((np.uint32(1) << shift) - np.uint32(1))
    for j in range(size):
        key = keys[j]
        upper = np.uint32(key >> shift)
        digit = np.uint32(upper - floor + np.uint32(2)) if upper >= floor else np.uint32(1)
        digits[j] = digit if key != np.uint32(0) else np.uint32(0)
        is_unsure = (np.uint32(key & low) != np.uint32(0)) | ((upper < floor) & (key != np.uint32(0)))
        unsure = np.uint32(unsure + np.uint32(1 if is_unsure else 0))
    return unsure


@part
def ranks_of(values, size, descending, keys, work, counts, ranks):  # type: ignore[no-untyped-def]
    """Stable ranks of the magnitudes of a row, from 0, into `ranks` (uint32).

    `keys` is uint32 (size,); `work` uint32 (3, size); `counts` uint32 (MAX_DIGITS, 2 ** DIGIT_BITS).
    """
    largest = magnitude_keys(values, size, keys)
    shift = np.uint32(16) if size <= 4096 else np.uint32(15)
    num_bins = 1024 if size <= 4096 else 2048
    top = np.uint32(largest >> shift)
    floor = np.uint32(top - np.uint32(num_bins - 3)) if top > np.uint32(num_bins - 3) else np.uint32(0)
    digits = work[0]
    unsure = upper_digits(keys, size, shift, floor, digits)
    if descending:
        last = np.uint32(num_bins - 1)
        for j in range(size):
            digits[j] = np.uint32(last - digits[j])
            keys[j] = np.uint32(np.uint32(MAGNITUDE) - keys[j])
    count = counts[0][:num_bins]
    count[:] = 0
    for j in range(size):
        count[digits[j]] += np.uint32(1)
    crowding = 0.0
    if unsure:
        for place in range(num_bins):
            crowding += np.float64(count[place]) * np.float64(count[place])
    if crowding * unsure > 2.0 * SWAPS * np.float64(size) * np.float64(size):
        radix_ranks(values, size, descending, keys, work, counts, ranks)
        return
    total = np.uint32(0)
    for place in range(num_bins):
        here = count[place]
        count[place] = total
        total = np.uint32(total + here)
    if unsure == np.uint32(0):
        for j in range(size):
            place = digits[j]
            ranks[j] = count[place]
            count[place] += np.uint32(1)
        return
    order, ordered = work[1], work[2]
    for j in range(size):
        place = digits[j]
        to = count[place]
        count[place] += np.uint32(1)
        order[to] = np.uint32(j)
        ordered[to] = keys[j]
    for place in range(1, size):
        key = ordered[place]
        if key < ordered[place - 1]:
            element = order[place]
            to = place
            while to > 0 and key < ordered[to - 1]:
                ordered[to] = ordered[to - 1]
                order[to] = order[to - 1]
                to -= 1
            ordered[to] = key
            order[to] = element
    for place in range(size):
        ranks[order[place]] = np.uint32(place)


@part
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
        smallest = min(smallest, key if key != np.uint32(0) else np.uint32(0xFFFFFFFF))
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


@part
def radix_ranks(values, size, descending, keys, work, counts, ranks):  # type: ignore[no-untyped-def]
    """As `ranks_of`, by a least significant digit radix sort over the bits that differ."""
    bits = compact_keys(values, size, keys)
    if bits == 0:
        for j in range(size):
            ranks[j] = np.uint32(j)
        return
    if descending:
        top = np.uint32((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
        for j in range(size):
            keys[j] = np.uint32(top - keys[j])
    num_digits = (bits + DIGIT_BITS - 1) // DIGIT_BITS
    width = np.uint32((bits + num_digits - 1) // num_digits)
    mask = np.uint32((np.uint32(1) << width) - np.uint32(1))
    order, rest = work[0], work[1]
    order_next, rest_next = work[2], ranks
    for j in range(size):
        order[j] = np.uint32(j)
        rest[j] = keys[j]
    for digit in range(num_digits):
        count = counts[digit]
        count[:] = 0
        for j in range(size):
            count[np.uint32(rest[j] & mask)] += np.uint32(1)
        total = np.uint32(0)
        for place in range(len(count)):
            here = count[place]
            count[place] = total
            total = np.uint32(total + here)
        for j in range(size):
            place = np.uint32(rest[j] & mask)
            to = count[place]
            count[place] += np.uint32(1)
            order_next[to] = order[j]
            rest_next[to] = np.uint32(rest[j] >> width)
        order, order_next = order_next, order
        rest, rest_next = rest_next, rest
    for place in range(size):
        keys[order[place]] = np.uint32(place)
    for j in range(size):
        ranks[j] = keys[j]
