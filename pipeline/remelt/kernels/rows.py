"""The kernel of operators that rank each row: DELLA, and TIES and Breadcrumbs by row."""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import CHUNK, decode, encode
from remelt.kernels.combine import add_magnitudes, merge_chunk
from remelt.kernels.compile import compiled, part
from remelt.kernels.masks import drop_by_rank
from remelt.kernels.ranks import DIGIT_BITS, MAX_DIGITS, ranks_of
from remelt.kernels.weighted import LANES, read_chunk


@part
def thin_row(  # type: ignore[no-untyped-def]
    values, size, first, has_draws, keys, thresholds, factors, start, stop, sort_keys, work, counts, ranks, scales
):
    """Thin one row of one model in place: by draws under its ranks, or to descending ranks [start, stop)."""
    ranks_of(values, size, not has_draws, sort_keys, work, counts, ranks)
    if has_draws:
        drop_by_rank(values, ranks, size, keys, first, thresholds, factors, work[0], work[1], scales)
        return
    for j in range(size):
        is_kept = (ranks[j] >= np.uint32(start)) & (ranks[j] < np.uint32(stop))
        values[j] = values[j] if is_kept else np.float32(0.0)


@compiled
def thin_rows(  # type: ignore[no-untyped-def]
    addresses,
    kinds,
    is_thinned,
    has_draws,
    keys,
    thresholds,
    factors,
    ranges,
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
    """Thin every row of a block and merge; or, where `norms` (leaves, 2 K) has rows, sum magnitudes before and after.

    `addresses[0]` is the base. Per model: `is_thinned`; `keys` (K, spans, 2), `thresholds` and `factors` (K, row_length)
    for draws by rank; `ranges` (K, 2), the descending ranks that are kept without draws. `numbers` as in `merge_chunk`.
    """
    num_models = len(addresses) - 1
    group_rows = max(1, min(leaf_rows, CHUNK // row_length))
    length = group_rows * row_length
    base = np.empty(length, np.float32)
    kept = np.empty((num_models, length), np.float32)
    sort_keys = np.empty(row_length, np.uint32)
    ranks = np.empty(row_length, np.uint32)
    work = np.empty((3, row_length), np.uint32)
    row_scales = np.empty(row_length, np.float32)
    counts = np.empty((MAX_DIGITS, 1 << DIGIT_BITS), np.uint32)
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
                        first = first_row * row_length + place + start
                        thin_row(
                            kept[i][start : start + row_length],
                            row_length,
                            first,
                            has_draws,
                            keys[i],
                            thresholds[i],
                            factors[i],
                            ranges[i, 0],
                            ranges[i, 1],
                            sort_keys,
                            work,
                            counts,
                            ranks,
                            row_scales,
                        )
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
