"""Sums of products of two arrays, in lanes: the inner loop of every Gram matrix.

Written as vector code, because a compiler may not keep in registers sums that it must also keep in memory, and may
not reorder them: the loop in Python's terms took four times as long. Lanes do not depend on the width of the
machine's vectors. The factors are float32 values held as float64: their products are exact, so that fusing a product
with its sum, or not, gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from remelt.kernels.compile import part

LANES = 64
_WIDTH = 16
"""Lanes of one vector value; four of them are the accumulators."""


@intrinsic
def _add_whole(typingctx: Any, a: Any, b: Any, num_spans: Any, lanes: Any) -> Any:
    """lanes[l] += a[LANES s + l] * b[LANES s + l] for spans s in ascending order; arguments are addresses."""
    index, doubles = ir.IntType(64), ir.VectorType(ir.DoubleType(), _WIDTH)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a_address, b_address, count, lanes_address = args

        def at(address: Any, offset: Any) -> Any:
            return builder.inttoptr(builder.add(address, offset), doubles.as_pointer())

        def load(address: Any, offset: Any) -> Any:
            value = builder.load(at(address, offset))
            value.align = 8
            return value

        offsets = [ir.Constant(index, vector * _WIDTH * 8) for vector in range(LANES // _WIDTH)]
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(doubles, (doubles, doubles, doubles)), f"llvm.fmuladd.v{_WIDTH}f64"
        )
        before = builder.block
        starts = [load(lanes_address, offset) for offset in offsets]
        loop, after = builder.append_basic_block("spans"), builder.append_basic_block("done")
        has_spans = builder.icmp_signed(">", count, ir.Constant(index, 0))
        builder.cbranch(has_spans, loop, after)
        builder.position_at_end(loop)
        span = builder.phi(index)
        span.add_incoming(ir.Constant(index, 0), before)
        sums = [builder.phi(doubles) for _ in offsets]
        first = builder.mul(span, ir.Constant(index, LANES * 8))
        totals = []
        for offset, total, start in zip(offsets, sums, starts, strict=True):
            total.add_incoming(start, before)
            place = builder.add(first, offset)
            totals.append(builder.call(multiply_add, (load(a_address, place), load(b_address, place), total)))
        following = builder.add(span, ir.Constant(index, 1))
        for total, value in zip(sums, totals, strict=True):
            total.add_incoming(value, loop)
        span.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        results = []
        for start, value in zip(starts, totals, strict=True):
            result = builder.phi(doubles)
            result.add_incoming(start, before)
            result.add_incoming(value, loop)
            results.append(result)
        for offset, result in zip(offsets, results, strict=True):
            builder.store(result, at(lanes_address, offset)).align = 8
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64, types.uint64), codegen


@part
def add_products(a, b, count, lanes):
    """lanes[l] += a[j] * b[j] for every j with j mod LANES = l, in ascending order."""
    whole = count - count % LANES
    _add_whole(np.uint64(a.ctypes.data), np.uint64(b.ctypes.data), whole // LANES, np.uint64(lanes.ctypes.data))
    for j in range(whole, count):
        lanes[j - whole] += a[j] * b[j]
