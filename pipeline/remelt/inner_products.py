"""Inner products of one checkpoint, a gradient, with every checkpoint of a pool: one pass of reading, on any executor.

The linear minimisation oracle of Frank-Wolfe needs nothing else of the pool. A thread holds one block of the gradient,
of the base and of one checkpoint at a time, so memory grows neither with the pool nor with its checkpoints; what comes
back is a number for each tensor and checkpoint, from which layers and the whole model are sums.

Bits depend on the files alone: products of float32 values are exact in float64, each leaf is summed by one thread in a
fixed order of lanes, leaves are added in their order (see `remelt.kernels.program`). Block size, threads, units and
executors change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remelt.checkpoint import CheckpointIndex, TensorInfo
from remelt.dtypes import DTYPES
from remelt.errors import BudgetError, MismatchError, NonFiniteError, NumericsError
from remelt.kernels.program import geometry_of
from remelt.memory import (
    BLOCK_ELEMENTS,
    FIXED_BYTES,
    MIB,
    PLAN_SOURCE_BYTES,
    PLAN_TENSOR_BYTES,
    block_rows,
    default_memory_bytes,
)
from remelt.numerics import numerics_tag
from remelt.oracle import TensorProducts
from remelt.plan import ModelFiles, Projection, model_files
from remelt.planner import Budget
from remelt.range_reader import RangeReader

UNIT_BYTES = (64 * MIB, 1024 * MIB)
"""Bounds on the gradient's bytes in one unit; between them a 256th of the whole, so that a cluster has enough to do."""
UNITS_OF_A_MODEL = 256
WAITING_BLOCKS = 4
"""Blocks for each thread whose sums may wait for an earlier block's."""

Sums = NDArray[np.float64]
"""A row for each tensor: products with the V checkpoints, squares of them, and the square of the gradient."""


class ProductTensor(NamedTuple):
    """One tensor of the gradient, and where its counterparts lie."""

    name: str
    gradient: TensorInfo
    base: TensorInfo | None
    pool_V: tuple[TensorInfo | None, ...]
    """None for the base itself among the vertices: its task vector is zero, and it is not read."""

    @property
    def read_bytes(self) -> int:
        infos = (self.gradient, self.base, *self.pool_V)
        return sum(info.nbytes for info in infos if info is not None)


class ProductUnit(NamedTuple):
    """A piece of the pass: tensors that follow each other on disk."""

    file: str
    """What errors call it."""
    tensors: tuple[ProductTensor, ...]


@dataclass(frozen=True, slots=True)
class ProductSettings:
    """What a worker must know beside a unit."""

    gradient: ModelFiles
    base: ModelFiles | None
    pool_V: tuple[ModelFiles, ...]
    threads: int
    block_elements: int
    buffer_bytes: int
    """Of each of a thread's three blocks."""
    with_squares: bool
    numerics: str


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """One pass, decided from headers alone."""

    settings: ProductSettings
    units: tuple[ProductUnit, ...]
    projection: Projection

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for unit in self.units for tensor in unit.tensors)

    @property
    def read_bytes(self) -> int:
        """Bytes that the pass reads: every tensor of every checkpoint once."""
        return sum(tensor.read_bytes for unit in self.units for tensor in unit.tensors)


class UnitSums(NamedTuple):
    """What the pass found in one unit."""

    names_T: tuple[str, ...]
    sums: Sums
    read_bytes: int


def plan_products(
    gradient: CheckpointIndex,
    pool_V: Sequence[CheckpointIndex],
    *,
    base: CheckpointIndex | None = None,
    names: Collection[str] | None = None,
    with_squares: bool = False,
    budget: Budget | None = None,
) -> ProductPlan:
    """Plan a pass over the tensors of `gradient`, or those of them in `names`.

    Args:
        gradient: tensors of floating dtype under the names of the pool.
        pool_V: the vertices; one of them may be the base.
        base: where given, vertices are task vectors: checkpoint minus base, rounded to float32 as operators do.
        with_squares: also sum the vertices' squares, for cosines.

    Raises:
        MismatchError: a checkpoint lacks a tensor of the gradient, or has it in another shape or no plain float dtype.
        BudgetError: the smallest blocks do not fit the allowance.
    """
    budget = budget or Budget()
    vertices = [None if base is not None and vertex.root == base.root else vertex for vertex in pool_V]
    chosen = [name for name in gradient.tensors if names is None or name in names]
    tensors = [
        ProductTensor(
            name,
            _checked(gradient, name, gradient.tensors[name]),
            None if base is None else _checked(base, name, gradient.tensors[name]),
            tuple(None if each is None else _checked(each, name, gradient.tensors[name]) for each in vertices),
        )
        for name in chosen
    ]
    block_elements, buffer_bytes, projection = _project(tensors, len(pool_V), budget)
    settings = ProductSettings(
        model_files(gradient, -1),
        None if base is None else model_files(base, -1),
        tuple(model_files(vertex, -1) for vertex in pool_V),
        budget.threads,
        block_elements,
        buffer_bytes,
        with_squares,
        numerics_tag("cpu"),
    )
    return ProductPlan(settings, tuple(_cut(tensors)), projection)


def _checked(index: CheckpointIndex, name: str, wanted: TensorInfo) -> TensorInfo:
    info = index.tensors.get(name)
    if info is None:
        raise MismatchError(
            f"{index.source} lacks {name!r}, for which there is a gradient; a pool shares one architecture. "
            "Leave the tensor out of the selection by a rule that copies it"
        )
    if info.shape != wanted.shape:
        raise MismatchError(
            f"{name} is {list(info.shape)} in {index.source}, its gradient {list(wanted.shape)}; a pool shares one "
            "architecture. Leave the tensor out of the selection by a rule that copies it"
        )
    if not info.is_mergeable:
        raise MismatchError(
            f"{name} is {info.codec} {info.dtype} in {index.source}: inner products are taken of plain floating data "
            "of 16 bits or more; dequantise the checkpoint first, or leave the tensor out by a rule that copies it"
        )
    return info


def _cut(tensors: Sequence[ProductTensor]) -> Iterator[ProductUnit]:
    """Units of consecutive tensors. How they are cut changes no bit."""
    total = sum(tensor.gradient.nbytes for tensor in tensors)
    wanted = min(max(total // UNITS_OF_A_MODEL, UNIT_BYTES[0]), UNIT_BYTES[1])
    group: list[ProductTensor] = []
    number = size = 0
    for tensor in tensors:
        if group and size + tensor.gradient.nbytes > wanted:
            yield ProductUnit(f"inner products {number}", tuple(group))
            group, size, number = [], 0, number + 1
        group.append(tensor)
        size += tensor.gradient.nbytes
    if group:
        yield ProductUnit(f"inner products {number}", tuple(group))


def _project(tensors: Sequence[ProductTensor], num_vertices: int, budget: Budget) -> tuple[int, int, Projection]:
    """The largest blocks that fit the allowance, and what the pass holds with them."""
    allowed = budget.memory_bytes or default_memory_bytes(budget.num_workers)
    num_columns = 2 * num_vertices + 1
    known = PLAN_TENSOR_BYTES * len(tensors) + (PLAN_SOURCE_BYTES + 2 * 8) * len(tensors) * (num_vertices + 2)
    for block_elements in BLOCK_ELEMENTS:
        largest = leaves = 0
        for tensor in tensors:
            geometry = geometry_of(tensor.name, tensor.gradient.shape)
            rows = min(block_rows(geometry, block_elements), geometry.num_rows)
            infos = [info for info in (tensor.gradient, tensor.base, *tensor.pool_V) if info is not None]
            itemsize = max(DTYPES[info.dtype].item_bits for info in infos) // 8
            largest = max(largest, rows * geometry.row_length * itemsize)
            leaves = max(leaves, -(-rows // geometry.leaf_rows))
        waiting = (WAITING_BLOCKS + 1) * budget.threads * leaves * num_columns * 8
        terms = (
            ("fixed", FIXED_BYTES),
            ("plan and sums", known),
            (f"blocks of {budget.threads} threads", 3 * budget.threads * largest),
            ("sums of blocks that wait", waiting),
        )
        needed = sum(size for _, size in terms)
        if needed <= allowed:
            return block_elements, largest, Projection(terms, allowed)
    raise BudgetError(
        f"memory: asked to stay within {allowed / MIB:.0f} MiB, inner products with {num_vertices} checkpoints need "
        f"{needed / MIB:.0f} MiB ({', '.join(f'{name} {size / MIB:.1f}' for name, size in terms)}); "
        f"give {-(-needed // MIB)}MiB or more, or fewer threads than {budget.threads}"
    )


def measure_products(settings: ProductSettings, unit: ProductUnit) -> UnitSums:
    """The pass over one unit, with all threads, in this process.

    Raises:
        NonFiniteError: NaN or infinity in a tensor or its gradient.
        NumericsError: this process would compute with other kernels than the plan's.
    """
    if (mine := numerics_tag("cpu")) != settings.numerics:
        raise NumericsError(
            f"the pass computes with numerics {settings.numerics}, this worker with {mine}: install the same version "
            "of remelt on every node"
        )
    with ExitStack() as stack:

        def reader(files: ModelFiles) -> RangeReader:
            return stack.enter_context(RangeReader(CheckpointIndex(files.source, files.root, "", files.files, {})))

        run = _UnitRun(
            settings,
            unit,
            reader(settings.gradient),
            None if settings.base is None else reader(settings.base),
            [reader(files) for files in settings.pool_V],
        )
        return run.work()


class _Block(NamedTuple):
    place: int
    """In the order in which sums are added."""
    tensor: int
    first_element: int
    num_elements: int
    leaf_elements: int


class _UnitRun:
    """Threads that take the blocks of a unit one by one."""

    def __init__(
        self,
        settings: ProductSettings,
        unit: ProductUnit,
        gradient: RangeReader,
        base: RangeReader | None,
        pool_V: Sequence[RangeReader],
    ) -> None:
        self._settings, self._unit = settings, unit
        self._gradient, self._base, self._pool_V = gradient, base, pool_V
        self._blocks = self._cut_blocks()
        self._changed = threading.Condition()
        self._sums: Sums = np.zeros((len(unit.tensors), 2 * len(pool_V) + 1))
        self._waiting: dict[int, tuple[int, Sums]] = {}
        self._next = 0
        self._read_bytes = 0
        self._failure: BaseException | None = None

    def work(self) -> UnitSums:
        threads = [
            threading.Thread(target=self._run_worker, name=f"remelt-products-{number}", daemon=True)
            for number in range(1, self._settings.threads)
        ]
        for thread in threads:
            thread.start()
        self._run_worker()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        self._refuse_nonfinite()
        return UnitSums(tuple(tensor.name for tensor in self._unit.tensors), self._sums, self._read_bytes)

    def _cut_blocks(self) -> Iterator[_Block]:
        place = 0
        for number, tensor in enumerate(self._unit.tensors):
            geometry = geometry_of(tensor.name, tensor.gradient.shape)
            rows = block_rows(geometry, self._settings.block_elements)
            for first in range(0, geometry.num_rows, rows):
                size = (min(first + rows, geometry.num_rows) - first) * geometry.row_length
                leaf_elements = geometry.leaf_rows * geometry.row_length
                yield _Block(place, number, first * geometry.row_length, size, leaf_elements)
                place += 1

    def _run_worker(self) -> None:
        try:
            buffers = [np.empty(self._settings.buffer_bytes, np.uint8) for _ in range(3)]
            while self._failure is None:
                with self._changed:
                    block = next(self._blocks, None)
                if block is None:
                    return
                leaves, read_bytes = self._measure(block, buffers)
                self._add(block, leaves, read_bytes)
        except BaseException as failure:  # handed to the thread that called work()
            with self._changed:
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _measure(self, block: _Block, buffers: Sequence[NDArray[np.uint8]]) -> tuple[Sums, int]:
        """The sums of each leaf of a block, (leaves, columns), and the bytes that were read for them."""
        from remelt.kernels.codec import KINDS
        from remelt.kernels.cpu_sources import address_of
        from remelt.kernels.dots import dots_of_leaves

        tensor, num_vertices = self._unit.tensors[block.tensor], len(self._pool_V)
        leaves = np.zeros((-(-block.num_elements // block.leaf_elements), 2 * num_vertices + 1))
        read_bytes = 0

        def read(reader: RangeReader, info: TensorInfo, buffer: NDArray[np.uint8]) -> tuple[int, int]:
            nonlocal read_bytes
            itemsize = DTYPES[info.dtype].item_bits // 8
            view = buffer[: block.num_elements * itemsize]
            reader.read_into(info, block.first_element * itemsize, view)
            read_bytes += view.nbytes
            return address_of(view), KINDS[info.dtype]

        sums = np.zeros((len(leaves), 2))
        gradient = read(self._gradient, tensor.gradient, buffers[0])
        base = (0, 0)
        if tensor.base is not None and self._base is not None:
            base = read(self._base, tensor.base, buffers[1])
        if self._settings.with_squares:
            dots_of_leaves(*gradient, 0, 0, *gradient, False, False, block.leaf_elements, block.num_elements, sums)
            leaves[:, -1] = sums[:, 0]
        for number, info in enumerate(tensor.pool_V):
            if info is None:
                continue
            vertex = read(self._pool_V[number], info, buffers[2])
            dots_of_leaves(
                *gradient,
                *base,
                *vertex,
                tensor.base is not None,
                self._settings.with_squares,
                block.leaf_elements,
                block.num_elements,
                sums,
            )
            leaves[:, number], leaves[:, num_vertices + number] = sums[:, 0], sums[:, 1]
        return leaves, read_bytes

    def _add(self, block: _Block, leaves: Sums, read_bytes: int) -> None:
        """Add leaf after leaf in the order of the blocks, whichever thread comes first."""
        limit = WAITING_BLOCKS * self._settings.threads
        with self._changed:
            self._changed.wait_for(lambda: block.place < self._next + limit or self._failure is not None)
            self._read_bytes += read_bytes
            self._waiting[block.place] = (block.tensor, leaves)
            while (entry := self._waiting.pop(self._next, None)) is not None:
                tensor, found = entry
                for leaf in found:
                    self._sums[tensor] += leaf
                self._next += 1
            self._changed.notify_all()

    def _refuse_nonfinite(self) -> None:
        bad = np.argwhere(~np.isfinite(self._sums))
        if len(bad):
            tensor, column = (int(number) for number in bad[0])
            num_vertices = len(self._pool_V)
            source = (
                self._settings.gradient if column == 2 * num_vertices else self._settings.pool_V[column % num_vertices]
            )
            raise NonFiniteError(
                f"the inner product of {self._unit.tensors[tensor].name} of {source.source} with the gradient is no "
                "number: NaN or infinity in one of them. Repair the checkpoint or leave it out of the pool; where the "
                "gradient is at fault, the merge it was taken at gives no finite loss"
            )


def collect(plan: ProductPlan, found: Sequence[UnitSums]) -> TensorProducts:
    """The units' sums as one table, in the plan's order of tensors."""
    rows = {name: row for unit in found for name, row in zip(unit.names_T, unit.sums, strict=True)}
    num_vertices = len(plan.settings.pool_V)
    table = np.array([rows[name] for name in plan.names]).reshape(-1, 2 * num_vertices + 1)
    return TensorProducts(plan.names, table[:, :num_vertices], table[:, num_vertices : 2 * num_vertices], table[:, -1])
