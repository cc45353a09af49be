"""Kernels that make one chunk of output of K thinned task vectors: by election and disjoint mean, or by plain sum."""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import encode
from remelt.kernels.compile import compiled

SUM, ELECT_WEIGHTED, ELECT_UNWEIGHTED = 0, 1, 2


@compiled
def count_votes(kept, offset, size, weights, elect, votes):  # type: ignore[no-untyped-def]
    """votes[j] = sum_i of w_i d_i, or of d_i."""
    for i in range(len(kept)):
        values = kept[i][offset : offset + size]
        w = weights[i] if elect == ELECT_WEIGHTED else np.float32(1.0)
        if i == 0:
            for j in range(size):
                votes[j] = values[j] * w
        else:
            for j in range(size):
                votes[j] = votes[j] + values[j] * w


@compiled
def add_agreeing(values, w, size, elect, votes, total, divisor):  # type: ignore[no-untyped-def]
    """Add one model where its vote has the elected sign, and its weight to the divisor there."""
    if elect == ELECT_WEIGHTED:
        for j in range(size):
            x = values[j] * w
            signed = x if votes[j] >= np.float32(0.0) else -x
            total[j] = total[j] + (x if signed > np.float32(0.0) else np.float32(0.0))
            divisor[j] = divisor[j] + (w if signed > np.float32(0.0) else np.float32(0.0))
    else:
        for j in range(size):
            x = values[j]
            signed = x if votes[j] >= np.float32(0.0) else -x
            total[j] = total[j] + (x * w if signed > np.float32(0.0) else np.float32(0.0))
            divisor[j] = divisor[j] + (w if signed > np.float32(0.0) else np.float32(0.0))


@compiled
def merge_chunk(base, kept, offset, size, weights, elect, normalize, lambda_, scratch):  # type: ignore[no-untyped-def]
    """base + lambda * the merge of `kept[:, offset : offset + size]`, into scratch[0]; scratch is (3, CHUNK).

    Without an election lambda and the divisor are folded into the weights.
    """
    total, votes, divisor = scratch[0], scratch[1], scratch[2]
    below = base[offset : offset + size]
    if elect == SUM:
        count_votes(kept, offset, size, weights, ELECT_WEIGHTED, total)
        for j in range(size):
            total[j] = below[j] + total[j]
        return
    count_votes(kept, offset, size, weights, elect, votes)
    total[:size] = 0.0
    divisor[:size] = 0.0
    for i in range(len(kept)):
        add_agreeing(kept[i][offset : offset + size], weights[i], size, elect, votes, total, divisor)
    if normalize:
        for j in range(size):
            by = np.float32(1.0) if divisor[j] == np.float32(0.0) else divisor[j]
            total[j] = below[j] + (total[j] / by) * lambda_
    else:
        for j in range(size):
            total[j] = below[j] + total[j] * lambda_


@compiled
def write_merged(  # type: ignore[no-untyped-def]
    base, kept, offset, size, weights, elect, normalize, lambda_, scratch, out_address, out_kind, start
):
    """Merge a chunk and store it as elements [start, start + size) of the output."""
    merge_chunk(base, kept, offset, size, weights, elect, normalize, lambda_, scratch)
    encode(scratch[0], out_address, out_kind, start, size)


@compiled
def add_magnitudes(values, size, lanes):  # type: ignore[no-untyped-def]
    """lanes[l] += |values[j]| for every j with j mod len(lanes) = l, in ascending order, in float64."""
    num_lanes = len(lanes)
    whole = size - size % num_lanes
    for start in range(0, whole, num_lanes):
        piece = values[start : start + num_lanes]
        for lane in range(num_lanes):
            lanes[lane] += np.float64(abs(piece[lane]))
    for j in range(whole, size):
        lanes[j - whole] += np.float64(abs(values[j]))
