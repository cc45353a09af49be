"""The contract between the unit runner and an operator on one device: a program for one tensor.

The runner reads *blocks* (whole leaves) and drives a program through `num_rounds` measuring rounds and one applying
round. Every round sees every block of the tensor once, from any thread and in any order; `finish_round` runs when all
blocks of a round are through. What a program returns must not depend on threads, order or block size: floating sums go
to a slot for each leaf and are added in leaf order; counts are integers.

A *leaf* is the fewest whole rows with at least `LEAF_ELEMENTS` elements. A row is the last dimension; a tensor with
fewer than two dimensions is one row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

LEAF_ELEMENTS = 16_384


class Geometry(NamedTuple):
    """A tensor as kernels see it: rows of a fixed length, in leaves of whole rows."""

    name: str
    num_rows: int
    row_length: int
    leaf_rows: int

    @property
    def num_leaves(self) -> int:
        return -(-self.num_rows // self.leaf_rows) if self.num_rows else 0

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.row_length


def geometry_of(name: str, shape: tuple[int, ...]) -> Geometry:
    """Rows and leaves of a tensor of `shape`; a scalar is one row of one element."""
    row_length = shape[-1] if shape else 1
    num_rows = 1
    for dim in shape[:-1]:
        num_rows *= dim
    if row_length == 0:
        num_rows = 0
    leaf_rows = max(1, -(-LEAF_ELEMENTS // max(1, row_length)))
    return Geometry(name, num_rows, row_length, leaf_rows)


class Block(NamedTuple):
    """Whole leaves of one tensor, of all its sources, as stored bits.

    Each array is one-dimensional and contiguous: uint16 for BF16 and F16, float32 for F32, float64 for F64. Its length
    is a whole number of rows; only the tensor's last block may end in a shorter leaf.
    """

    first_leaf: int
    first_row: int
    num_rows: int
    base: NDArray[np.generic] | None
    tensors_K: tuple[NDArray[np.generic], ...]


class Program(Protocol):
    """One operator with its coefficients and options, bound to one tensor and one device."""

    num_rounds: int
    """Measuring rounds before `apply`; 0 for an operator that needs no statistic."""

    def measure(self, round_: int, block: Block, worker: int) -> None:
        """Take the block into the statistics of the round; `worker` numbers the calling thread from 0."""
        ...

    def finish_round(self, round_: int) -> None:
        """Reduce what `measure` gathered; runs once, on one thread, after the round's last block."""
        ...

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        """Write the merged block as stored bits of the output dtype into `out`, which has the block's length."""
        ...
