"""One trial, where Ray puts it: merge the candidate on local disk, score it, delete it.

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

from remelt.errors import EvaluationError, RemeltError
from remelt.recipe import Recipe
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest, Role
from remelt_jobs.candidates import open_for_evaluation
from remelt_jobs.lease import fence_name


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it: a report, or the reason why there is none."""

    report: EvalReport | None = None
    failure: str | None = None
    digest: str | None = None
    candidate_id: str | None = None
    merge_seconds: float = 0.0
    seconds: float = 0.0
    memory_bytes: int = 0
    """Resident memory of the evaluator afterwards."""
    is_evaluator_sound: bool = True
    """Whether the same process may take the next candidate."""


class TrialEvaluator:
    """Runs one piece of work after another. Its scratch folder holds one candidate at most."""

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
        from remelt_evals.evaluator import Evaluator

        self._evaluator = Evaluator(backend)
        folder = Path(scratch or tempfile.gettempdir()) / f"remelt-{os.getuid()}"
        self._scratch = folder / f"{name}-{fence_name(fence)}-{slot}"
        for other in folder.glob(f"{name}-*"):
            if other == self._scratch or other.name < f"{name}-{fence_name(fence)}":
                shutil.rmtree(other, ignore_errors=True)

    def ready(self) -> int:
        """The process id, once it is up."""
        return os.getpid()

    def run(self, work: Work) -> Outcome:
        """Make and score a candidate. What is wrong with the candidate is an outcome; anything else raises."""
        started = time.monotonic()
        merged_at = started
        digest: str | None = None
        candidate_id: str | None = None
        try:
            if work.recipe is None:
                assert work.checkpoint is not None
                folder, digest = open_for_evaluation(work.checkpoint)
            else:
                folder, digest, candidate_id = self._merge(work.recipe, work)
            merged_at = time.monotonic()
            report = self._evaluator.evaluate(
                EvalRequest(
                    checkpoint=str(folder),
                    digest=digest,
                    suite=work.suite,
                    role=work.role,
                    suite_digest=work.suite_digest,
                )
            )
        except RemeltError as error:
            return Outcome(
                failure=f"{type(error).__name__}: {error}",
                digest=digest,
                candidate_id=candidate_id,
                merge_seconds=merged_at - started,
                seconds=time.monotonic() - started,
                memory_bytes=resident_bytes(),
                is_evaluator_sound=not isinstance(error, EvaluationError),
            )
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return Outcome(
            report=report,
            failure=None if report.is_ok else report.error or "the evaluation failed",
            digest=digest,
            candidate_id=candidate_id,
            merge_seconds=merged_at - started,
            seconds=time.monotonic() - started,
            memory_bytes=resident_bytes(),
        )

    def _merge(self, recipe: Recipe, work: Work) -> tuple[Path, str, str]:
        from remelt.executor import LocalExecutor
        from remelt.memory import default_memory_bytes
        from remelt.merge import merge_recipe

        shutil.rmtree(self._scratch, ignore_errors=True)
        executor = LocalExecutor(
            threads=work.threads, memory_bytes=work.memory_bytes or default_memory_bytes(work.num_evaluators)
        )
        merged = merge_recipe(recipe, self._scratch / "candidate", executor=executor)
        return merged.path, merged.digest, merged.candidate_id


def resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
