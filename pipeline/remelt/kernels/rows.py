"""The kernel of operators that rank each row: DELLA, and TIES and Breadcrumbs by row."""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import CHUNK, decode, encode
from remelt.kernels.combine import add_magnitudes, merge_chunk
from remelt.kernels.compile import compiled
from remelt.kernels.masks import drop_ranked
from remelt.kernels.products import LANES
from remelt.kernels.ranks import DIGIT_BITS, deal_by_rank
from remelt.kernels.weighted import read_chunk


@compiled
def thin_rows(
    addresses,
    kinds,
    is_thinned,
    has_draws,
    keys,
    by_rank,
    row_length,
    leaf_rows,
    first_row,
    num_rows,
    numbers,
    elects,
    normalize,
    lambda_,
    out_address,
    out_kind,
    norms,
):
    """Thin every row of a block and merge; where `norms` (leaves, 2 K) has rows, sum magnitudes before and after.

    `addresses[0]` is the base. Per model: `is_thinned`; `keys` (K, spans, 2); `by_rank` (K, row_length), with draws
    what `drop_ranked` takes for each ascending rank, without them 1 for each descending rank that is kept, else 0.
    `numbers` as in `merge_chunk`.
    """
    num_models = len(addresses) - 1
    group_rows = max(1, min(leaf_rows, CHUNK // row_length))
    length = group_rows * row_length
    base = np.empty(length, np.float32)
    kept = np.empty((num_models, length), np.float32)
    sort_keys = np.empty(row_length, np.uint32)
    dealt = np.empty(row_length, np.uint64)
    work = np.empty((2, row_length), np.uint64)
    counts = np.empty(1 << DIGIT_BITS, np.uint32)
    scratch = np.empty((3, CHUNK), np.float32)
    lanes = np.zeros((2 * num_models, LANES), np.float64)
    for leaf_start in range(0, num_rows, leaf_rows):
        leaf_stop = min(num_rows, leaf_start + leaf_rows)
        lanes[:] = 0.0
        for group_start in range(leaf_start, leaf_stop, group_rows):
            size = (min(leaf_stop, group_start + group_rows) - group_start) * row_length
            place = group_start * row_length
            decode(addresses[0], kinds[0], place, size, base)
            for i in range(num_models):
                read_chunk(addresses[i + 1], kinds[i + 1], base, True, place, size, kept[i])
                if len(norms):
                    add_magnitudes(kept[i], size, lanes[2 * i])
                if is_thinned[i]:
                    for start in range(0, size, row_length):
                        values = kept[i][start : start + row_length]
                        deal_by_rank(values, row_length, not has_draws, by_rank[i], sort_keys, work, counts, dealt)
                        if has_draws:
                            drop_ranked(values, dealt, row_length, keys[i], first_row * row_length + place + start)
                            continue
                        for j in range(row_length):
                            values[j] = values[j] if dealt[j] != np.uint64(0) else np.float32(0.0)
                if len(norms):
                    add_magnitudes(kept[i], size, lanes[2 * i + 1])
            if len(norms) == 0:
                for start in range(0, size, CHUNK):
                    num = min(CHUNK, size - start)
                    merge_chunk(base, kept, start, num, numbers, elects, normalize, lambda_, scratch)
                    encode(scratch[0], out_address, out_kind, place + start, num)
        if len(norms):
            leaf = leaf_start // leaf_rows
            for i in range(2 * num_models):
                total = 0.0
                for lane in range(LANES):
                    total += lanes[i, lane]
                norms[leaf, i] = total
