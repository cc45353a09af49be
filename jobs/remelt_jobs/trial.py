"""One trial, where Ray puts it: merge the candidate into the loaded model or on local disk, score it, forget it.

The actor *is* the evaluator process: it holds an `Evaluator`, so imports and eval tasks are paid for once, and it is
replaced after an error, a time-out or growth in memory (see `evaluator_pool`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from remelt.errors import EvaluationError, RemeltError
from remelt.recipe import Recipe
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest, Role
from remelt_evals.evaluation_cache import evaluate_once
from remelt_evals.evaluator import Evaluator
from remelt_evals.evaluator_child import resident_bytes
from remelt_evals.evaluator_process import EvaluatorProcess
from remelt_evals.ladder import Estimate, stop_early
from remelt_jobs.candidates import open_for_evaluation
from remelt_jobs.lease import fence_name, host_name

if TYPE_CHECKING:
    from remelt.commit import MergedCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an evaluator is asked to do: make a candidate if it is not there, and score it."""

    recipe: Recipe | None
    """Bound, with absolute paths; None scores `checkpoint` as it lies."""
    checkpoint: str | None = None
    role: Role
    suite: str
    """Path of the suite's YAML file."""
    suite_digest: str
    memory_bytes: int | None = None
    """What the merge may hold; None is half of the machine's over `num_evaluators`."""
    num_evaluators: int = 1
    threads: int = 1
    resident: bool = True
    """Merge candidates into the memory of the loaded model where the backend and the architecture allow it."""
    rungs: tuple[int | None, ...] = (None,)
    """Fidelities to go through, as limits on the items of each eval task; the last is the one that counts."""
    incumbent: EvalReport | None = None
    """The best complete trial so far, which a candidate that is to go on must not be clearly worse than."""
    on_every_entry: bool = False
    """For several objectives: worse means worse on every entry of the suite."""
    cache: str | None = None
    """Folder of evaluations by id, shared by all evaluators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it: a report, or the reason why there is none."""

    report: EvalReport | None = None
    failure: str | None = None
    estimate: Estimate | None = None
    """Where a lower fidelity stopped it: what it would have scored."""
    digest: str | None = None
    candidate_id: str | None = None
    merge_seconds: float = 0.0
    seconds: float = 0.0
    memory_bytes: int = 0
    """Resident memory of the evaluator afterwards."""
    where: str = ""
    """The host that did it."""
    way: str = ""
    """How the candidate came to the model: `memory`, `disk`, or `disk: ` and why not through memory."""
    is_evaluator_sound: bool = True
    """Whether the same process may take the next candidate."""


class TrialEvaluator:
    """Runs one piece of work after another. Its scratch folder holds one candidate at most.

    It sets the process's folder for temporary files, so it must have a process to itself.
    """

    def __init__(self, backend: BackendOptions, scratch: str | None, name: str, fence: int, slot: int) -> None:
        """
        Args:
            backend: What runs the model.
            scratch: Folder on a local disk, or None for the machine's temporary folder.
            name: The study's.
            fence: The driver's. Evaluators of lower fences served drivers that are gone or lost their lease: what
                they left is removed.
            slot: No other live evaluator of the driver has it; a successor does, and removes what a killed one left.
        """
        folder = Path(scratch or tempfile.gettempdir()) / f"remelt-{os.getuid()}"
        own = folder / f"{name}-{fence_name(fence)}-{slot}"
        for other in folder.glob(f"{name}-*"):
            if other == own or other.name < f"{name}-{fence_name(fence)}":
                shutil.rmtree(other, ignore_errors=True)
        self._scratch, temporary = own / "candidate", own / "tmp"
        temporary.mkdir(parents=True)
        # Actors are killed, never closed: what libraries leave must lie where a successor looks.
        tempfile.tempdir = str(temporary)
        self._evaluator = _make_evaluator(backend)

    def ready(self) -> int:
        """The process id, once it is up."""
        return os.getpid()

    def close(self) -> None:
        """Remove what lies on disk; for an evaluator without work."""
        self._evaluator.close()
        shutil.rmtree(self._scratch.parent, ignore_errors=True)

    def run(self, work: Work) -> Outcome:
        """Make and score a candidate. What is wrong with the candidate is an outcome; anything else raises."""
        started = time.monotonic()
        merged_at = started
        made = _Made("", None, None)
        try:
            made = self._make(work)
            merged_at = time.monotonic()
            report, estimate = self._climb(work, made)
        except RemeltError as error:
            return Outcome(
                failure=f"{type(error).__name__}: {error}",
                digest=made.digest,
                candidate_id=made.candidate_id,
                way=made.way,
                merge_seconds=merged_at - started,
                seconds=time.monotonic() - started,
                memory_bytes=resident_bytes(),
                where=host_name(),
                is_evaluator_sound=not isinstance(error, EvaluationError),
            )
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return Outcome(
            report=report,
            failure=None if report.is_ok else report.error or "the evaluation failed",
            estimate=estimate,
            digest=made.digest,
            candidate_id=made.candidate_id,
            way=made.way,
            merge_seconds=merged_at - started,
            seconds=time.monotonic() - started,
            memory_bytes=resident_bytes(),
            where=host_name(),
        )

    def _climb(self, work: Work, made: _Made) -> tuple[EvalReport, Estimate | None]:
        """Evaluate rung by rung; the last report, and an estimate where it is not of the last rung."""
        for limit in work.rungs:
            report = evaluate_once(
                self._evaluator,
                EvalRequest(
                    checkpoint=made.checkpoint,
                    digest=str(made.digest),
                    suite=work.suite,
                    role=work.role,
                    limit=limit,
                    suite_digest=work.suite_digest,
                ),
                None if work.cache is None else Path(work.cache),
            )
            if not report.is_ok:
                break
            if limit is None or work.incumbent is None:
                continue
            estimate = stop_early(work.incumbent, report, on_every_entry=work.on_every_entry)
            if estimate is not None:
                return report, estimate
        return report, None

    def _make(self, work: Work) -> _Made:
        """Bring the candidate to where the evaluator can score it."""
        if work.recipe is None:
            assert work.checkpoint is not None
            opened = open_for_evaluation(work.checkpoint)
            return _Made(str(opened.path), opened.digest, None)
        why = ""
        if work.resident:
            held = self._evaluator.hold(
                work.recipe, work.suite, memory_bytes=self._memory_bytes(work), threads=work.threads
            )
            if not isinstance(held, str):
                return _Made(held.checkpoint, held.digest, held.candidate_id, "memory")
            why = f": {held}"
        merged = self._merge(work.recipe, work)
        return _Made(str(merged.path), merged.digest, merged.candidate_id, f"disk{why}")

    def _merge(self, recipe: Recipe, work: Work) -> MergedCheckpoint:
        from remelt.executor import LocalExecutor
        from remelt.merge import merge_recipe

        shutil.rmtree(self._scratch, ignore_errors=True)
        executor = LocalExecutor(threads=work.threads, memory_bytes=self._memory_bytes(work))
        return merge_recipe(recipe, self._scratch, executor=executor)

    @staticmethod
    def _memory_bytes(work: Work) -> int:
        from remelt.memory import default_memory_bytes

        return work.memory_bytes or default_memory_bytes(work.num_evaluators)


class _Made(NamedTuple):
    """A candidate that can be scored."""

    checkpoint: str
    """Its folder, or its name in the evaluator's memory."""
    digest: str | None
    candidate_id: str | None
    way: str = ""


def _make_evaluator(backend: BackendOptions) -> Evaluator | EvaluatorProcess:
    """In this process, or in one of the interpreter that the backend names."""
    if backend.interpreter is not None:
        return EvaluatorProcess(backend, interpreter=backend.interpreter)
    return Evaluator(backend)
