"""What every CPU program knows of its inputs and its output: dtype codes, and the addresses of a block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remelt.kernels.codec import KINDS
from remelt.kernels.program import Block, Geometry


def address_of(array: NDArray[np.generic]) -> int:
    """Where an array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


class Sources:
    """A tensor as the CPU kernels take it: place 0 is the base (address 0 where there is none), then K models."""

    def __init__(
        self,
        geometry: Geometry,
        base_dtype: str | None,
        dtypes_K: Sequence[str],
        out_dtype: str,
        num_workers: int,
    ) -> None:
        self.geometry = geometry
        self.num_models = len(dtypes_K)
        self.has_base = base_dtype is not None
        self.kinds = np.array([KINDS[name] for name in (base_dtype or "F32", *dtypes_K)], np.int64)
        self.out_kind = KINDS[out_dtype]
        self.dtypes_K = tuple(dtypes_K)
        self.out_dtype = out_dtype
        self.num_workers = num_workers

    @property
    def leaf_elements(self) -> int:
        return self.geometry.leaf_rows * self.geometry.row_length

    def addresses(self, block: Block) -> NDArray[np.uint64]:
        """Base and models of a block; the caller keeps the block alive."""
        base = address_of(block.base) if self.has_base and block.base is not None else 0
        return np.array([base, *[address_of(array) for array in block.tensors_K]], np.uint64)

    def num_elements(self, block: Block) -> int:
        return block.num_rows * self.geometry.row_length

    def num_leaves(self, block: Block) -> int:
        return -(-block.num_rows // self.geometry.leaf_rows)
