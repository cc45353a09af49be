"""Run a plan's units as Ray tasks: small plans in, files written by the workers, receipts out.

No tensor bytes pass through Ray's object store. A task is idempotent: a retry writes the same files under names of its
own and renames them. Lost workers and nodes cost the units that were under way there; Ray runs them again elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from remelt.errors import BudgetError, ExecutionError, NumericsError, RemeltError
from remelt.executor import Found, OnReceipt, Piece, Settings, finish_unit, shard_sinks
from remelt.memory import default_memory_bytes
from remelt.plan import MergePlan, RunSettings, Unit, UnitReceipt
from remelt.planner import Budget, plan_sizes
from remelt.survey import SurveyRequest, UnitCounts, measure_unit
from remelt.unit_runner import OnBytes, UnitRun, open_readers

Result = TypeVar("Result")

UNITS_PER_WORKER = 2
"""Units in the window for each worker, so that a worker finds the next one waiting."""
IO_SLOT = "io_slot"
"""Custom resource of a node: units that may read and write there at once."""
MAX_RETRIES = 3
"""For a worker or node that dies; errors of our own are not retried."""


def work_unit(settings: RunSettings, sizes: Any, unit: Unit, work_dirs: Sequence[str]) -> UnitReceipt:
    """One unit from open to receipt, in this process."""
    paths = [Path(directory) for directory in work_dirs]
    _check_numerics(settings)
    with ExitStack() as stack:
        readers = [stack.enter_context(reader) for reader in open_readers(settings)]
        run = UnitRun(unit, settings, sizes, readers, shard_sinks(unit, paths))
        run.work()
        return finish_unit(run, paths)


def survey_unit(settings: RunSettings, sizes: Any, unit: Unit, request: SurveyRequest) -> UnitCounts:
    """One pass of a survey over one unit, in this process."""
    with ExitStack() as stack:
        readers = [stack.enter_context(reader) for reader in open_readers(settings)]
        return measure_unit(unit, settings, sizes, readers, request)


def _check_numerics(settings: RunSettings) -> None:
    from remelt.numerics import numerics_tag

    mine = numerics_tag(settings.device)
    if mine != settings.numerics:
        raise NumericsError(
            f"the run computes with numerics {settings.numerics}, this worker with {mine}: their bytes may differ. "
            "Install the same version of remelt on every node"
        )


class RayExecutor:
    """Ray tasks on the cluster at RAY_ADDRESS, else on one started on the spot."""

    def __init__(
        self,
        *,
        num_workers: int | None = None,
        threads: int | None = None,
        memory_bytes: int | None = None,
        device: str = "cpu",
    ) -> None:
        """`num_workers` bounds the units at work at once; by default what the cluster's CPUs can hold.

        `threads` is for each worker (default 1), and what a task asks of Ray as CPUs.
        """
        self._threads = threads or 1
        self._num_workers = num_workers
        self._memory_bytes = memory_bytes
        self._device = device

    def budget(self) -> Budget:
        per_node = max(1, len(os.sched_getaffinity(0)) // self._threads)
        workers = min(self._num_workers or per_node, per_node)
        return Budget(
            memory_bytes=self._memory_bytes or default_memory_bytes(workers),
            threads=self._threads,
            num_workers=workers,
            device=self._device,
        )

    def run(
        self,
        plan: MergePlan,
        units: Sequence[Unit],
        work_dirs: Sequence[Path],
        on_bytes: OnBytes,
        on_receipt: OnReceipt,
    ) -> None:
        if not units:
            return
        import ray

        from remelt_jobs.ray_session import ray_session

        directories = [str(directory.absolute()) for directory in work_dirs]
        with ray_session():
            for receipt in self._map_plan(ray, plan, units, work_unit, directories):
                on_bytes(receipt.read_bytes + receipt.write_bytes)
                on_receipt(receipt)

    def measure(self, plan: MergePlan, request: SurveyRequest, on_bytes: OnBytes) -> Iterator[UnitCounts]:
        import ray

        from remelt_jobs.ray_session import ray_session

        with ray_session():
            for found in self._map_plan(ray, plan, plan.units, survey_unit, request):
                on_bytes(found.read_bytes)
                yield found

    def gather(
        self,
        function: Callable[[Settings, Piece], Found],
        settings: Settings,
        units: Sequence[Piece],
        projected_bytes: int,
    ) -> Iterator[Found]:
        import ray

        from remelt_jobs.ray_session import ray_session

        with ray_session():
            yield from self._map(ray, function, (settings,), units, (), projected_bytes)

    def _map_plan(
        self, ray: Any, plan: MergePlan, units: Sequence[Unit], function: Callable[..., Result], argument: object
    ) -> Iterator[Result]:
        shared = (plan.settings, plan_sizes(plan))
        return self._map(ray, function, shared, units, (argument,), plan.projection.total_bytes)

    def _map(
        self,
        ray: Any,
        function: Callable[..., Result],
        shared: Sequence[object],
        units: Sequence[Any],
        rest: Sequence[object],
        projected_bytes: int,
    ) -> Iterator[Result]:
        """Results of `function(*shared, unit, *rest)` as they come, from a bounded window of Ray tasks."""
        self._check_fits(ray, projected_bytes)
        remote = ray.remote(function).options(
            num_cpus=self._threads,
            num_gpus=1 if self._device == "cuda" else 0,
            memory=projected_bytes,
            resources=self._io_slot(ray),
            max_retries=MAX_RETRIES,
            scheduling_strategy="SPREAD",
            name="remelt.unit",
        )
        # Put once: every task would otherwise carry the file tables of all checkpoints.
        references = [ray.put(value) for value in shared]
        waiting = list(reversed(units))
        running: dict[Any, Any] = {}
        window = self._window(ray)
        try:
            while waiting or running:
                while waiting and len(running) < window:
                    unit = waiting.pop()
                    running[remote.remote(*references, unit, *rest)] = unit
                (done,), _ = ray.wait(list(running), num_returns=1)
                yield _get(ray, done, running.pop(done))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _check_fits(self, ray: Any, projected_bytes: int) -> None:
        """Refuse what no node could ever hold: Ray would wait for such a node without a word."""
        asked = {"CPU": self._threads, "GPU": int(self._device == "cuda"), "memory": projected_bytes}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
            found = "; ".join(str({name: node.get(name, 0) for name in asked}) for node in nodes)
            raise BudgetError(
                f"no node of the cluster holds a worker: one asks for {asked}, the nodes have {found}. "
                "Give fewer --threads or less --memory, or add a node"
            )

    @staticmethod
    def _io_slot(ray: Any) -> dict[str, float]:
        """One `io_slot` for each unit, on clusters whose nodes declare how many streams their disks bear."""
        return {IO_SLOT: 1} if ray.cluster_resources().get(IO_SLOT) else {}

    def _window(self, ray: Any) -> int:
        if self._num_workers is not None:
            return self._num_workers
        cpus = int(ray.cluster_resources().get("CPU", 1))
        return max(1, cpus // self._threads) * UNITS_PER_WORKER


def _get(ray: Any, reference: Any, unit: Any) -> Any:
    """The result of a finished task; our own errors as they were raised, anything else named with its unit."""
    try:
        result = ray.get(reference)
    except ray.exceptions.RayTaskError as failure:
        cause = failure.cause
        if isinstance(cause, RemeltError):
            raise cause from None
        raise ExecutionError(
            f"unit {unit.file} failed: {cause!r}; resubmit to resume after mending the cause"
        ) from failure
    except ray.exceptions.RayError as failure:
        raise ExecutionError(
            f"unit {unit.file} was lost {MAX_RETRIES + 1} times ({type(failure).__name__}); its worker or node died "
            "each time, often for want of memory: give a lower --memory or fewer workers, then resubmit to resume"
        ) from failure
    return result
