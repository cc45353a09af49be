"""Kernels that make one chunk of output of K thinned task vectors: by election and disjoint mean, or by plain sum."""

from __future__ import annotations

import numpy as np

from remelt.kernels.codec import bits_of, float_of
from remelt.kernels.compile import part

GROUP = 4
"""Models that one loop merges with their sums in registers; weights come padded with zeros to at least so many."""


@part
def count_votes(kept, offset, size, ballots, votes):
    """votes[j] = sum_i u_i d_i."""
    for i in range(len(kept)):
        values = kept[i][offset : offset + size]
        u = ballots[i]
        if i == 0:
            for j in range(size):
                votes[j] = values[j] * u
        else:
            for j in range(size):
                votes[j] = votes[j] + values[j] * u


@part
def sign_of(votes):
    """The sign bit of the elected sign: plus where the votes sum to zero."""
    return np.uint32(np.uint32(not votes >= np.float32(0.0)) << np.uint32(31))


@part
def where_agreeing(vote, sign, value):
    """`value` where the vote has the elected sign, else +0. Bit arithmetic: a conditional would become a branch."""
    agrees = float_of(np.uint32(bits_of(vote) ^ sign)) > np.float32(0.0)
    return float_of(np.uint32(bits_of(value) & np.uint32(np.uint32(0) - np.uint32(agrees))))


@part
def add_agreeing(values, w, v, u, size, votes, total, divisor):
    """Add one model's w x where its vote u x has the elected sign, and v to the divisor there."""
    for j in range(size):
        sign, vote = sign_of(votes[j]), values[j] * u
        total[j] = total[j] + where_agreeing(vote, sign, values[j] * w)
        divisor[j] = divisor[j] + where_agreeing(vote, sign, v)


@part
def merge_four(below, a, b, c, d, w, v, u, unit, size, normalize, lambda_, out):
    """Elect and merge four models in one loop, their sums in registers; a model that is not there weighs 0.

    Order of operations and results are those of `count_votes` and `add_agreeing`: a zero more in a sum that began with
    +0 changes no bit of it. One array is written: with two, LLVM would need more checks against overlap than it is
    willing to make, and not vectorise.
    """
    wa, wb, wc, wd = w[0], w[1], w[2], w[3]
    da, db, dc, dd = v[0], v[1], v[2], v[3]
    ua, ub, uc, ud = u[0], u[1], u[2], u[3]
    for j in range(size):
        xa, xb, xc, xd = a[j], b[j], c[j], d[j]
        va, vb, vc, vd = xa * ua, xb * ub, xc * uc, xd * ud
        sign = sign_of(((va + vb) + vc) + vd)
        total = where_agreeing(va, sign, xa * wa) + where_agreeing(vb, sign, xb * wb)
        total = (total + where_agreeing(vc, sign, xc * wc)) + where_agreeing(vd, sign, xd * wd)
        if normalize:
            divisor = where_agreeing(va, sign, da) + where_agreeing(vb, sign, db)
            divisor = (divisor + where_agreeing(vc, sign, dc)) + where_agreeing(vd, sign, dd)
            is_zero = np.uint32(0) - np.uint32(divisor == np.float32(0.0))
            total = total / float_of(np.uint32(bits_of(divisor) | np.uint32(np.uint32(is_zero) & bits_of(unit))))
        out[j] = below[j] + total * lambda_


@part
def merge_chunk(base, kept, offset, size, numbers, elects, normalize, lambda_, scratch):
    """base + lambda * the merge of `kept[:, offset : offset + size]`, into scratch[0]; scratch is (3, CHUNK).

    `numbers` (4, max(K, GROUP)): weights, what divisors are summed of, ballots, which votes are counted with, and what
    replaces a divisor of zero; without an election the ballots are weights with lambda and the divisor folded in.
    """
    weights, divisors, ballots, unit = numbers[0], numbers[1], numbers[2], numbers[3, 0]
    num_models = len(kept)
    total, votes, divisor = scratch[0], scratch[1], scratch[2]
    below = base[offset : offset + size]
    if not elects:
        count_votes(kept, offset, size, ballots, total)
        for j in range(size):
            total[j] = below[j] + total[j]
    elif num_models <= GROUP:
        # A place without a model reads the first one's values and weighs them 0.
        a = kept[0][offset : offset + size]
        b = kept[1 if num_models > 1 else 0][offset : offset + size]
        c = kept[2 if num_models > 2 else 0][offset : offset + size]
        d = kept[3 if num_models > 3 else 0][offset : offset + size]
        merge_four(below, a, b, c, d, weights, divisors, ballots, unit, size, normalize, lambda_, total)
    else:
        count_votes(kept, offset, size, ballots, votes)
        total[:size] = 0.0
        divisor[:size] = 0.0
        for i in range(num_models):
            x = kept[i][offset : offset + size]
            add_agreeing(x, weights[i], divisors[i], ballots[i], size, votes, total, divisor)
        for j in range(size):
            by = divisor[j] if divisor[j] != np.float32(0.0) else unit
            by = by if normalize else np.float32(1.0)
            total[j] = below[j] + (total[j] / by) * lambda_


@part
def add_magnitudes(values, size, lanes):
    """lanes[l] += |values[j]| for every j with j mod len(lanes) = l, in ascending order, in float64."""
    num_lanes = len(lanes)
    whole = size - size % num_lanes
    for start in range(0, whole, num_lanes):
        piece = values[start : start + num_lanes]
        for lane in range(num_lanes):
            lanes[lane] += np.float64(abs(piece[lane]))
    for j in range(whole, size):
        lanes[j - whole] += np.float64(abs(values[j]))
