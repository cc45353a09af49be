"""Executors run a plan's units; all of them write the same bytes.

An executor is told which units are still to do and where their shards and receipts go, and calls back as each receipt
is on disk. What a unit is, and how it is worked, is not its business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

from remelt.errors import ExecutionError
from remelt.memory import default_memory_bytes
from remelt.plan import MergePlan, Unit, UnitReceipt
from remelt.planner import Budget, plan_sizes
from remelt.receipts import SHARDS, write_receipt
from remelt.sinks import ShardSink
from remelt.survey import SurveyRequest, UnitCounts, measure_unit
from remelt.unit_runner import OnBytes, UnitRun, open_readers

OnReceipt = Callable[[UnitReceipt], None]
Settings = TypeVar("Settings")
Piece = TypeVar("Piece")
Found = TypeVar("Found")


class Executor(Protocol):
    """Runs units somewhere."""

    def budget(self) -> Budget:
        """What one of its processes may use; the plan is made for it."""
        ...

    def run(
        self,
        plan: MergePlan,
        units: Sequence[Unit],
        work_dirs: Sequence[Path],
        on_bytes: OnBytes,
        on_receipt: OnReceipt,
    ) -> None:
        """Work the units; `work_dirs` has one directory for each coefficient set, with `shards` and `receipts` in it.

        Raises the first failure that retries cannot mend; receipts written so far stay.
        """
        ...

    def measure(self, plan: MergePlan, request: SurveyRequest, on_bytes: OnBytes) -> Iterator[UnitCounts]:
        """One pass of a survey over the plan's units, in any order."""
        ...

    def gather(
        self,
        function: Callable[[Settings, Piece], Found],
        settings: Settings,
        units: Sequence[Piece],
        projected_bytes: int,
    ) -> Iterator[Found]:
        """`function(settings, unit)` of each unit, in any order: a pass that only reads.

        `function` is of a module's top level; each unit has a `file` that errors call it by; `projected_bytes` is what
        one process holds.
        """
        ...


class LocalExecutor:
    """Threads in this process, one unit after another."""

    def __init__(self, *, threads: int | None = None, memory_bytes: int | None = None, device: str = "cpu") -> None:
        self._threads = threads or len(os.sched_getaffinity(0))
        self._memory_bytes = memory_bytes
        self._device = device

    def budget(self) -> Budget:
        if self._device == "cuda":
            _check_cuda()
        return Budget(
            memory_bytes=self._memory_bytes or default_memory_bytes(), threads=self._threads, device=self._device
        )

    def run(
        self,
        plan: MergePlan,
        units: Sequence[Unit],
        work_dirs: Sequence[Path],
        on_bytes: OnBytes,
        on_receipt: OnReceipt,
    ) -> None:
        sizes = plan_sizes(plan)
        with ExitStack() as stack:
            readers = open_readers(plan.settings)
            for reader in readers:
                stack.enter_context(reader)
            # Syncing one unit's shards to the disk overlaps with the next unit's work.
            finisher = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="remelt-sync"))
            pending: Future[UnitReceipt] | None = None
            for unit in units:
                run = UnitRun(unit, plan.settings, sizes, readers, shard_sinks(unit, work_dirs), on_bytes)
                try:
                    run.work()
                finally:
                    if pending is not None:
                        on_receipt(pending.result())
                        pending = None
                pending = finisher.submit(finish_unit, run, work_dirs)
            if pending is not None:
                on_receipt(pending.result())

    def measure(self, plan: MergePlan, request: SurveyRequest, on_bytes: OnBytes) -> Iterator[UnitCounts]:
        sizes = plan_sizes(plan)
        with ExitStack() as stack:
            readers = [stack.enter_context(reader) for reader in open_readers(plan.settings)]
            for unit in plan.units:
                found = measure_unit(unit, plan.settings, sizes, readers, request)
                on_bytes(found.read_bytes)
                yield found

    def gather(
        self,
        function: Callable[[Settings, Piece], Found],
        settings: Settings,
        units: Sequence[Piece],
        projected_bytes: int,
    ) -> Iterator[Found]:
        for unit in units:
            yield function(settings, unit)


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ExecutionError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here; use --device cpu, or install a CUDA "
            "build of torch where there is a device"
        )


def shard_sinks(unit: Unit, work_dirs: Sequence[Path]) -> list[ShardSink]:
    """A shard file for each coefficient set, under its work directory."""
    return [ShardSink(directory / SHARDS, unit.file, unit.tensors) for directory in work_dirs]


def finish_unit(run: UnitRun, work_dirs: Sequence[Path]) -> UnitReceipt:
    """Make a worked unit durable: shards first, then in each work directory the receipt of its coefficient set."""
    receipt = run.finish()
    for directory, own in zip(work_dirs, receipt.split(run.unit.set_ids), strict=True):
        write_receipt(directory, own)
    return receipt.without_parents()
