"""Kernels for the weighted sum of K aligned blocks, and for their K x K Gram matrix.

More than half of the operators are these two. The float32 products and sums of the first are single IEEE operations in
the order of the models. The second sums float64 products, exact for float32 factors, leaf by leaf: within a leaf in
`LANES` interleaved partial sums that are then added in order, so that the result depends on the leaf alone.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from remelt.kernels.codec import BF16, CHUNK, decode, encode, float_of, uint16_pointer
from remelt.kernels.compile import compiled, part
from remelt.kernels.products import LANES, add_products

WIDE_CHUNK = 512
"""Elements of a chunk whose models are all held as float64."""


@part
def read_chunk(address, kind, base, has_base, start, count, out):
    """Decode a chunk of one model, minus the decoded base where there is one."""
    if has_base and kind == BF16:  # the common case, in one loop
        halves = carray(uint16_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            out[j] = float_of(np.uint32(np.uint32(halves[j]) << np.uint32(16))) - base[j]
        return
    decode(address, kind, start, count, out)
    if has_base:
        for j in range(count):
            out[j] = out[j] - base[j]


@part
def halves_at(address, start, count):
    """Elements [start, start + count) of the 16-bit array at `address`."""
    return carray(uint16_pointer(np.uint64(address)), start + count)[start:]


@part
def widened(half):
    """A bfloat16 as float32."""
    return float_of(np.uint32(np.uint32(half) << np.uint32(16)))


@part
def add_four(a, b, c, d, factors, base, has_base, size, is_first, total):
    """Add four bfloat16 models to a chunk's sum in one loop, in the order of `add_chunk` and so with its bits.

    All four are read at once, which asks the memory for more than one after the other would, and the sum stays in a
    register between them: half the time of four calls.
    """
    p, q, r, s = factors[0], factors[1], factors[2], factors[3]
    if has_base and is_first:
        for j in range(size):
            x = (widened(a[j]) - base[j]) * p + (widened(b[j]) - base[j]) * q
            total[j] = (x + (widened(c[j]) - base[j]) * r) + (widened(d[j]) - base[j]) * s
    elif has_base:
        for j in range(size):
            x = (total[j] + (widened(a[j]) - base[j]) * p) + (widened(b[j]) - base[j]) * q
            total[j] = (x + (widened(c[j]) - base[j]) * r) + (widened(d[j]) - base[j]) * s
    elif is_first:
        for j in range(size):
            x = widened(a[j]) * p + widened(b[j]) * q
            total[j] = (x + widened(c[j]) * r) + widened(d[j]) * s
    else:
        for j in range(size):
            x = (total[j] + widened(a[j]) * p) + widened(b[j]) * q
            total[j] = (x + widened(c[j]) * r) + widened(d[j]) * s


@part
def add_chunk(values, c, size, is_first, total):
    """Add c times one model to a chunk's sum."""
    if is_first:
        for j in range(size):
            total[j] = values[j] * c
    else:
        for j in range(size):
            total[j] = total[j] + values[j] * c


@part
def num_in_fours(kinds):
    """How many models, from the first on, can be added four at a time."""
    count = 0
    while count + 4 < len(kinds) and (kinds[count + 1 : count + 5] == BF16).all():
        count += 4
    return count


@compiled
def weighted_sum(addresses, kinds, coefficients, has_base, out_address, out_kind, count):
    """out = sum_i c_i x_i, or base + sum_i c_i (x_i - base); `addresses[0]` is the base's, there or not."""
    base = np.empty(CHUNK, np.float32)
    values = np.empty(CHUNK, np.float32)
    total = np.empty(CHUNK, np.float32)
    in_fours = num_in_fours(kinds)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        if has_base:
            decode(addresses[0], kinds[0], start, size, base)
        for i in range(0, in_fours, 4):
            add_four(
                halves_at(addresses[i + 1], start, size),
                halves_at(addresses[i + 2], start, size),
                halves_at(addresses[i + 3], start, size),
                halves_at(addresses[i + 4], start, size),
                coefficients[i : i + 4],
                base,
                has_base,
                size,
                i == 0,
                total,
            )
        for i in range(in_fours, len(addresses) - 1):
            read_chunk(addresses[i + 1], kinds[i + 1], base, has_base, start, size, values)
            add_chunk(values, coefficients[i], size, i == 0, total)
        if has_base:
            for j in range(size):
                total[j] = base[j] + total[j]
        encode(total, out_address, out_kind, start, size)


@compiled
def gram_of_leaves(addresses, kinds, has_base, leaf_elements, count, out):
    """Inner products of every pair i <= j of models for each leaf of a block, into `out` (leaves, K (K + 1) / 2)."""
    num_models = len(addresses) - 1
    num_pairs = num_models * (num_models + 1) // 2
    base = np.empty(WIDE_CHUNK, np.float32)
    narrow = np.empty(WIDE_CHUNK, np.float32)
    values = np.empty((num_models, WIDE_CHUNK), np.float64)
    lanes = np.empty((num_pairs, LANES), np.float64)
    for leaf in range(len(out)):
        lanes[:] = 0.0
        stop = min(count, (leaf + 1) * leaf_elements)
        for start in range(leaf * leaf_elements, stop, WIDE_CHUNK):
            size = min(WIDE_CHUNK, stop - start)
            if has_base:
                decode(addresses[0], kinds[0], start, size, base)
            for i in range(num_models):
                read_chunk(addresses[i + 1], kinds[i + 1], base, has_base, start, size, narrow)
                wide = values[i]
                for j in range(size):
                    wide[j] = np.float64(narrow[j])
            pair = 0
            for i in range(num_models):
                for k in range(i, num_models):
                    add_products(values[i], values[k], size, lanes[pair])
                    pair += 1
        for pair in range(num_pairs):
            total = 0.0
            for lane in range(LANES):
                total += lanes[pair, lane]
            out[leaf, pair] = total


@compiled
def weighted_rows(addresses, kinds, coefficients, has_base, row_length, by_column, out_address, out_kind, num_rows):
    """As `weighted_sum`, coefficients (num_rows, K) of each row or, `by_column`, (K, row_length) of each column."""
    length = min(CHUNK, row_length)
    base = np.empty(length, np.float32)
    values = np.empty(length, np.float32)
    total = np.empty(length, np.float32)
    for row in range(num_rows):
        for start in range(0, row_length, length):
            size = min(length, row_length - start)
            place = row * row_length + start
            if has_base:
                decode(addresses[0], kinds[0], place, size, base)
            total[:] = 0.0
            for i in range(1, len(addresses)):
                read_chunk(addresses[i], kinds[i], base, has_base, place, size, values)
                if by_column:
                    factors = coefficients[i - 1, start : start + size]
                    for j in range(size):
                        values[j] = values[j] * factors[j]
                else:
                    c = coefficients[row, i - 1]
                    for j in range(size):
                        values[j] = values[j] * c
                if i == 1:
                    for j in range(size):
                        total[j] = values[j]
                else:
                    for j in range(size):
                        total[j] = total[j] + values[j]
            if has_base:
                for j in range(size):
                    total[j] = base[j] + total[j]
            encode(total, out_address, out_kind, place, size)


@compiled
def gram_of_columns(addresses, kinds, has_base, row_length, num_rows, out):
    """Inner products of pairs i <= j of models down each column, rows in order, into `out` (pairs, row_length)."""
    num_models = len(addresses) - 1
    length = min(CHUNK, row_length)
    base = np.empty(length, np.float32)
    values = np.empty((num_models, length), np.float32)
    out[:] = 0.0
    for row in range(num_rows):
        for start in range(0, row_length, length):
            size = min(length, row_length - start)
            place = row * row_length + start
            if has_base:
                decode(addresses[0], kinds[0], place, size, base)
            for i in range(num_models):
                read_chunk(addresses[i + 1], kinds[i + 1], base, has_base, place, size, values[i])
            pair = 0
            for i in range(num_models):
                for k in range(i, num_models):
                    sums = out[pair, start : start + size]
                    a = values[i]
                    b = values[k]
                    for j in range(size):
                        sums[j] += np.float64(a[j]) * np.float64(b[j])
                    pair += 1
