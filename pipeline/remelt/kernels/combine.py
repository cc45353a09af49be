"""Kernels that make one chunk of output of K thinned task vectors: by election and disjoint mean, or by plain sum."""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import bits_of, encode, float_of
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
def sign_of(votes):  # type: ignore[no-untyped-def]
    """The sign bit of the elected sign: plus where the votes sum to zero."""
    return np.uint32(np.uint32(not votes >= np.float32(0.0)) << np.uint32(31))


@compiled
def where_agreeing(vote, sign, value):  # type: ignore[no-untyped-def]
    """`value` where the vote has the elected sign, else +0. Bit arithmetic: a conditional would become a branch."""
    agrees = float_of(np.uint32(bits_of(vote) ^ sign)) > np.float32(0.0)
    return float_of(np.uint32(bits_of(value) & np.uint32(np.uint32(0) - np.uint32(agrees))))


@compiled
def add_agreeing(values, w, u, size, votes, total, divisor):  # type: ignore[no-untyped-def]
    """Add one model where its vote u x has the elected sign, and its weight to the divisor there."""
    for j in range(size):
        sign, vote = sign_of(votes[j]), values[j] * u
        total[j] = total[j] + where_agreeing(vote, sign, values[j] * w)
        divisor[j] = divisor[j] + where_agreeing(vote, sign, w)


@compiled
def merge_four(below, a, b, c, d, w, u, size, normalize, lambda_, out):  # type: ignore[no-untyped-def]
    """Elect and merge four models in one loop, their sums in registers; a model that is not there weighs 0.

    Order of operations and results are those of `count_votes` and `add_agreeing`: a zero more in a sum that began with
    +0 changes no bit of it. One array is written: with two, LLVM would need more checks against overlap than it is
    willing to make, and not vectorise.
    """
    wa, wb, wc, wd = w[0], w[1], w[2], w[3]
    ua, ub, uc, ud = u[0], u[1], u[2], u[3]
    for j in range(size):
        xa, xb, xc, xd = a[j], b[j], c[j], d[j]
        va, vb, vc, vd = xa * ua, xb * ub, xc * uc, xd * ud
        sign = sign_of(((va + vb) + vc) + vd)
        total = where_agreeing(va, sign, xa * wa) + where_agreeing(vb, sign, xb * wb)
        total = (total + where_agreeing(vc, sign, xc * wc)) + where_agreeing(vd, sign, xd * wd)
        if normalize:
            divisor = where_agreeing(va, sign, wa) + where_agreeing(vb, sign, wb)
            divisor = (divisor + where_agreeing(vc, sign, wc)) + where_agreeing(vd, sign, wd)
            # An exact zero becomes 1: its bits are all zero (or the sign alone, where weights cancel).
            is_zero = np.uint32(divisor == np.float32(0.0))
            total = total / float_of(np.uint32(bits_of(divisor) | np.uint32(is_zero * np.uint32(0x3F800000))))
        out[j] = below[j] + total * lambda_


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
    num_models = len(kept)
    if num_models <= 4:
        four_weights, ballots = np.zeros(4, np.float32), np.zeros(4, np.float32)
        for i in range(num_models):
            four_weights[i] = weights[i]
            ballots[i] = weights[i] if elect == ELECT_WEIGHTED else np.float32(1.0)
        # A place without a model reads the first one's values and weighs them 0.
        merge_four(
            below,
            kept[0][offset : offset + size],
            kept[1 if num_models > 1 else 0][offset : offset + size],
            kept[2 if num_models > 2 else 0][offset : offset + size],
            kept[3 if num_models > 3 else 0][offset : offset + size],
            four_weights,
            ballots,
            size,
            normalize,
            lambda_,
            total,
        )
        return
    count_votes(kept, offset, size, weights, elect, votes)
    total[:size] = 0.0
    divisor[:size] = 0.0
    for i in range(num_models):
        u = weights[i] if elect == ELECT_WEIGHTED else np.float32(1.0)
        add_agreeing(kept[i][offset : offset + size], weights[i], u, size, votes, total, divisor)
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
