"""Trials, where Ray puts them: merge candidates into loaded models or on local disk, score them, forget them.

Several at once are merged in one read of the parents, then scored one after another.

The actor *is* the evaluator process: it holds an `Evaluator`, so imports and eval tasks are paid for once, and it is
replaced after an error, a time-out or growth in memory (see `evaluator_pool`).
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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


def scratch_folder(scratch: str | None) -> Path:
    """Where this user's evaluators keep candidates and temporary files.

    Names below it are short: servers put Unix sockets there, whose paths have 107 characters at most.
    """
    return Path(scratch or tempfile.gettempdir()) / f"remelt-{os.getuid()}"


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
    entries: tuple[int, ...] | None = None
    """Of the suite, to score these alone; None is all of them."""
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
    """Runs one piece of work after another. Its scratch folder holds the candidates of one piece of work at most.

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
        folder = scratch_folder(scratch)
        own = folder / f"{name}-{fence_name(fence)}-{slot}"
        for other in folder.glob(f"{name}-*"):
            if other == own or other.name < f"{name}-{fence_name(fence)}":
                shutil.rmtree(other, ignore_errors=True)
        self._scratch, temporary = own / "candidates", own / "t"
        temporary.mkdir(parents=True, exist_ok=True)
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

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        """Make and score candidates of one recipe. What is wrong with one is an outcome; anything else raises.

        Returns:
            Their outcomes, in order. Where this process should not take another candidate, the last of them says so,
            and those that it has not come to are left out.
        """
        if len(works) > 1 and any(work.recipe is None for work in works):
            return self._run_each(works)  # a checkpoint that is scored as it lies pushes candidates out of memory
        started = time.monotonic()
        made: list[_Made] = []
        try:
            made = self._make(works)
        except RemeltError as error:
            if len(works) == 1:
                return [self._failure(error, _Made("", None, None), started, 0.0)]
            if isinstance(error, EvaluationError):
                return []  # not this process again: the pool gives them to another, one by one
        if not made:
            # Out of the handler, whose traceback holds the models of all of them.
            gc.collect()
            return self._run_each(works)
        merge_seconds = (time.monotonic() - started) / len(works)
        outcomes: list[Outcome] = []
        try:
            for work, one in zip(works, made, strict=True):
                outcomes.append(self._score(work, one, merge_seconds))
                if not outcomes[-1].is_evaluator_sound:
                    break
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return outcomes

    def _run_each(self, works: Sequence[Work]) -> list[Outcome]:
        """One after another, so that what is wrong with one is no other's failure."""
        outcomes: list[Outcome] = []
        for work in works:
            outcomes += self.run([work])
            if not outcomes[-1].is_evaluator_sound:
                break
        return outcomes

    def _score(self, work: Work, made: _Made, merge_seconds: float) -> Outcome:
        started = time.monotonic()
        try:
            report, estimate = self._climb(work, made)
        except RemeltError as error:
            return self._failure(error, made, started, merge_seconds)
        return Outcome(
            report=report,
            failure=None if report.is_ok else report.error or "the evaluation failed",
            estimate=estimate,
            digest=made.digest,
            candidate_id=made.candidate_id,
            way=made.way,
            merge_seconds=merge_seconds,
            seconds=merge_seconds + time.monotonic() - started,
            memory_bytes=resident_bytes(),
            where=host_name(),
        )

    @staticmethod
    def _failure(error: RemeltError, made: _Made, started: float, merge_seconds: float) -> Outcome:
        seconds = time.monotonic() - started
        return Outcome(
            failure=f"{type(error).__name__}: {error}",
            digest=made.digest,
            candidate_id=made.candidate_id,
            way=made.way,
            merge_seconds=merge_seconds or seconds,
            seconds=merge_seconds + seconds,
            memory_bytes=resident_bytes(),
            where=host_name(),
            is_evaluator_sound=not isinstance(error, EvaluationError),
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
                    entries=work.entries,
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

    def _make(self, works: Sequence[Work]) -> list[_Made]:
        """Bring the candidates to where the evaluator can score them.

        They are merged in one read of the parents: into memory if they may and can, else to local disk.
        """
        first, why = works[0], ""
        recipes = [work.recipe for work in works if work.recipe is not None]
        if not recipes:
            assert first.checkpoint is not None
            opened = open_for_evaluation(first.checkpoint)
            return [_Made(str(opened.path), opened.digest, None)]
        if first.resident:
            held = self._evaluator.hold(
                recipes, first.suite, memory_bytes=self._memory_bytes(first), threads=first.threads
            )
            if not isinstance(held, str):
                return [_Made(one.checkpoint, one.digest, one.candidate_id, "memory") for one in held]
            why = f": {held}"
        from remelt.executor import LocalExecutor
        from remelt.merge import merge_recipes

        shutil.rmtree(self._scratch, ignore_errors=True)
        executor = LocalExecutor(threads=first.threads, memory_bytes=self._memory_bytes(first))
        folders = [self._scratch / str(number) for number in range(len(works))]
        return [
            _Made(str(one.path), one.digest, one.candidate_id, f"disk{why}")
            for one in merge_recipes(recipes, folders, executor=executor)
        ]

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
