"""Projected memory: how much a run of a unit holds, as a plain sum of named terms, and what a process may hold.

The planner refuses a plan whose sum is above its allowance before any tensor data is read; the runner sizes its
buffers by the same function, so the projection is what is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from remelt.dtypes import DTYPES
from remelt.errors import BudgetError
from remelt.kernels.footprint import needs_whole_tensor, num_rounds, program_bytes
from remelt.kernels.program import Geometry, geometry_of
from remelt.operators import OPERATORS
from remelt.plan import PlannedTensor, Projection
from remelt.recipe_checks import installed_operators
from remelt.shard_file import NUM_STAGING, STAGING_BYTES
from remelt.treatment import Apply

KIB, MIB = 1024, 1024 * 1024
BLOCK_ELEMENTS = (524_288, 262_144, 131_072, 65_536, 32_768, 16_384)
"""Aimed block sizes, largest first: a 16-bit source of the first fits a second-level cache, and the work of such a
block is long against what Python takes to hand it out."""
SHARDS_OPEN = 2
"""Shards of a coefficient set that hold buffers: one is written while the last one is synced."""
COPY_BLOCK_BYTES = MIB
FIXED_BYTES = 24 * MIB
"""Thread stacks and allocator slack, beyond idle imports: those of numba and its compiled kernels are imports too."""
TENSOR_RECORD_BYTES = 750
"""Digest and receipt of one source or output tensor while its unit runs."""
PLAN_TENSOR_BYTES, PLAN_SOURCE_BYTES = 4000, 220
"""Of the whole run: for each output tensor (its header entry, plan and manifest), and for each of its sources."""
ARENA_ALIGNMENT = 64
TORCH_COPIES = 4
"""float32 copies of a block and its sources that a torch function holds at its peak, on the host or the device."""
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


def tensor_block_rows(tensor: PlannedTensor, geometry: Geometry, block_elements: int, device: str) -> int:
    """Rows of a tensor's blocks; all of them where a program of its takes the tensor as one block."""
    if any(_takes_whole(treatment, device) for treatment in tensor.treatments if isinstance(treatment, Apply)):
        return max(1, geometry.num_rows)
    return block_rows(geometry, block_elements)


def has_kernel(apply: Apply, device: str) -> bool:
    """Whether a CPU kernel runs it, in rounds; a torch function runs everything else, on whole tensors or rows."""
    return device == "cpu" and apply.operator in OPERATORS


def _takes_whole(apply: Apply, device: str) -> bool:
    if has_kernel(apply, device):
        return needs_whole_tensor(apply)
    operator = installed_operators()[apply.operator]
    return operator.scope in ("tensor", "matrix") or dict(apply.options).get("rescale") == "l1"


def rounds_of(tensor: PlannedTensor, device: str) -> int:
    """Measuring rounds over a tensor's sources, at most."""
    applies = (treatment for treatment in tensor.treatments if isinstance(treatment, Apply))
    return max((num_rounds(apply) for apply in applies if has_kernel(apply, device)), default=0)


def held_bytes(tensor: PlannedTensor, device: str) -> int:
    """Bytes in the arena of a tensor whose sources are needed in more than one round, else 0."""
    return -(-tensor.read_bytes // ARENA_ALIGNMENT) * ARENA_ALIGNMENT if rounds_of(tensor, device) else 0


class _Demand(NamedTuple):
    """What the tensors of a run ask of buffers, at one block size."""

    source_bytes: int
    output_bytes: int
    program_bytes: int
    held_bytes: tuple[int, ...]
    """Of the tensors that want to be kept between rounds, largest first."""


def _demand(tensors: Iterable[PlannedTensor], threads: int, block_elements: int, device: str) -> _Demand:
    source, output, program = 0, 0, 0
    held: set[int] = set()
    seen: set[tuple[object, ...]] = set()
    for tensor in tensors:
        dtypes = tuple(info.dtype for _, info in tensor.sources)
        key = (tensor.shape, tensor.stored.dtype, dtypes, tensor.treatments)
        if key in seen:
            continue
        seen.add(key)
        if tensor.is_copy:
            output = max(output, min(COPY_BLOCK_BYTES, tensor.write_bytes))
            continue
        geometry = geometry_of(tensor.name, tensor.shape)
        rows = min(tensor_block_rows(tensor, geometry, block_elements, device), geometry.num_rows)
        elements = rows * geometry.row_length
        source = max(source, sum(elements * DTYPES[info.dtype].item_bits // 8 for _, info in tensor.sources))
        output = max(output, elements * DTYPES[tensor.stored.dtype].item_bits // 8)
        program = max(
            program,
            sum(
                program_bytes(treatment, geometry, threads, block_elements)
                if has_kernel(treatment, device)
                else threads * TORCH_COPIES * (len(treatment.models) + 1) * elements * 4
                for treatment in tensor.treatments
                if isinstance(treatment, Apply)
            ),
        )
        if need := held_bytes(tensor, device):
            held.add(need)
    return _Demand(source, output, program, tuple(sorted(held, reverse=True)))


def project(
    tensors: Sequence[PlannedTensor],
    *,
    num_records: int,
    threads: int,
    num_sets: int,
    allowed_bytes: int,
    device: str = "cpu",
) -> tuple[Sizes, Projection]:
    """Choose buffer sizes for running these tensors within the allowance, and say what they come to.

    `num_records` counts source and output tensors of the largest unit. Raises BudgetError where the smallest sizes are
    above the allowance, with both numbers and what would do.
    """
    num_outputs = threads + 2
    plan_bytes = PLAN_TENSOR_BYTES * len(tensors) + PLAN_SOURCE_BYTES * sum(len(tensor.sources) for tensor in tensors)
    for block_elements, num_tensors in _CHOICES:
        demand = _demand(tensors, threads, block_elements, device)
        terms = [
            ("fixed", FIXED_BYTES),
            ("plan", plan_bytes),
            ("records of a unit", TENSOR_RECORD_BYTES * num_records),
            (f"source blocks of {threads} threads", threads * demand.source_bytes),
            (f"{num_outputs} output blocks", num_outputs * num_sets * demand.output_bytes),
            ("shards being written", SHARDS_OPEN * num_sets * NUM_STAGING * STAGING_BYTES),
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
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _cgroup_limit_files():
        with suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    return min(limits)


def _cgroup_limit_files() -> list[Path]:
    """Limits of this process's cgroup and of those around it; a job scheduler sets its own below the root's."""
    root = Path("/sys/fs/cgroup")
    folders = [(root, "memory.max"), (root / "memory", "memory.limit_in_bytes")]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, file = folders[1] if controllers else folders[0]
            inner = top / name.lstrip("/")
            folders += [(folder, file) for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return [folder / file for folder, file in folders]


def default_memory_bytes(num_workers: int = 1) -> int:
    """Half of what the machine gives, over the number of workers on it."""
    return machine_memory_bytes() // 2 // num_workers


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
