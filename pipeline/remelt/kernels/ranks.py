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
MAGNITUDE = 0x7FFFFFFF
SWAPS = 2
"""Expected insertion steps for each element above which the radix sort is quicker."""


@part
def magnitude_keys(values, size, keys):
    """Bits of the magnitudes; returns the largest."""
    largest = np.uint32(0)
    for j in range(size):
        key = np.uint32(bits_of(values[j]) & np.uint32(MAGNITUDE))
        keys[j] = key
        largest = max(largest, key)
    return largest


@part
def upper_digits(keys, size, shift, floor, digits):
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
def deal_by_rank(values, size, descending, by_rank, keys, work, counts, out):
    """out[j] = by_rank[stable rank of |values[j]| in the row], ranks from 0; all uint64.

    `keys` is uint32 (size,); `work` uint64 (2, size); `counts` uint32 (2 ** DIGIT_BITS,).
    """
    largest = magnitude_keys(values, size, keys)
    shift = np.uint32(16) if size <= 4096 else np.uint32(15)
    num_bins = 1024 if size <= 4096 else 2048
    top = np.uint32(largest >> shift)
    floor = np.uint32(top - np.uint32(num_bins - 3)) if top > np.uint32(num_bins - 3) else np.uint32(0)
    digits = work[0].view(np.uint32)
    unsure = upper_digits(keys, size, shift, floor, digits)
    if descending:
        last = np.uint32(num_bins - 1)
        for j in range(size):
            digits[j] = np.uint32(last - digits[j])
            keys[j] = np.uint32(np.uint32(MAGNITUDE) - keys[j])
    count = counts[:num_bins]
    count[:] = 0
    for j in range(size):
        count[digits[j]] += np.uint32(1)
    crowding = 0.0
    if unsure:
        for place in range(num_bins):
            crowding += np.float64(count[place]) * np.float64(count[place])
    if crowding * unsure > 2.0 * SWAPS * np.float64(size) * np.float64(size):
        radix_deal(values, size, descending, by_rank, keys, work, counts, out)
        return
    total = np.uint32(0)
    for place in range(num_bins):
        here = count[place]
        count[place] = total
        total = np.uint32(total + here)
    if unsure == np.uint32(0):
        for j in range(size):
            digit = digits[j]
            out[j] = by_rank[count[digit]]
            count[digit] += np.uint32(1)
        return
    # Magnitude above index in one number: to compare them is to sort stably.
    ordered = work[1]
    for j in range(size):
        digit = digits[j]
        to = count[digit]
        count[digit] += np.uint32(1)
        ordered[to] = np.uint64(np.uint64(keys[j]) << np.uint64(32)) | np.uint64(j)
    before = ordered[0]
    for place in range(1, size):
        entry = ordered[place]
        if entry < before:
            to = place
            while to > 0 and entry < ordered[to - 1]:
                ordered[to] = ordered[to - 1]
                to -= 1
            ordered[to] = entry
        else:
            before = entry
    for place in range(size):
        out[np.uint32(ordered[place])] = by_rank[place]


@part
def compact_keys(values, size, keys):
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
    if largest == np.uint32(0):
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
def radix_deal(values, size, descending, by_rank, keys, work, counts, out):
    """As `deal_by_rank`, by a least significant digit radix sort over the bits that differ."""
    bits = compact_keys(values, size, keys)
    top = np.uint32((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
    entries, entries_next = work[0], work[1]
    for j in range(size):
        key = np.uint32(top - keys[j]) if descending else keys[j]
        entries[j] = np.uint64(np.uint64(key) << np.uint64(32)) | np.uint64(j)
    num_digits = (bits + DIGIT_BITS - 1) // DIGIT_BITS
    mask = np.uint64((1 << DIGIT_BITS) - 1)
    for digit in range(num_digits):
        down = np.uint64(32 + digit * DIGIT_BITS)
        counts[:] = 0
        for j in range(size):
            counts[np.uint64(entries[j] >> down) & mask] += np.uint32(1)
        total = np.uint32(0)
        for place in range(len(counts)):
            here = counts[place]
            counts[place] = total
            total = np.uint32(total + here)
        for j in range(size):
            entry = entries[j]
            place = np.uint64(entry >> down) & mask
            entries_next[counts[place]] = entry
            counts[place] += np.uint32(1)
        entries, entries_next = entries_next, entries
    for place in range(size):
        out[np.uint32(entries[place])] = by_rank[place]
