"""A program that runs the operator's torch function itself: on a CUDA device, and as oracle of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from remelt.draws import MIX_MULTIPLIER_1, MIX_MULTIPLIER_2, MIX_SHIFT_1, MIX_SHIFT_2, MIX_SHIFT_3, draw_keys
from remelt.dtypes import DTYPES
from remelt.kernels.program import Block, Geometry
from remelt.operators.lazy_torch import torch
from remelt.operators.spec import Operator
from remelt.treatment import Apply

if TYPE_CHECKING:
    from torch import Tensor


def _signed(value: int) -> int:
    """A 32-bit number as torch's int32 holds it."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix(x: Tensor) -> Tensor:
    # int32 wraps as uint32 does; shifts are arithmetic, so the bits that come in from the sign are masked off.
    x = (x ^ ((x >> MIX_SHIFT_1) & ((1 << (32 - MIX_SHIFT_1)) - 1))) * _signed(MIX_MULTIPLIER_1)
    x = (x ^ ((x >> MIX_SHIFT_2) & ((1 << (32 - MIX_SHIFT_2)) - 1))) * _signed(MIX_MULTIPLIER_2)
    return x ^ ((x >> MIX_SHIFT_3) & ((1 << (32 - MIX_SHIFT_3)) - 1))


def draw_bits(seed: int, stream: int, name: str, start: int, count: int, device: str = "cpu") -> Tensor:
    """The bits of `remelt.draws.draw_bits` as an int32 tensor of shape (count,) on a device."""
    pieces = []
    while count:
        high, low = start >> 32, start & 0xFFFFFFFF
        num = min(count, (1 << 32) - low)
        k0, k1 = draw_keys(seed, stream, name, high)
        index = torch.arange(low, low + num, dtype=torch.int64, device=device)
        index = torch.where(index >= 1 << 31, index - (1 << 32), index).to(torch.int32)
        pieces.append(_mix(_mix(index ^ _signed(k0)) + _signed(k1)))
        start, count = start + num, count - num
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32, device=device)


class TorchProgram:
    """Calls the pure function on each block; on the whole tensor where the operator needs its statistics."""

    num_rounds = 0

    def __init__(
        self,
        operator: Operator,
        apply: Apply,
        geometry: Geometry,
        *,
        base_dtype: str | None,
        dtypes_K: Sequence[str],
        out_dtype: str,
        streams_K: Sequence[int],
        seed: int,
        device: str,
    ) -> None:
        self._operator, self._apply, self._geometry = operator, apply, geometry
        self._base_dtype, self._dtypes_K, self._out_dtype = base_dtype, tuple(dtypes_K), out_dtype
        self._streams_K, self._seed, self._device = tuple(streams_K), seed, device
        self._options = {operator.keyword(name): value for name, value in apply.options}
        self.needs_whole_tensor = operator.scope in ("tensor", "matrix") or self._options.get("rescale") == "l1"

    def measure(self, round_: int, block: Block, worker: int) -> None:
        raise AssertionError("nothing to measure")

    def finish_round(self, round_: int) -> None:
        raise AssertionError("nothing to measure")

    def _tensor(self, bits: NDArray[np.generic], dtype: str, shape: tuple[int, int]) -> Tensor:
        plain = torch.from_numpy(bits.view(np.int16) if bits.dtype == np.uint16 else bits)
        return plain.to(self._device).view(getattr(torch, DTYPES[dtype].torch_name)).reshape(shape)

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        shape = (block.num_rows, self._geometry.row_length)
        tensors_K = [self._tensor(x, dtype, shape) for x, dtype in zip(block.tensors_K, self._dtypes_K, strict=True)]
        base = None
        if block.base is not None and self._base_dtype is not None:
            base = self._tensor(block.base, self._base_dtype, shape)
        options: dict[str, Any] = dict(self._options)
        if self._operator.is_random:
            start, count = block.first_row * shape[1], shape[0] * shape[1]
            options["draws"] = lambda model: draw_bits(
                self._seed, self._streams_K[model], self._geometry.name, start, count, self._device
            )
        merged = self._operator.function(base, tensors_K, list(self._apply.coefficients), **options)
        merged = merged.to(getattr(torch, DTYPES[self._out_dtype].torch_name)).cpu().reshape(-1)
        if out.dtype == np.uint16:
            merged = merged.view(torch.int16)
        out[:] = merged.numpy().view(out.dtype)
