"""A study from end to end: score the starts, search, select, publish the winner, report.

The journal is the study. Every step writes what it found there before the next begins, and the state is folded from it,
so a study that is run again goes on where it was, whatever ended it. Publication is the merge engine's commit.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from remelt.errors import NumericsError, OutputError, StudyError
from remelt.executor import Executor
from remelt.merge import merge_recipe
from remelt.receipts import write_file_durably
from remelt.searchers import TrialState, build_searcher
from remelt.verify import verify_merge
from remelt_evals.eval_report import EvalReport, Role, report_from_json, report_to_json
from remelt_evals.ladder import without_texts
from remelt_jobs.candidates import (
    Candidate,
    bound_recipe,
    published_recipe,
    starting_candidates,
    with_absolute_paths,
)
from remelt_jobs.evaluator_pool import EvaluatorPool, LazyPool
from remelt_jobs.journal import Journal, Record, read_journal
from remelt_jobs.lease import STALE_AFTER_SECONDS, Lease, take_lease
from remelt_jobs.parts import Gathering, deal_entries, split_work
from remelt_jobs.ray_session import ray_session
from remelt_jobs.study_checks import check_cluster, check_identity, check_inputs, plan_ahead, refuse_foreign
from remelt_jobs.study_config import StudyConfig
from remelt_jobs.study_progress import OnProgress, Phase, StudyProgress, Watch, starting
from remelt_jobs.study_result import BEST, EVALUATIONS, REPORTS, RESULT_FILE, StudyResult, build_result
from remelt_jobs.study_state import StudyState, outcome_fields
from remelt_jobs.study_tables import write_candidate, write_trials_so_far
from remelt_jobs.trial import Outcome, Work

POLL_SECONDS = 1.0
MAX_SHARE_OF_WRITING = 0.02
"""Of the driver's time, for the table of trials so far."""


def run_study(
    config: StudyConfig,
    output: Path,
    *,
    takeover: bool = False,
    stale_after_seconds: float = STALE_AFTER_SECONDS,
    executor: Executor | None = None,
    progress: OnProgress | None = None,
) -> StudyResult:
    """Run a study in `output`, go on with it, or, where it is finished, say what came of it.

    Evaluators and the winner's merge run on the Ray cluster at RAY_ADDRESS, else on one started for the purpose.

    Args:
        output: The study's directory: journal, lease, evaluations, reports, and the winner in `best`.
        takeover: Take the lease even from a driver that seems alive.
        executor: Merges the winner; by default Ray tasks.
        progress: Told of every step, in this thread.

    Raises:
        StudyError: Another study or another driver has the directory, or nothing could be scored.
        RecipeError, CheckpointError, MismatchError, BudgetError: Before anything is started.
    """
    refuse_foreign(output)
    state = StudyState.of(read_journal(output), *config.scoring)
    check_identity(config, state, output)
    if state.is_done and config.budget.is_spent(state.spent(), config.evaluators.gpus):
        return build_result(config, state, output, is_reused=True)
    identity = plan_ahead(config)
    check_inputs(identity, state, output)
    progress = progress or (lambda step: None)
    with ExitStack() as stack:
        lease = stack.enter_context(
            take_lease(output, takeover=takeover, stale_after_seconds=stale_after_seconds).kept_alive()
        )
        journal = stack.enter_context(Journal(output, lease))
        # Started on the spot, a cluster holds all evaluators, and one worker for the winner's merge.
        num_cpus = math.ceil(config.evaluators.count * config.evaluators.nodes * config.evaluators.cpus) + 1
        progress(starting("connecting to Ray, or starting it on this machine"))
        kind = stack.enter_context(ray_session(num_cpus=max(num_cpus, len(os.sched_getaffinity(0)))))
        check_cluster(kind, config.evaluators)
        study = _Study(config, output, lease, journal, executor, progress)
        return study.run(identity)


class _Study:
    """One driver's run of a study, under its lease."""

    def __init__(
        self,
        config: StudyConfig,
        output: Path,
        lease: Lease,
        journal: Journal,
        executor: Executor | None,
        on_progress: OnProgress,
    ) -> None:
        self.config = config
        self.output = output
        self.lease = lease
        self.journal = journal
        self.executor = executor
        self.on_progress = on_progress
        self.state = StudyState.of(journal.records, *config.scoring)
        self._incumbent_report: EvalReport | None = None
        self._trials_written_at = self._trials_write_seconds = 0.0
        self._scored_now: set[tuple[Role, int]] = set()
        """What this driver has scored on selection and report items."""
        self.recipe = with_absolute_paths(config.recipe)
        self.reports = config.reports or output / REPORTS
        self.parts = deal_entries(config.suite, config.evaluators.parts)
        self.starts = starting_candidates(config.recipe, config.space)
        self.searcher = build_searcher(config.searcher, config.space, config.seed, config.searcher_options)

    def run(self, identity: Record) -> StudyResult:
        self._begin(identity)
        self.inputs: dict[str, str] = identity["inputs"]
        with ExitStack() as stack:
            pool = LazyPool(self._pool, stack)
            self._search(pool)
            self._select(pool)
            self._report(pool, [number for number in self._baselines() if number != self.state.winner])
            self._publish(pool)
            assert self.state.winner is not None
            self._report(pool, [self.state.winner])
        result = build_result(self.config, self.state, self.output)
        write_file_durably(self.output / RESULT_FILE, result.to_json().encode())
        write_trials_so_far(self.reports, self.config, self.state)
        self._record({"type": "done", "trials": len(self.state.finished)})
        return result

    def _begin(self, identity: Record) -> None:
        """Write what is studied, or compare it with what was: another driver may have come before us."""
        check_identity(self.config, self.state, self.output)
        if self.state.identity is None:
            self._record(identity)
            self._record({"type": "session"})
            return
        check_inputs(identity, self.state, self.output)
        self._record({"type": "session"})

    def _pool(self) -> EvaluatorPool:
        count = self.config.evaluators.count
        self.on_progress(
            starting(
                f"starting {count} evaluator{'s' if count > 1 else ''}; the first scores take longer, they load lm-eval"
            )
        )
        backend = replace(self.config.backend, threads=max(1, int(self.config.evaluators.cpus)))
        return EvaluatorPool(self.config.evaluators, backend, self._scratch_name(), self.lease.fence)

    def _scratch_name(self) -> str:
        """Of this study in this directory: the same study may run elsewhere on the machine at the same time."""
        key = f"{self.config.study_id} {self.output.absolute()}"
        return hashlib.sha256(key.encode()).hexdigest()[:10]

    def _record(self, record: Record) -> None:
        """To the journal, then to the state: what was not written did not happen."""
        record = {**record, "at": _now()}
        self.journal.append(record)
        self.state.apply(record)

    # Search

    def _search(self, pool: LazyPool) -> None:
        """Trials until the budget is spent: what a dead driver left, then the starts, then the searcher's."""
        abandoned = list(self.state.unfinished)
        watch = Watch(len(self.state.finished))
        waiting: list[Mapping[str, Work]] = []
        parts = Gathering(self.parts)
        while len(self.state.finished) < len(self.state.candidates) or self._may_ask():
            evaluators = pool.open()
            while evaluators.has_room and (waiting or abandoned or self._may_ask()):
                if not waiting:
                    batch = self._take(abandoned)
                    waiting = self._pieces({one.number: self._work(one, "search") for one in batch})
                evaluators.submit(waiting.pop(0))
            for number, outcome in parts.take(evaluators.wait(POLL_SECONDS)).items():
                self._finish_trial(self.state.candidates[number], outcome)
                total = self.config.budget.trials or len(self.state.candidates)
                self._tell("search", watch, len(self.state.finished), total, self._sentence(number))
        write_trials_so_far(self.reports, self.config, self.state)

    def _take(self, abandoned: list[Candidate]) -> list[Candidate]:
        """The next candidates for one evaluator: merges together, and a checkpoint that is scored as it lies alone."""
        batch = [abandoned.pop(0) if abandoned else self._ask()]
        while len(batch) < self.config.evaluators.together and (abandoned or self._may_ask()):
            number = len(self.state.candidates)
            start = self.starts[number] if number < len(self.starts) else None
            following = abandoned[0] if abandoned else start
            if batch[0].model is not None or (following is not None and following.model is not None):
                break
            batch.append(abandoned.pop(0) if abandoned else self._ask())
        return batch

    def _pieces(self, works: Mapping[int, Work]) -> list[Mapping[str, Work]]:
        """What evaluators are given one by one: several candidates, or a part of one."""
        if len(self.parts) == 1:
            return [{str(number): work for number, work in works.items()}]
        return [{key: part} for number in works for key, part in split_work(number, works[number], self.parts).items()]

    def _may_ask(self) -> bool:
        """Whether another candidate is wanted; the starts always are.

        Raises:
            StudyError: All of the starts failed: what is wrong is wrong with the suite, the backend or the recipe.
        """
        num_asked, budget = len(self.state.candidates), self.config.budget
        if num_asked < len(self.starts):
            return True
        starts = [self.state.finished.get(one.number) for one in self.starts]
        if all(record is not None and record["score"] is None for record in starts):
            reasons = dict.fromkeys(str(record["failure"]) for record in starts if record is not None)
            raise StudyError(f"the uniform merge and all single parents failed: {'; '.join(list(reasons)[:2])}")
        spent = self.state.spent(datetime.now(UTC))._replace(trials=num_asked)
        return not budget.is_spent(spent, self.config.evaluators.gpus)

    def _ask(self) -> Candidate:
        """The next candidate, on disk before anything is done with it."""
        number = len(self.state.candidates)
        if number < len(self.starts):
            candidate = self.starts[number]
        else:
            point = dict(self.searcher.ask(number, self.state.seen))
            values = self.config.space.values(point)
            label = f"trial {number}"
            candidate = Candidate(number=number, origin="searcher", label=label, point=point, values=values)
        asked_after = len(self.state.finished)
        self._record({"type": "asked", "candidate": candidate.to_record(), "asked_after": asked_after})
        return candidate

    def _finish_trial(self, candidate: Candidate, outcome: Outcome) -> None:
        self._keep_report(candidate, outcome)
        self._record({"type": "finished", "trial": candidate.number, **outcome_fields(outcome)})
        self._keep_incumbent(candidate, outcome)
        self._write_trials()

    def _write_trials(self) -> None:
        """Rewrite the table of trials, unless that would take much of the time: it grows with every trial."""
        began = time.monotonic()
        if began - self._trials_written_at >= self._trials_write_seconds / MAX_SHARE_OF_WRITING:
            write_trials_so_far(self.reports, self.config, self.state)
            self._trials_written_at = time.monotonic()
            self._trials_write_seconds = self._trials_written_at - began

    def _keep_incumbent(self, candidate: Candidate, outcome: Outcome) -> None:
        """Remember the items of the best trial: what climbs the ladder is compared with it."""
        if len(self.config.rungs) > 1 and self.state.ranking[:1] == [candidate.number] and outcome.report is not None:
            self._write_evaluation(outcome.report)

    def _incumbent(self) -> EvalReport | None:
        if not self.state.ranking:
            return None
        evaluation_id = self.state.finished[self.state.ranking[0]]["evaluation_id"]
        if self._incumbent_report is None or self._incumbent_report.evaluation_id != evaluation_id:
            path = self._evaluation_path(evaluation_id)
            # Where the objective depends on other trials, an old one may have become the best; it was not kept.
            self._incumbent_report = without_texts(report_from_json(path.read_text())) if path.exists() else None
        return self._incumbent_report

    def _work(self, candidate: Candidate, role: Role) -> Work:
        evaluators = self.config.evaluators
        place = candidate.model
        climbs = role == "search" and candidate.origin == "searcher" and len(self.config.rungs) > 1
        return Work(
            recipe=bound_recipe(self.recipe, candidate),
            checkpoint=None if place is None else self.recipe.checkpoints[place].source,
            role=role,
            suite=str(Path(self.config.suite.path).absolute()),
            suite_digest=self.config.suite.digest,
            memory_bytes=None if evaluators.memory_bytes is None else evaluators.memory_bytes // 2,
            num_evaluators=evaluators.count,
            threads=max(1, int(evaluators.cpus)),
            resident=evaluators.resident,
            rungs=self.config.rungs if climbs else (None,),
            incumbent=self._incumbent() if climbs else None,
            on_every_entry=self.state.objective.is_several,
            cache=None if self.config.cache is None else str(self.config.cache.absolute()),
        )

    # Selection

    def _select(self, pool: LazyPool) -> None:
        """Score the finalists on selection items, and name the winner."""
        finalists = self.state.finalists(self.config.finalists)
        if not finalists:
            reasons = sorted({str(record["failure"]) for record in self.state.finished.values()})
            raise StudyError(f"all {len(self.state.finished)} trials failed: {'; '.join(reasons[:3])}")
        works = {number: self._work(self.state.candidates[number], "selection") for number in finalists}
        self._score(pool, "selection", works)
        winner = self.state.choose_winner(finalists)
        if winner != self.state.winner:
            self._record({"type": "winner", "trial": winner, "finalists": finalists})

    def _score(self, pool: LazyPool, role: Literal["selection", "report"], works: dict[int, Work]) -> None:
        """Score candidates on the items of a role, those that have no score yet; failures are recorded.

        What failed under an earlier driver is tried again: a time-out or a lost node may have been of the moment.
        """
        waiting = [number for number in works if not self._is_settled(role, number)]
        total, watch = len(waiting), Watch(0)
        num_done = 0
        pieces: list[Mapping[str, Work]] = []
        parts = Gathering(self.parts)
        while num_done < total:
            evaluators = pool.open()
            while (waiting or pieces) and evaluators.has_room:
                if not pieces:
                    # No more together than leaves something for every evaluator.
                    most = min(self.config.evaluators.together, -(-len(waiting) // self.config.evaluators.count))
                    is_merged = [works[number].recipe is not None for number in waiting[:most]]
                    count = max(1, is_merged.index(False) if False in is_merged else most)
                    batch, waiting = waiting[:count], waiting[count:]
                    pieces = self._pieces({number: works[number] for number in batch})
                evaluators.submit(pieces.pop(0))
            for number, outcome in parts.take(evaluators.wait(POLL_SECONDS)).items():
                self._keep_report(self.state.candidates[number], outcome)
                self._scored_now.add((role, number))
                self._record({"type": "scored", "role": role, "trial": number, **outcome_fields(outcome)})
                num_done += 1
                self._tell(
                    role, watch, num_done, total, f"{self.state.candidates[number].label} scored on {role} items"
                )

    def _is_settled(self, role: Role, number: int) -> bool:
        record = self.state.scored.get((role, number))
        return record is not None and (record["score"] is not None or (role, number) in self._scored_now)

    # Publication and report

    def _publish(self, pool: LazyPool) -> None:
        """Merge the winner for real, verify it, and see that it is what was scored."""
        winner = self.state.winner
        assert winner is not None
        if self.state.published is not None and self.state.published["trial"] == winner:
            return
        self.lease.check()
        pool.make_room()
        self._tell("publication", Watch(0), 0, 1, f"merging {self.state.candidates[winner].label}")
        candidate = self.state.candidates[winner]
        path = self.output / BEST
        merged = merge_recipe(
            published_recipe(self.config.recipe, candidate),
            path,
            executor=self.executor or _ray_executor(),
            # Only an earlier winner of this very study can be in the way.
            force=bool(self.state.earlier_winners),
        )
        problems = list(verify_merge(path).problems)
        if self.config.backend.name == "hf":
            from remelt_evals.loading_check import check_loading

            problems += check_loading(path).problems
        if problems:
            raise OutputError(f"{path} does not verify: {'; '.join(problems[:5])}")
        scored = self.state.finished[winner]["digest"]
        if candidate.model is None and merged.digest != scored:
            raise NumericsError(
                f"{path} has the digest {merged.digest[:12]}, the merge that was scored had {scored[:12]}: an "
                "evaluator computed with other versions than the workers; install the same on every node"
            )
        self._record({"type": "published", "trial": winner, "digest": merged.digest, "run_id": merged.run_id})
        self._tell("publication", Watch(0), 1, 1, f"{candidate.label} is merged and verified")

    def _baselines(self) -> Iterable[int]:
        """Trials of the uniform merge and of every single parent."""
        return [one.number for one in self.starts if one.origin in ("uniform", "parent")]

    def _report(self, pool: LazyPool, numbers: Iterable[int]) -> None:
        """Score on report items. The winner is read from where it was published."""
        works = {}
        for number in numbers:
            work = self._work(self.state.candidates[number], "report")
            if number == self.state.winner:
                work = replace(work, recipe=None, checkpoint=str((self.output / BEST).absolute()))
            works[number] = work
        self._score(pool, "report", works)

    def _keep_report(self, candidate: Candidate, outcome: Outcome) -> None:
        """Samples and all: Parquet for everyone, JSON of report items for the paired comparison."""
        if outcome.report is None:
            return
        self.lease.check()
        write_candidate(self.reports, self.config, self.inputs, candidate, outcome)
        if outcome.report.role == "report" and outcome.report.is_ok:
            self._write_evaluation(outcome.report)

    def _write_evaluation(self, report: EvalReport) -> None:
        path = self._evaluation_path(report.evaluation_id)
        path.parent.mkdir(exist_ok=True)
        write_file_durably(path, report_to_json(report).encode())

    def _evaluation_path(self, evaluation_id: str) -> Path:
        return self.output / EVALUATIONS / f"{evaluation_id}.json"

    # Progress

    def _sentence(self, number: int) -> str:
        record, label = self.state.finished[number], self.state.candidates[number].label
        if record["failure"]:
            return f"{label} failed: {record['failure']}"
        if record["state"] == TrialState.STOPPED:
            return f"{label} stopped after {record['fidelity']}: about {record['score']:.4f}"
        return f"{label} scored {self.state.scores[number]:.4f} in {record['seconds']:.1f} s"

    def _tell(self, phase: Phase, watch: Watch, num_done: int, num_total: int, last: str) -> None:
        best = self.state.ranking[0] if self.state.ranking else None
        self.on_progress(
            StudyProgress(
                phase=phase,
                num_done=num_done,
                num_total=num_total,
                best_label=None if best is None else self.state.candidates[best].label,
                best_score=None if best is None else self.state.score(best),
                eta_seconds=watch.eta_seconds(num_done, num_total),
                last=last,
            )
        )


def _ray_executor() -> Executor:
    from remelt_jobs.ray_executor import RayExecutor

    return RayExecutor()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
