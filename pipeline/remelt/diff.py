"""How far two checkpoints lie apart: per tensor, per tensor class and in all.

Tensors are streamed in blocks, sums are taken in float64, so memory does not grow with the checkpoints.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.checkpoint import FP8_BLOCK, RAW, CheckpointIndex, TensorInfo
from remelt.decode import decode
from remelt.dtypes import DTYPES
from remelt.errors import CheckpointError
from remelt.formats.quantized import read_quantization
from remelt.kernels.program import geometry_of
from remelt.range_reader import RangeReader
from remelt.stored_bits import as_stored
from remelt.tensor_classes import classify

BLOCK_ELEMENTS = 1 << 16
"""Elements of a block; as float64 two of them are 1 MiB for each thread, which stays in a core's cache."""

Values = Callable[[int, int, int, int], NDArray[Any]]
"""(first row, last row, first column, last column) -> the numbers there, flat."""


class Distance(NamedTuple):
    """Sums over aligned elements of a and b, from which every distance follows; sums of parts add up."""

    num_elements: int = 0
    num_changed: int = 0
    """Elements whose values differ."""
    sum_squares_a: float = 0.0
    sum_squares_b: float = 0.0
    sum_products: float = 0.0
    sum_squares_difference: float = 0.0

    def plus(self, other: Distance) -> Distance:
        counts = (self.num_elements + other.num_elements, self.num_changed + other.num_changed)
        return Distance(*counts, *(mine + theirs for mine, theirs in zip(self[2:], other[2:], strict=True)))

    @property
    def absolute(self) -> float:
        """||a - b||."""
        return math.sqrt(self.sum_squares_difference)

    @property
    def rms(self) -> float | None:
        """||a - b|| / sqrt(n); None for no elements."""
        return math.sqrt(self.sum_squares_difference / self.num_elements) if self.num_elements else None

    @property
    def relative(self) -> float | None:
        """||a - b|| / ||a||; None where a is zero."""
        return math.sqrt(self.sum_squares_difference / self.sum_squares_a) if self.sum_squares_a else None

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b; None where either is zero."""
        norms = math.sqrt(self.sum_squares_a) * math.sqrt(self.sum_squares_b)
        return self.sum_products / norms if norms else None

    def row(self) -> dict[str, Any]:
        """As columns of a table; None for what is not defined or not finite."""
        numbers = {"absolute": self.absolute, "rms": self.rms, "relative": self.relative, "cosine": self.cosine}
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in numbers.items()}
        return {"num_elements": self.num_elements, "num_changed": self.num_changed, **finite}


class TensorDistance(NamedTuple):
    """Two tensors of one name and shape, compared."""

    name: str
    kind: str
    layer: int | None
    dtype_a: str
    dtype_b: str
    shape: tuple[int, ...]
    distance: Distance


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What differs between checkpoints a and b."""

    a: str
    b: str
    tensors: tuple[TensorDistance, ...]
    """Those that can be compared, in a's storage order."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    shape_differences: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in a, shape in b): not measured."""
    dtype_differences: tuple[tuple[str, str, str], ...]
    """(name, dtype in a, dtype in b): measured by value."""

    @property
    def classes(self) -> dict[str, Distance]:
        """Sums over each tensor class, in the order of first appearance."""
        sums: dict[str, Distance] = {}
        for tensor in self.tensors:
            sums[tensor.kind] = sums.get(tensor.kind, Distance()).plus(tensor.distance)
        return sums

    @property
    def total(self) -> Distance:
        total = Distance()
        for distance in self.classes.values():
            total = total.plus(distance)
        return total

    def to_table(self) -> list[dict[str, Any]]:
        """Rows of one shape for display and Parquet: `level` is tensor, class or total."""
        blank = {"name": None, "class": None, "layer": None, "dtype_a": None, "dtype_b": None, "shape": None}
        rows = [
            {
                "level": "tensor",
                "name": tensor.name,
                "class": tensor.kind,
                "layer": tensor.layer,
                "dtype_a": tensor.dtype_a,
                "dtype_b": tensor.dtype_b,
                "shape": list(tensor.shape),
                **tensor.distance.row(),
            }
            for tensor in self.tensors
        ]
        rows += [
            {"level": "class", **blank, "class": kind, **distance.row()} for kind, distance in self.classes.items()
        ]
        return [*rows, {"level": "total", **blank, **self.total.row()}]


def diff(a: CheckpointIndex, b: CheckpointIndex, *, threads: int | None = None) -> DiffReport:
    """Measure the distance between two checkpoints, tensor by tensor; fp8 pairs by their dequantised values.

    Args:
        a, b: indexes of the two; distances are relative to `a`.
        threads: tensors worked on at once, each with some 3 MB; all cores where None. No effect on the numbers.

    Raises:
        CheckpointError: a file cannot be read, changed, or holds a codec that is not decoded.
    """
    num_layers = a.config.get("num_hidden_layers")
    num_layers = num_layers if isinstance(num_layers, int) else None
    common = [name for name, info in a.tensors.items() if name in b.tensors and info.shape == b.tensors[name].shape]
    with RangeReader(a) as reader_a, RangeReader(b) as reader_b:

        def measure(name: str) -> TensorDistance:
            info_a, info_b = a.tensors[name], b.tensors[name]
            values_a, values_b = _values(reader_a, name, info_a), _values(reader_b, name, info_b)
            found = classify(name, num_layers)
            distance = _distance(name, info_a.shape, values_a, values_b)
            return TensorDistance(name, found.kind, found.layer, info_a.dtype, info_b.dtype, info_a.shape, distance)

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            tensors = tuple(pool.map(measure, common))
    both = [(name, info, b.tensors[name]) for name, info in a.tensors.items() if name in b.tensors]
    return DiffReport(
        a=a.source,
        b=b.source,
        tensors=tensors,
        only_in_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_in_b=tuple(name for name in b.tensors if name not in a.tensors),
        shape_differences=tuple((name, one.shape, two.shape) for name, one, two in both if one.shape != two.shape),
        dtype_differences=tuple((name, one.dtype, two.dtype) for name, one, two in both if one.dtype != two.dtype),
    )


def _blocks(num_rows: int, row_length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a tensor into contiguous boxes of at most BLOCK_ELEMENTS: whole rows, or parts of one row."""
    rows = max(1, BLOCK_ELEMENTS // max(1, row_length))
    columns = min(row_length, BLOCK_ELEMENTS) or 1
    for row in range(0, num_rows, rows):
        for column in range(0, row_length, columns):
            yield row, min(num_rows, row + rows), column, min(row_length, column + columns)


def _distance(name: str, shape: tuple[int, ...], values_a: Values, values_b: Values) -> Distance:
    geometry = geometry_of(name, shape)
    total = Distance()
    # NaN and infinity in a parent are a finding, not a fault: they end as missing numbers.
    with np.errstate(invalid="ignore", over="ignore"):
        for block in _blocks(geometry.num_rows, geometry.row_length):
            a, b = values_a(*block).astype(np.float64), values_b(*block).astype(np.float64)
            products = _dot(a, a), _dot(b, b), _dot(a, b)
            np.subtract(a, b, out=a)
            total = total.plus(Distance(a.size, int(np.count_nonzero(a)), *products, _dot(a, a)))
    return total


def _dot(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    # Not `x @ y`: BLAS would bring threads of its own to each of ours, which was measured to be 5 to 50 times slower.
    return float(np.einsum("i,i->", x, y))


def _values(reader: RangeReader, name: str, info: TensorInfo) -> Values:
    if info.codec == RAW:
        return _raw_values(reader, name, info)
    if info.codec == FP8_BLOCK:
        return _fp8_values(reader, name, info)
    raise CheckpointError(f"{reader.index.source}: {name} is kept as {info.codec}, which is not decoded; leave it out")


def _raw_values(reader: RangeReader, name: str, info: TensorInfo) -> Values:
    piece, row_length = info.pieces[0], geometry_of(name, info.shape).row_length
    item_bytes = DTYPES[info.dtype].item_bits // 8

    def read(first_row: int, last_row: int, first_column: int, last_column: int) -> NDArray[Any]:
        data = np.empty((last_row - first_row) * (last_column - first_column) * item_bytes, np.uint8)
        reader.read_piece_into(piece, (first_row * row_length + first_column) * item_bytes, data)
        return decode(as_stored(data, info.dtype), info.dtype)

    return read


def _fp8_values(reader: RangeReader, name: str, info: TensorInfo) -> Values:
    codes, scale_piece = info.pieces
    block_rows, block_columns = read_quantization(reader.index.config, reader.index.source).block
    matrix_rows, row_length = info.shape[-2:]
    scales = decode(reader.read_piece(scale_piece), scale_piece.dtype).astype(np.float32)
    scale_rows = scales.shape[-2]
    scales = scales.reshape(-1, scales.shape[-1])

    def read(first_row: int, last_row: int, first_column: int, last_column: int) -> NDArray[Any]:
        data = np.empty((last_row - first_row, last_column - first_column), np.uint8)
        reader.read_piece_into(codes, first_row * row_length + first_column, data)
        matrices, rows = np.divmod(np.arange(first_row, last_row), matrix_rows)
        columns = np.arange(first_column, last_column) // block_columns
        spread = scales[(matrices * scale_rows + rows // block_rows)[:, None], columns]
        values: NDArray[Any] = decode(data, codes.dtype) * spread
        return values.reshape(-1)

    return read
