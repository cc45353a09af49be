"""Exact selection by magnitude over a whole tensor, without sorting: histograms of float bits.

The bits of |x - base| as float32, read as integers, order as the magnitudes do. A first round counts their upper bits
(32,768 bins for each model and worker), which names the bin of the wanted rank. A second round gathers the lower bits
of that bin's few members, leaf by leaf; or, where they are many (a tensor of few distinct values), counts them in
65,536 bins, and a third round counts for each leaf the elements that tie at the threshold. From the ties before a leaf
follows how many of its own are kept: the lowest flat indexes win, whatever thread saw them first.
"""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import CHUNK, bits_of, decode
from remelt.kernels.compile import compiled, part
from remelt.kernels.footprint import TABLES
from remelt.kernels.weighted import read_chunk

NEVER = 0xFFFFFFFF
GROUP = 16
"""Elements that are looked at together before one is looked at alone."""


@part
def magnitude_bits(address, kind, base, start, size, values, bits):
    """Bits of |x - base| for a chunk."""
    read_chunk(address, kind, base, True, start, size, values)
    for j in range(size):
        bits[j] = np.uint32(bits_of(values[j]) & np.uint32(0x7FFFFFFF))


@compiled
def magnitudes(addresses, kinds, model, count, out):
    """Bits of one model's magnitudes for a block, into `out` (count,)."""
    base = np.empty(CHUNK, np.float32)
    values = np.empty(CHUNK, np.float32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        decode(addresses[0], kinds[0], start, size, base)
        magnitude_bits(addresses[model + 1], kinds[model + 1], base, start, size, values, out[start : start + size])


@compiled
def count_upper(addresses, kinds, is_wanted, count, histograms):
    """Add a block to `histograms` (K, UPPER_BINS * TABLES) of the upper 15 bits of each wanted model's magnitudes."""
    base = np.empty(CHUNK, np.float32)
    values = np.empty(CHUNK, np.float32)
    places = np.empty(CHUNK, np.uint16)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        decode(addresses[0], kinds[0], start, size, base)
        for i in range(len(is_wanted)):
            if not is_wanted[i]:
                continue
            read_chunk(addresses[i + 1], kinds[i + 1], base, True, start, size, values)
            for j in range(size):
                places[j] = np.uint16(np.uint32(bits_of(values[j]) & np.uint32(0x7FFFFFFF)) >> np.uint32(16))
            table = histograms[i]
            whole = size - size % TABLES
            for j in range(0, whole, TABLES):
                table[np.uint32(places[j]) * np.uint32(TABLES)] += np.uint32(1)
                table[np.uint32(places[j + 1]) * np.uint32(TABLES) + np.uint32(1)] += np.uint32(1)
                table[np.uint32(places[j + 2]) * np.uint32(TABLES) + np.uint32(2)] += np.uint32(1)
                table[np.uint32(places[j + 3]) * np.uint32(TABLES) + np.uint32(3)] += np.uint32(1)
            for j in range(whole, size):
                table[np.uint32(places[j]) * np.uint32(TABLES)] += np.uint32(1)


@part
def holds_bin(bits, wanted):
    """Whether one of GROUP elements lies in the bin."""
    found = np.uint32(0)
    for j in range(GROUP):
        found = np.uint32(found | np.uint32(np.uint32(bits[j] >> np.uint32(16)) == wanted))
    return found != np.uint32(0)


@part
def append_members(bits, start, stop, wanted, found, place):
    """Append the lower bits of the bin's members, without a branch: written always, kept by moving on.

    `found` has one place to spare for each cut.
    """
    for j in range(start, stop):
        key = bits[j]
        found[place] = np.uint16(key & np.uint32(0xFFFF))
        place += np.int64(np.uint32(key >> np.uint32(16)) == wanted)
    return place


@compiled
def tally(members, histogram):
    """Count gathered lower bits into `histogram` (LOWER_BINS,)."""
    for j in range(len(members)):
        histogram[members[j]] += 1


@compiled
def tally_equal(members, leaf_counts, lower, out):
    """For each leaf of a block, how many of its gathered lower bits are `lower`, into `out` (leaves,)."""
    start = 0
    for leaf in range(len(leaf_counts)):
        stop = start + leaf_counts[leaf]
        ties = 0
        for j in range(start, stop):
            ties += np.int64(members[j] == lower)
        out[leaf] = ties
        start = stop


@compiled
def gather_lower(addresses, kinds, models, bins, leaf_elements, count, found, offsets, leaf_counts):
    """For each cut, append the lower 16 bits of its bin's members to `found[offsets[cut]:]`, in order of flat index.

    `models` and `bins` (cuts,) say where each cut lies, in ascending order of model; `leaf_counts` (cuts, leaves) is
    filled with how many each leaf had.
    """
    base = np.empty(CHUNK, np.float32)
    values = np.empty(CHUNK, np.float32)
    bits = np.empty(CHUNK, np.uint32)
    used = offsets.copy()
    for leaf in range(leaf_counts.shape[1]):
        stop = min(count, (leaf + 1) * leaf_elements)
        before = used.copy()
        for start in range(leaf * leaf_elements, stop, CHUNK):
            size = min(CHUNK, stop - start)
            decode(addresses[0], kinds[0], start, size, base)
            for cut in range(len(models)):
                i = models[cut] + 1
                if cut == 0 or models[cut] != models[cut - 1]:
                    magnitude_bits(addresses[i], kinds[i], base, start, size, values, bits)
                wanted = bins[cut]
                place = used[cut]
                whole = size - size % GROUP
                for group in range(0, whole, GROUP):
                    if holds_bin(bits[group : group + GROUP], wanted):
                        place = append_members(bits, group, group + GROUP, wanted, found, place)
                place = append_members(bits, whole, size, wanted, found, place)
                used[cut] = place
        for cut in range(len(models)):
            leaf_counts[cut, leaf] = used[cut] - before[cut]


@part
def tally_members(bits, size, wanted, table):
    """Count the lower bits of a bin's members among `size` magnitudes into `table` (LOWER_BINS,).

    The difference of two 16-bit floats has few significant bits, so that most lower bits are zero: those are counted
    with the vector units, without waiting again and again for the store to one counter.
    """
    first = np.uint32(np.uint32(wanted) << np.uint32(16))
    members = np.uint32(0)
    zeros = np.uint32(0)
    for j in range(size):
        members = np.uint32(members + np.uint32(np.uint32(bits[j] >> np.uint32(16)) == wanted))
        zeros = np.uint32(zeros + np.uint32(bits[j] == first))
    table[0] += np.uint64(zeros)
    if members == zeros:
        return
    whole = size - size % GROUP
    for group in range(0, whole, GROUP):
        others = np.uint32(0)
        for j in range(group, group + GROUP):
            is_member = np.uint32(np.uint32(bits[j] >> np.uint32(16)) == wanted)
            others = np.uint32(others | np.uint32(is_member & np.uint32(bits[j] != first)))
        if others != np.uint32(0):
            tally_others(bits, group, group + GROUP, wanted, first, table)
    tally_others(bits, whole, size, wanted, first, table)


@part
def tally_others(bits, start, stop, wanted, first, table):
    """Count lower bits that are not zero of the bin's members in [start, stop)."""
    for j in range(start, stop):
        if np.uint32(bits[j] >> np.uint32(16)) == wanted and bits[j] != first:
            table[np.uint32(bits[j] & np.uint32(0xFFFF))] += np.uint64(1)


@compiled
def count_lower(addresses, kinds, models, bins, count, histograms):
    """Add a block to `histograms` (cuts, LOWER_BINS) of the lower 16 bits of each cut's bin."""
    base = np.empty(CHUNK, np.float32)
    values = np.empty(CHUNK, np.float32)
    bits = np.empty(CHUNK, np.uint32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        decode(addresses[0], kinds[0], start, size, base)
        for cut in range(len(models)):
            i = models[cut] + 1
            if cut == 0 or models[cut] != models[cut - 1]:
                magnitude_bits(addresses[i], kinds[i], base, start, size, values, bits)
            tally_members(bits, size, bins[cut], histograms[cut])


@compiled
def count_ties(addresses, kinds, models, thresholds, leaf_elements, count, out):
    """For each leaf of a block and each cut, how many magnitudes equal the threshold, into `out` (leaves, cuts)."""
    base = np.empty(CHUNK, np.float32)
    values = np.empty(CHUNK, np.float32)
    bits = np.empty(CHUNK, np.uint32)
    for leaf in range(len(out)):
        stop = min(count, (leaf + 1) * leaf_elements)
        out[leaf] = 0
        for start in range(leaf * leaf_elements, stop, CHUNK):
            size = min(CHUNK, stop - start)
            decode(addresses[0], kinds[0], start, size, base)
            for cut in range(len(models)):
                i = models[cut] + 1
                if cut == 0 or models[cut] != models[cut - 1]:
                    magnitude_bits(addresses[i], kinds[i], base, start, size, values, bits)
                ties = np.uint32(0)
                for j in range(size):
                    ties = np.uint32(ties + np.uint32(1 if bits[j] == thresholds[cut] else 0))
                out[leaf, cut] += ties


@part
def keep_band(values, size, low, high, ties_low, ties_high):
    """Zero magnitudes outside [low, high) in place; returns how many ties are left to pass at either end.

    `ties_low` >= 0 says that only so many elements equal to `low` are still kept, the others not; `ties_high` >= 0 that
    only so many equal to `high` still count as above it. A negative number says that the comparison alone decides.
    """
    if ties_low < 0 and ties_high < 0:
        for j in range(size):
            key = np.uint32(bits_of(values[j]) & np.uint32(0x7FFFFFFF))
            values[j] = values[j] if (key >= low) & (key < high) else np.float32(0.0)
        return ties_low, ties_high
    for j in range(size):
        key = np.uint32(bits_of(values[j]) & np.uint32(0x7FFFFFFF))
        is_in = key >= low
        if ties_low >= 0 and key == low:
            is_in = ties_low > 0
            ties_low = max(0, ties_low - 1)
        is_out = key >= high
        if ties_high >= 0 and key == high:
            is_out = ties_high > 0
            ties_high = max(0, ties_high - 1)
        if not is_in or is_out:
            values[j] = np.float32(0.0)
    return ties_low, ties_high
