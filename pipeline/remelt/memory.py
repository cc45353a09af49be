"""Projected memory: how much a run of a unit holds, as a plain sum of named terms, and what a process may hold.

The planner refuses a plan whose sum is above its allowance before any tensor data is read; the runner sizes its
buffers by the same function, so the projection is what is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from remelt.dtypes import DTYPES
from remelt.errors import BudgetError
from remelt.kernels.footprint import num_rounds, program_bytes
from remelt.kernels.program import Geometry, geometry_of
from remelt.plan import PlannedTensor, Projection
from remelt.treatment import Apply

KIB, MIB = 1024, 1024 * 1024
BLOCK_ELEMENTS = (131_072, 65_536, 32_768, 16_384)
"""Aimed block sizes, largest first: a block of five 16-bit sources of the first size fits a 2 MB cache."""
COPY_BLOCK_BYTES = MIB
FIXED_BYTES = 24 * MIB
"""Compiled kernels, thread stacks, allocator slack: measured at 14 to 20 MiB beyond idle imports."""
TENSOR_RECORD_BYTES = 600
"""Plan entry, digest and receipt of one source or output tensor while its unit runs."""
TENSORS_IN_FLIGHT = 3
"""Tensors that may be worked together, so that no thread waits at the end of a tensor's round."""
_CHOICES = (*((block, TENSORS_IN_FLIGHT) for block in BLOCK_ELEMENTS), (BLOCK_ELEMENTS[-1], 2), (BLOCK_ELEMENTS[-1], 1))
"""(block elements, tensors in flight), the quickest first."""


class Sizes(NamedTuple):
    """Buffer sizes of a run; results never depend on them."""

    block_elements: int
    source_bytes: int
    """For each worker: one block of every source."""
    output_bytes: int
    """One output block of one coefficient set."""
    num_outputs: int
    """Output blocks in flight."""
    num_tensors: int
    """Tensors in flight."""
    arena_bytes: int
    """For tensors kept whole between their rounds; a tensor that does not fit is read again for each round."""


def block_rows(geometry: Geometry, block_elements: int) -> int:
    """Rows of a block: as many whole leaves as come nearest below `block_elements`, one at least."""
    leaf_elements = geometry.leaf_rows * max(1, geometry.row_length)
    return max(1, block_elements // leaf_elements) * geometry.leaf_rows


def held_bytes(tensor: PlannedTensor) -> int:
    """Bytes of all sources of a tensor whose operator needs more than one round over them, else 0."""
    applies = (treatment for treatment in tensor.treatments if isinstance(treatment, Apply))
    return tensor.read_bytes if any(num_rounds(apply) for apply in applies) else 0


class _Demand(NamedTuple):
    """What the tensors of a run ask of buffers, at one block size."""

    source_bytes: int
    output_bytes: int
    program_bytes: int
    held_bytes: tuple[int, ...]
    """Of the tensors that want to be kept between rounds, largest first."""


def _demand(tensors: Iterable[PlannedTensor], threads: int, block_elements: int) -> _Demand:
    source, output, program = 0, 0, 0
    held: set[int] = set()
    seen: set[tuple[object, ...]] = set()
    for tensor in tensors:
        key = (tensor.shape, tensor.stored.dtype, len(tensor.sources), tensor.treatments)
        if key in seen:
            continue
        seen.add(key)
        if tensor.is_copy:
            output = max(output, min(COPY_BLOCK_BYTES, tensor.write_bytes))
            continue
        geometry = geometry_of(tensor.name, tensor.shape)
        rows = min(block_rows(geometry, block_elements), geometry.num_rows)
        elements = rows * geometry.row_length
        source = max(source, sum(elements * DTYPES[info.dtype].item_bits // 8 for _, info in tensor.sources))
        output = max(output, elements * DTYPES[tensor.stored.dtype].item_bits // 8)
        program = max(
            program,
            sum(program_bytes(t, geometry, threads, block_elements) for t in tensor.treatments if isinstance(t, Apply)),
        )
        if need := held_bytes(tensor):
            held.add(need)
    return _Demand(source, output, program, tuple(sorted(held, reverse=True)))


def project(
    tensors: Sequence[PlannedTensor], *, num_records: int, threads: int, num_sets: int, allowed_bytes: int
) -> tuple[Sizes, Projection]:
    """Choose buffer sizes for running these tensors within the allowance, and say what they come to.

    `num_records` counts source and output tensors of the largest unit. Raises BudgetError where the smallest sizes are
    above the allowance, with both numbers and what would do.
    """
    num_outputs = threads + 2
    for block_elements, num_tensors in _CHOICES:
        demand = _demand(tensors, threads, block_elements)
        terms = [
            ("fixed", FIXED_BYTES),
            ("records", TENSOR_RECORD_BYTES * num_records),
            (f"source blocks of {threads} threads", threads * demand.source_bytes),
            (f"{num_outputs} output blocks", num_outputs * num_sets * demand.output_bytes),
            (f"operator state of {num_tensors} tensors", num_tensors * demand.program_bytes),
        ]
        needed = sum(size for _, size in terms)
        if needed <= allowed_bytes:
            break
    else:
        raise BudgetError(
            f"memory: asked to stay within {allowed_bytes / MIB:.0f} MiB, the smallest plan needs "
            f"{needed / MIB:.0f} MiB ({', '.join(f'{name} {size / MIB:.1f}' for name, size in terms)}); "
            f"give --memory {-(-needed // MIB)}MiB or more, or fewer --threads than {threads}"
        )
    free = allowed_bytes - needed
    fitting = [need for need in demand.held_bytes if need <= free]
    arena = min(free, sum(fitting[:1]) + (num_tensors - 1) * (fitting[min(1, len(fitting) - 1)] if fitting else 0))
    if arena:
        terms.append(("tensors kept between rounds", arena))
    sizes = Sizes(block_elements, demand.source_bytes, demand.output_bytes, num_outputs, num_tensors, arena)
    return sizes, Projection(tuple(terms), allowed_bytes)


def machine_memory_bytes() -> int:
    """Memory that this machine or its cgroup gives us, whichever is less."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists():
            text = path.read_text().strip()
            if text.isdigit():
                limit = min(limit, int(text))
    return limit


def default_memory_bytes(num_workers: int = 1) -> int:
    """Half of what the machine gives, over the number of workers on it."""
    return machine_memory_bytes() // 2 // num_workers


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
