"""Evaluators as Ray actors: a fixed number of slots, each with an actor that is replaced when lost or unsound."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from remelt.errors import StudyError
from remelt_evals.backends import BackendOptions
from remelt_jobs.study_config import Evaluators
from remelt_jobs.trial import Outcome, TrialEvaluator, Work

MAX_LOSSES = 2
"""How often a piece of work may lose its evaluator and be tried on a new one; it may be what kills them."""

MAX_START_FAILURES = 3

CLOSE_SECONDS = 5.0
"""For evaluators without work to remove their temporary files at the end."""

GROWTH_BYTES = 1 << 30
"""An evaluator is replaced when its memory has doubled since its first candidate, and grown by at least this."""


@dataclass(slots=True)
class _Job:
    works: Mapping[str, Work]
    """Candidates that are merged together, by key."""
    losses: int = 0

    def fail(self, reason: str) -> dict[str, Outcome]:
        return {key: Outcome(failure=reason) for key in self.works}

    def split(self) -> list[_Job]:
        """A job for each candidate, so that one cannot take the others with it again."""
        return [_Job({key: work}, self.losses) for key, work in self.works.items()]


@dataclass(slots=True)
class _Slot:
    """An actor with what it is doing: starting (no job, a reference), idle (neither), or at work (both)."""

    number: int
    actor: Any
    reference: Any
    since: float
    group: Any = None
    """The placement group of an evaluator of several nodes."""
    is_up: bool = False
    job: _Job | None = None
    first_bytes: dict[int, int] = field(default_factory=dict)
    """Memory after the first job with so many candidates."""
    pid: int = 0

    def has_grown(self, num_candidates: int, memory_bytes: int) -> bool:
        """Whether it holds far more than after its first job of this size."""
        return has_grown(self.first_bytes.setdefault(num_candidates, memory_bytes), memory_bytes)


@dataclass(slots=True)
class EvaluatorPool:
    """Runs pieces of work on evaluators, `submit` and `wait`.

    Args:
        evaluators: How many, what each asks of the cluster, and the time-outs.
        backend: What runs the model.
        name: The study's name for its scratch folders.
        fence: The driver's fence: evaluators clear what those of earlier drivers left.
    """

    evaluators: Evaluators
    backend: BackendOptions
    name: str
    fence: int
    _slots: list[_Slot] = field(default_factory=list)
    _lost: list[_Job] = field(default_factory=list)
    _start_failures: int = 0

    def __enter__(self) -> Self:
        self._slots = [self._start(number) for number in range(self.evaluators.count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        closing = [slot.actor.close.remote() for slot in self._slots if slot.is_up and slot.job is None]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for slot in self._slots:
            _end(slot)
        self._slots = []

    @property
    def has_room(self) -> bool:
        """Whether an evaluator is up, idle, and not wanted for work that lost its own."""
        return any(slot.is_up and slot.job is None for slot in self._slots) and not self._lost

    @property
    def num_running(self) -> int:
        """Pieces of work submitted and not finished."""
        return len(self._lost) + sum(slot.job is not None for slot in self._slots)

    def submit(self, works: Mapping[str, Work]) -> None:
        """Give an idle evaluator candidates by key, to be merged together; `has_room` must hold."""
        assert self.has_room and works
        self._give(_Job(dict(works)))

    def wait(self, timeout_seconds: float) -> dict[str, Outcome]:
        """Outcomes by key, as soon as there is one; none where the time passed or an evaluator came up first.

        Raises:
            StudyError: No evaluator comes up.
        """
        import ray

        now = time.monotonic()
        references = {slot.reference: slot for slot in self._slots if slot.reference is not None}
        patience = min([timeout_seconds, *(self._deadline(slot) - now for slot in references.values())])
        done, _ = ray.wait(list(references), num_returns=1, timeout=max(0.0, patience)) if references else ([], [])
        outcomes: dict[str, Outcome] = {}
        for slot in [references[reference] for reference in done]:
            outcomes |= self._settle(slot)
        for slot in self._slots:
            if slot.reference is not None and time.monotonic() > self._deadline(slot):
                outcomes |= self._give_up(slot)
        while self._lost and any(slot.is_up and slot.job is None for slot in self._slots):
            self._give(self._lost.pop(0))
        return outcomes

    def _start(self, number: int) -> _Slot:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted = self.evaluators
        options: dict[str, Any] = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus}
        if wanted.memory_bytes is not None:
            options["memory"] = wanted.memory_bytes
        group = None
        if wanted.nodes > 1:
            group = _reserve(wanted)
            # What the evaluator starts (a server's workers, say) finds the resources of all its nodes in the group.
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        actor_class = ray.remote(TrialEvaluator).options(max_restarts=0, name=None, **options)
        actor = actor_class.remote(self.backend, wanted.scratch, self.name, self.fence, number)
        return _Slot(number, actor, actor.ready.remote(), time.monotonic(), group)

    def _give(self, job: _Job) -> None:
        slot = next(slot for slot in self._slots if slot.is_up and slot.job is None)
        slot.job, slot.since, slot.reference = job, time.monotonic(), slot.actor.run.remote(list(job.works.values()))

    def _deadline(self, slot: _Slot) -> float:
        num_works = 1 if slot.job is None else len(slot.job.works)
        seconds = self.evaluators.timeout_seconds * num_works if slot.is_up else self.evaluators.start_timeout_seconds
        return slot.since + seconds

    def _settle(self, slot: _Slot) -> Mapping[str, Outcome]:
        """Take what an actor's reference gives: that it is up, an outcome, or the news of its end."""
        import ray

        reference, slot.reference = slot.reference, None
        job, slot.job = slot.job, None
        try:
            results = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._replace(slot, error if job is None else None)
            return {} if job is None else self._lose(job, f"the evaluator raised {_reason(error)}", is_final=True)
        except ray.exceptions.RayError as error:
            self._replace(slot, error if job is None else None)
            return self._lose(job, f"{_reason(error)}") if job else {}
        if job is None:
            slot.is_up, slot.pid, self._start_failures = True, results, 0
            return {}
        is_sound = len(results) == len(job.works) and all(outcome.is_evaluator_sound for outcome in results)
        if not is_sound or slot.has_grown(len(results), results[-1].memory_bytes):
            self._replace(slot)
        # What it did not come to is another evaluator's.
        self._lost += job.split()[len(results) :]
        return dict(zip(job.works, results, strict=False))

    def _lose(self, job: _Job, reason: str, *, is_final: bool = False) -> Mapping[str, Outcome]:
        """Put a job that has no outcome back, candidate by candidate; one by itself is given up at last."""
        if len(job.works) > 1:
            self._lost += job.split()
            return {}
        if is_final:
            return job.fail(reason)
        job.losses += 1
        if job.losses <= MAX_LOSSES:
            self._lost.append(job)
            return {}
        return job.fail(f"its evaluator was lost {job.losses} times, often for want of memory: {reason}")

    def _give_up(self, slot: _Slot) -> Mapping[str, Outcome]:
        """End an evaluator that is past its deadline."""
        job, slot.job = slot.job, None
        if job is not None:
            self._replace(slot)
            seconds = self.evaluators.timeout_seconds
            return self._lose(job, f"timed out after {seconds:g} s (evaluators: timeout_seconds)", is_final=True)
        if not any(other.is_up for other in self._slots):
            raise StudyError(self._no_evaluator())
        slot.since = time.monotonic()  # the others do the work; this one may come when the cluster has room
        return {}

    def _replace(self, slot: _Slot, start_failure: Exception | None = None) -> None:
        if start_failure is not None:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                raise StudyError(
                    f"{self._start_failures} evaluators in a row failed to start: {_reason(start_failure)}"
                ) from start_failure
        _end(slot)
        self._slots[self._slots.index(slot)] = self._start(slot.number)

    def _no_evaluator(self) -> str:
        import ray

        wanted = self.evaluators
        asked = f"{wanted.cpus:g} CPUs, {wanted.gpus:g} GPUs"
        if wanted.nodes > 1:
            asked = f"{wanted.nodes} nodes of {asked} each"
        if wanted.memory_bytes is not None:
            asked += f", {wanted.memory_bytes / 1e9:.1f} GB"
        total = ray.cluster_resources()
        return (
            f"no evaluator came up within {wanted.start_timeout_seconds:g} s: each asks for {asked}; "
            f"the cluster has {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, "
            f"{total.get('memory', 0) / 1e9:.1f} GB in all; ask for less under `evaluators:`, or give the cluster more"
        )


class LazyPool:
    """A pool that starts when it is first wanted: a resumed study may have nothing left to score."""

    def __init__(self, make: Callable[[], EvaluatorPool], stack: ExitStack) -> None:
        self._make, self._stack = make, stack
        self._pool: EvaluatorPool | None = None

    def open(self) -> EvaluatorPool:
        if self._pool is None:
            self._pool = self._stack.enter_context(self._make())
        return self._pool

    def make_room(self) -> None:
        """Leave a CPU to others: idle evaluators that hold them all are ended, and start anew when wanted."""
        import ray

        if self._pool is not None and ray.available_resources().get("CPU", 0) < 1:
            self._stack.close()
            self._pool = None


def _reserve(wanted: Evaluators) -> Any:
    """A placement group with one bundle on each of an evaluator's nodes: all of them, or none yet."""
    from ray.util.placement_group import placement_group

    bundle = {"CPU": wanted.cpus, "GPU": wanted.gpus, "memory": float(wanted.memory_bytes or 0)}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    return placement_group([bundle] * wanted.nodes, strategy="STRICT_SPREAD")


def _end(slot: _Slot) -> None:
    """End an evaluator and give its nodes back."""
    import ray
    from ray.util.placement_group import remove_placement_group

    ray.kill(slot.actor)
    if slot.group is not None:
        remove_placement_group(slot.group)


def has_grown(first_bytes: int, now_bytes: int) -> bool:
    """Whether an evaluator's memory has doubled since its first candidate, and by a figure that matters."""
    return now_bytes > 2 * first_bytes and now_bytes - first_bytes > GROWTH_BYTES


def _reason(error: Exception) -> str:
    """A Ray failure in one line: the cause where it knows one, else the last line of its traceback or report."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:400] if lines else 'no reason given'}"
