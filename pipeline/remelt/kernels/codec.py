"""Stored bits to float32 and back, for the CPU kernels; and arrays from addresses.

Kernels take their inputs as addresses and dtype codes, so that one compiled kernel serves any number of models and any
mixture of dtypes. Conversions are integer arithmetic without branches, which LLVM turns into vector code; a chunk of a
few thousand elements is decoded into a float32 scratch that stays in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from remelt.kernels.compile import compiled, part
from remelt.kernels.footprint import CHUNK_ELEMENTS

BF16, F16, F32, F64 = 0, 1, 2, 3
KINDS: dict[str, int] = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}

CHUNK = CHUNK_ELEMENTS
"""Elements of a chunk: base, one model and the result as float32 are 24 KiB, which first-level caches hold."""


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 with these bits (uint32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def _pointer_intrinsic(element: Any) -> Any:
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.uint64), codegen

    return intrinsic(pointer)


uint16_pointer = _pointer_intrinsic(types.uint16)
float32_pointer = _pointer_intrinsic(types.float32)
float64_pointer = _pointer_intrinsic(types.float64)
uint8_pointer = _pointer_intrinsic(types.uint8)


@part
def decode(address, kind, start, count, out):
    """Write elements [start, start + count) of the array at `address` into `out` as float32."""
    if kind == BF16:
        halves = carray(uint16_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            out[j] = float_of(np.uint32(np.uint32(halves[j]) << np.uint32(16)))
    elif kind == F16:
        halves = carray(uint16_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            h = np.uint32(halves[j])
            shifted = np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))
            # Normal numbers: move the exponent's bias. Inf and NaN: move it twice. Subnormal: let a subtraction of
            # 2^-14 renormalise, which is exact.
            normal = np.uint32(shifted + np.uint32(112 << 23))
            special = np.uint32(normal + np.uint32(112 << 23))
            magnitude = special if shifted >= np.uint32(0x7C00 << 13) else normal
            small = bits_of(float_of(np.uint32(shifted + np.uint32(113 << 23))) - np.float32(2.0**-14))
            magnitude = small if shifted < np.uint32(0x0400 << 13) else magnitude
            sign = np.uint32((h & np.uint32(0x8000)) << np.uint32(16))
            out[j] = float_of(np.uint32(magnitude | sign))
    elif kind == F32:
        singles = carray(float32_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            out[j] = singles[j]
    else:
        doubles = carray(float64_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            out[j] = np.float32(doubles[j])


@part
def encode(values, address, kind, start, count):
    """Write `values` as elements [start, start + count) of the array at `address`, rounding to nearest even."""
    if kind == BF16:
        halves = carray(uint16_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            x = bits_of(values[j])
            rounded = np.uint32(x + np.uint32(0x7FFF) + np.uint32((x >> np.uint32(16)) & np.uint32(1)))
            quiet = np.uint32(x | np.uint32(0x00400000))
            is_nan = np.uint32(x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            halves[j] = np.uint16(np.uint32(quiet if is_nan else rounded) >> np.uint32(16))
    elif kind == F16:
        halves = carray(uint16_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            x = bits_of(values[j])
            magnitude = np.uint32(x & np.uint32(0x7FFFFFFF))
            sign = np.uint32(np.uint32(x >> np.uint32(16)) & np.uint32(0x8000))
            odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
            normal = np.uint32(np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))
            # Below 2^-14 the sum with 0.5 shifts the mantissa to where a subnormal half has it, and rounds to even.
            small = np.uint32(bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(126 << 23))
            half = small if magnitude < np.uint32(113 << 23) else normal
            half = np.uint32(0x7C00) if magnitude >= np.uint32(143 << 23) else half
            half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
            halves[j] = np.uint16(np.uint32(half | sign))
    elif kind == F32:
        singles = carray(float32_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            singles[j] = values[j]
    else:
        doubles = carray(float64_pointer(np.uint64(address)), start + count)[start:]
        for j in range(count):
            doubles[j] = np.float64(values[j])


@compiled
def copy_bytes(source, target, count):
    """Copy `count` bytes from address to address."""
    read = carray(uint8_pointer(np.uint64(source)), count)
    write = carray(uint8_pointer(np.uint64(target)), count)
    for j in range(count):
        write[j] = read[j]


@compiled
def nonfinite(address, kind, count):
    """Count NaN and Inf among the first `count` elements at `address`."""
    total = 0
    if kind in (BF16, F16):
        halves = carray(uint16_pointer(np.uint64(address)), count)
        mask = np.uint16(0x7F80) if kind == BF16 else np.uint16(0x7C00)
        for start in range(0, count, 16384):
            piece = halves[start : min(count, start + 16384)]
            found = np.uint16(0)
            for j in range(len(piece)):
                found = np.uint16(found + np.uint16(1 if np.uint16(piece[j] & mask) == mask else 0))
            total += found
    elif kind == F32:
        singles = carray(float32_pointer(np.uint64(address)), count)
        mask32 = np.uint32(0x7F800000)
        for start in range(0, count, 16384):
            part = singles[start : min(count, start + 16384)]
            found32 = np.uint32(0)
            for j in range(len(part)):
                found32 = np.uint32(found32 + np.uint32(1 if np.uint32(bits_of(part[j]) & mask32) == mask32 else 0))
            total += found32
    else:
        doubles = carray(float64_pointer(np.uint64(address)), count)
        for j in range(count):
            total += not np.isfinite(doubles[j])
    return total
