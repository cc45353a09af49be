"""Inner products of a gradient with a checkpoint or its task vector, leaf by leaf: the oracle of Frank-Wolfe.

The same exact products and lanes as the Gram matrix's, so a leaf's sums depend on the leaf alone.
"""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import decode
from remelt.kernels.compile import compiled
from remelt.kernels.products import LANES, add_products
from remelt.kernels.weighted import WIDE_CHUNK, read_chunk


@compiled
def dots_of_leaves(
    gradient_address,
    gradient_kind,
    base_address,
    base_kind,
    address,
    kind,
    has_base,
    with_squares,
    leaf_elements,
    count,
    out,
):
    """<g, d> and, `with_squares`, <d, d> of each leaf into `out` (leaves, 2); d = x - base in float32, or x."""
    narrow = np.empty(WIDE_CHUNK, np.float32)
    base = np.empty(WIDE_CHUNK, np.float32)
    gradient = np.empty(WIDE_CHUNK, np.float64)
    values = np.empty(WIDE_CHUNK, np.float64)
    lanes = np.empty((2, LANES), np.float64)
    for leaf in range(len(out)):
        lanes[:] = 0.0
        stop = min(count, (leaf + 1) * leaf_elements)
        for start in range(leaf * leaf_elements, stop, WIDE_CHUNK):
            size = min(WIDE_CHUNK, stop - start)
            decode(gradient_address, gradient_kind, start, size, narrow)
            for j in range(size):
                gradient[j] = np.float64(narrow[j])
            if has_base:
                decode(base_address, base_kind, start, size, base)
            read_chunk(address, kind, base, has_base, start, size, narrow)
            for j in range(size):
                values[j] = np.float64(narrow[j])
            add_products(gradient, values, size, lanes[0])
            if with_squares:
                add_products(values, values, size, lanes[1])
        for row in range(2):
            total = 0.0
            for lane in range(LANES):
                total += lanes[row, lane]
            out[leaf, row] = total
