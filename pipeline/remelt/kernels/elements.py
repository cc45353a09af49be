"""The kernel of operators that thin task vectors element by element: TIES and Breadcrumbs by tensor, and DARE."""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import CHUNK, decode, encode
from remelt.kernels.combine import add_magnitudes, merge_chunk
from remelt.kernels.compile import compiled
from remelt.kernels.masks import drop_chunk
from remelt.kernels.products import LANES
from remelt.kernels.select import keep_band
from remelt.kernels.weighted import read_chunk


@compiled
def thin_elements(
    addresses,
    kinds,
    is_thinned,
    has_draws,
    keys,
    thresholds,
    bands,
    ties,
    leaf_elements,
    first_element,
    count,
    numbers,
    elects,
    normalize,
    lambda_,
    out_address,
    out_kind,
    norms,
):
    """Thin every element of a block and merge; or, where `norms` (leaves, 2 K) has rows, sum magnitudes around it.

    `addresses[0]` is the base. Per model: `is_thinned`; `keys` (K, spans, 2) and `thresholds` for draws; `bands` and
    `ties` (leaves of the block, K, 2) for selection by magnitude (see `keep_band`). `numbers` as in `merge_chunk`.
    """
    num_models = len(addresses) - 1
    base = np.empty(CHUNK, np.float32)
    kept = np.empty((num_models, CHUNK), np.float32)
    scratch = np.empty((3, CHUNK), np.float32)
    lanes = np.zeros((2 * num_models, LANES), np.float64)
    left = np.empty((num_models, 2), np.int64)
    num_leaves = (count + leaf_elements - 1) // leaf_elements
    for leaf in range(num_leaves):
        lanes[:] = 0.0
        if not has_draws:
            for i in range(num_models):
                left[i, 0], left[i, 1] = ties[leaf, i, 0], ties[leaf, i, 1]
        stop = min(count, (leaf + 1) * leaf_elements)
        for start in range(leaf * leaf_elements, stop, CHUNK):
            size = min(CHUNK, stop - start)
            decode(addresses[0], kinds[0], start, size, base)
            for i in range(num_models):
                values = kept[i]
                read_chunk(addresses[i + 1], kinds[i + 1], base, True, start, size, values)
                if len(norms):
                    add_magnitudes(values, size, lanes[2 * i])
                if not is_thinned[i]:
                    pass
                elif has_draws:
                    drop_chunk(values, size, keys[i], first_element + start, thresholds[i])
                else:
                    left[i, 0], left[i, 1] = keep_band(
                        values, size, bands[leaf, i, 0], bands[leaf, i, 1], left[i, 0], left[i, 1]
                    )
                if len(norms):
                    add_magnitudes(values, size, lanes[2 * i + 1])
            if len(norms) == 0:
                merge_chunk(base, kept, 0, size, numbers, elects, normalize, lambda_, scratch)
                encode(scratch[0], out_address, out_kind, start, size)
        if len(norms):
            for i in range(2 * num_models):
                total = 0.0
                for lane in range(LANES):
                    total += lanes[i, lane]
                norms[leaf, i] = total
