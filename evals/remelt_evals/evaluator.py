"""The evaluator: scores one checkpoint after another with lm-eval, in a process that is its own.

It sets environment variables and reseeds the global generators, as lm-eval needs; so hold it in an evaluator process
(`EvaluatorProcess`) or an actor, never in a driver. It keeps what is costly to start (imports, task index, the check of
items) and nothing of a checkpoint. lm-eval's caches are never used: they are not keyed by model.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions, LoadedModel, backend_identity, find_backend
from remelt_evals.eval_report import (
    IN_MEMORY,
    ROLES,
    EvalReport,
    EvalRequest,
    HeldCandidate,
    Role,
    TaskReport,
    evaluation_id,
)
from remelt_evals.lm_tasks import TaskBuilder, allow_code, check_disjoint, item_hashes, prepare_environment
from remelt_evals.suite import Suite, load_suite

if TYPE_CHECKING:
    from remelt.recipe import Recipe
    from remelt_evals.resident import ResidentCandidate, ResidentCandidates

SEED = 1234

# Resamples that lm-eval itself draws, in Python, for the few metrics whose item scores we cannot aggregate (F1, BLEU).
# Zero would also remove its closed forms.
_LM_EVAL_RESAMPLES = 200


class Evaluator:
    """Scores checkpoints, one at a time; the same request gives the same numbers."""

    def __init__(self, options: BackendOptions | None = None) -> None:
        """
        Args:
            options: backend and how it runs; the Hugging Face backend on the CPU by default.

        Raises:
            EvaluationError: there is no such backend.
        """
        self.options = options or BackendOptions()
        self._backend = find_backend(self.options)
        self._identity = backend_identity(self.options)
        self._folder = tempfile.TemporaryDirectory(prefix="remelt-evaluator-")
        self._builder = TaskBuilder(self._folder.name)
        self._offline: bool | None = None
        self._overlap_notes: dict[str, tuple[str, ...]] = {}
        self._residents: ResidentCandidates | None = None
        self._held: dict[tuple[str, str], ResidentCandidate] = {}
        """By name and digest."""

    def evaluation_id(self, request: EvalRequest) -> str:
        """The id that `evaluate` will put on its report; reads the suite, loads no model."""
        return evaluation_id(request, self._read_suite(request).digest, self._identity)

    def hold(
        self, recipes: Sequence[Recipe], suite: str, *, memory_bytes: int | None = None, threads: int = 1
    ) -> list[HeldCandidate] | str:
        """Merge candidates straight into the parameters of models that stay in memory; then `evaluate` can score them.

        All of them are merged in one read of the parents. Each takes a model of its own; those held before are gone.

        Args:
            recipes: bound, their paths absolute; candidates of one study differ in coefficients alone.
            suite: path of the suite that will score it: whether its items lie on disk decides how libraries start.
            memory_bytes: what a merge may hold beside the model, parents kept in memory included; half of the
                machine's by default. With `threads`, the number that work on it, it holds from the first call on.

        Returns:
            For each, what to ask for in `EvalRequest.checkpoint` and `digest`; or in words why such candidates must go
            by disk.

        Raises:
            RemeltError: as a merge to disk, or where a candidate does not load; nothing is held then.
        """
        from remelt_evals.resident import ResidentCandidates

        if self.options.name != "hf":
            return f"the {self.options.name} backend loads folders"
        self._held = {}
        self._prepare(load_suite(suite))
        if self._residents is None:
            self._residents = ResidentCandidates(
                self.options, memory_bytes=memory_bytes, threads=threads, scratch=Path(self._folder.name)
            )
        merged = self._residents.merge(recipes)
        if isinstance(merged, str):
            return merged
        names = [IN_MEMORY + one.candidate_id for one in merged]
        self._held = {(name, one.digest): one for name, one in zip(names, merged, strict=True)}
        return [
            HeldCandidate(name, one.digest, one.candidate_id, one.seconds)
            for name, one in zip(names, merged, strict=True)
        ]

    def evaluate(self, request: EvalRequest) -> EvalReport:
        """Score a checkpoint on the items of one role.

        A model whose answers are not numbers gives a report with status `failed`, since that is a finding.

        Raises:
            EvaluationError: the checkpoint, the suite or an eval task cannot be used as asked.
        """
        started = time.monotonic()
        started_at = datetime.now(UTC).isoformat()
        suite = self._read_suite(request)
        self._prepare(suite)
        self._check_checkpoint(request)
        suite.task_names(request.role)
        notes = self._check_items(suite)
        if request.entries is not None:
            suite = suite.part(request.entries)
        tasks = self._builder.build(suite, request.role)
        model = self._load(request, suite.batch_size)
        reports, error = _score(suite, request, tasks, model)
        device, dtype = model.device, model.dtype
        # The weights go before the next checkpoint's come.
        del model, tasks
        gc.collect()
        return EvalReport(
            evaluation_id=evaluation_id(request, suite.digest, self._identity),
            checkpoint=request.checkpoint,
            digest=request.digest,
            suite=suite.name,
            suite_digest=suite.digest,
            role=request.role,
            fidelity=request.fidelity,
            backend=self.options.name,
            device=device,
            dtype=dtype,
            versions=self._identity["versions"],
            status="failed" if error else "ok",
            error=error,
            tasks=reports,
            notes=notes,
            started_at=started_at,
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        """Let go of what is in memory, and remove the evaluator's temporary files."""
        self._held = {}
        if self._residents is not None:
            self._residents.close()
        self._folder.cleanup()

    def _check_checkpoint(self, request: EvalRequest) -> None:
        if not request.checkpoint.startswith(IN_MEMORY):
            if self._backend.needs_checkpoint and not (Path(request.checkpoint) / "config.json").is_file():
                raise EvaluationError(f"{request.checkpoint} is no checkpoint folder: it holds no config.json")
            return
        if (request.checkpoint, request.digest) not in self._held:
            there = ", ".join(f"{name} with digest {digest[:12]}" for name, digest in self._held) or "nothing"
            raise EvaluationError(
                f"{request.checkpoint} with digest {request.digest[:12]} is not in this evaluator's memory, which "
                f"holds {there}: merge it again"
            )

    def _load(self, request: EvalRequest, batch_size: int) -> LoadedModel:
        if request.checkpoint.startswith(IN_MEMORY):
            from remelt_evals.hf_backend import wrap

            candidate = self._held[request.checkpoint, request.digest]
            return wrap(candidate.model, candidate.tokenizer, batch_size)
        # One model more might not fit.
        self._held = {}
        if self._residents is not None:
            self._residents.forget_models()
            gc.collect()
        return self._backend.load(request.checkpoint, request.digest, batch_size, self.options)

    def _read_suite(self, request: EvalRequest) -> Suite:
        suite = load_suite(request.suite)
        if request.suite_digest is not None and suite.digest != request.suite_digest:
            raise EvaluationError(
                f"{request.suite} or its task files were changed: the study began with suite digest "
                f"{request.suite_digest[:12]}, they now have {suite.digest[:12]}; scores of both cannot be compared. "
                "Put the files back, or begin another study"
            )
        return suite

    def _prepare(self, suite: Suite) -> None:
        allow_code(suite)
        if self._offline is None:
            self._offline = suite.is_local
            prepare_environment(self._folder.name, offline=suite.is_local)
        elif self._offline != suite.is_local:
            raise EvaluationError(
                f"suite {suite.name} {'lies on disk' if suite.is_local else 'fetches its items'}, but this evaluator "
                "has begun with the other kind; use a new one"
            )

    def _check_items(self, suite: Suite) -> tuple[str, ...]:
        """Notes on items that roles share; they are compared once for each state of the suite's files."""
        if suite.digest not in self._overlap_notes:
            hashes: dict[Role, Mapping[str, list[str]]] = {}
            for role in ROLES:
                tasks = self._builder.build(suite, role)
                hashes[role] = {name: item_hashes(task) for name, task in tasks.items()}
            self._overlap_notes[suite.digest] = check_disjoint(suite, hashes)
        return self._overlap_notes[suite.digest]


def _score(
    suite: Suite, request: EvalRequest, tasks: dict[str, Any], model: LoadedModel
) -> tuple[tuple[TaskReport, ...], str | None]:
    """The tasks' reports, or none of them and why."""
    if model.problem is not None:
        return (), model.problem
    from lm_eval.evaluator import evaluate

    from remelt_evals.task_scores import report_task

    _seed_generators()
    outcome = evaluate(
        lm=model.lm,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        samples=_first_items(suite, request, tasks),
        cache_requests=False,
        rewrite_requests_cache=False,
        bootstrap_iters=_LM_EVAL_RESAMPLES,
        log_samples=True,
        confirm_run_unsafe_code=bool(suite.execute_code),
    )
    try:
        return tuple(
            report_task(entry, name, tasks[name], outcome)
            for entry in suite.tasks
            if (name := entry.task_name(request.role))
        ), None
    except ArithmeticError as error:
        return (), str(error)


def _first_items(suite: Suite, request: EvalRequest, tasks: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """The places of the items that each limited task runs; lm-eval's own `limit` is one number for all tasks."""
    places = {}
    for entry in suite.tasks:
        name = str(entry.task_name(request.role))
        limits = [limit for limit in (entry.limit, request.limit) if limit is not None]
        if limits and min(limits) < len(tasks[name].eval_docs):
            places[name] = list(range(min(limits)))
    return places or None


def _seed_generators() -> None:

    import numpy as np

    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
