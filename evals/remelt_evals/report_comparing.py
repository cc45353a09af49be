"""Is B better than A, and where did it get worse? Two evaluations of a report, found by name, paired item by item.

`remelt_evals.paired` has the arithmetic; here both sides are found and refused unless they answered the same items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from remelt.errors import EvaluationError
from remelt.strict_config import suggestion
from remelt_evals.eval_report import EvalReport, SampleScore, TaskReport
from remelt_evals.paired import Difference, compare, keyed_samples
from remelt_evals.report_reading import BEST, SHORTEST_PREFIX, Evaluation, with_samples
from remelt_evals.report_tables import TrialRow

_NUM_EXAMPLES = 5


class Flip(NamedTuple):
    """An item on which B did worse than A."""

    doc_id: int
    target: str
    response_a: str
    response_b: str
    score_a: float
    score_b: float
    doc_json: str


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """One entry of the suite."""

    task: str
    difference: Difference
    num_lost: int
    """Items on which B did worse; for metrics of 0 and 1, those that A had right and B has wrong."""
    num_won: int
    examples: tuple[Flip, ...]
    """The largest losses."""

    @property
    def is_worse(self) -> bool:
        """Whether the interval lies below zero."""
        return self.difference.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportComparison:
    """B against A."""

    a: Evaluation
    b: Evaluation
    macro: Difference | None
    """Over all entries; None where one was asked for."""
    tasks: tuple[TaskComparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "a": _side(self.a),
            "b": _side(self.b),
            "role": self.a.report.role,
            "fidelity": self.a.report.fidelity,
            "suite": self.a.report.suite,
            "suite_digest": self.a.report.suite_digest,
            "macro": None if self.macro is None else self.macro._asdict(),
            "tasks": [
                {
                    "task": task.task,
                    **task.difference._asdict(),
                    "is_worse": task.is_worse,
                    "num_lost": task.num_lost,
                    "num_won": task.num_won,
                    "examples": [flip._asdict() for flip in task.examples],
                }
                for task in self.tasks
            ],
        }


def compare_in_reports(
    reports: str | Path,
    evaluations: Sequence[Evaluation],
    name_a: str,
    name_b: str,
    *,
    role: str = "report",
    task: str | None = None,
    trials: Iterable[TrialRow] = (),
    study_id: str | None = None,
    num_resamples: int = 10_000,
) -> ReportComparison:
    """Find A and B and compare them on the items that both answered.

    Args:
        evaluations: of the reports, without samples.
        name_a, name_b: a label (in the study `study_id`), `best`, the name of a checkpoint's folder, or the beginning
            of a candidate id, an evaluation id or a digest (four characters at least).
        task: one entry, by its ability or lm-eval's name.
        trials: of the study; one of them may say that it is `best`.

    Raises:
        EvaluationError: a name is unknown or ambiguous, or suites, fidelities or items differ; the message says how.
    """
    labels = [(trial.label or "", bool(trial.is_winner)) for trial in trials]
    found_a, found_b = (
        find_evaluations(evaluations, name, role=role, study_id=study_id, labels=labels) for name in (name_a, name_b)
    )
    a, b = _matching_pair(found_a, found_b, name_a, name_b)
    report_a, report_b = (_one_task(with_samples(reports, each), task) for each in (a, b))
    _refuse_other_items(report_a, report_b, name_a, name_b)
    found = compare(report_a, report_b, num_resamples=num_resamples)
    tasks = tuple(
        _task_comparison(one, two, difference)
        for one, two, difference in zip(report_a.tasks, _in_order_of(report_a, report_b), found.abilities, strict=True)
    )
    return ReportComparison(a=a, b=b, macro=found.macro if task is None else None, tasks=tasks)


def find_evaluations(
    evaluations: Sequence[Evaluation],
    name: str,
    *,
    role: str | None = None,
    study_id: str | None = None,
    labels: Sequence[tuple[str, bool]] = (),
) -> list[Evaluation]:
    """All evaluations of the one checkpoint that `name` names, on the items of a role.

    Args:
        labels: of the study's trials, and which of them is `best`.

    Raises:
        EvaluationError: there is none, there are several checkpoints, or none of its evaluations has the role.
    """
    wanted = {name, f"trial {name}"} if name.isdigit() else {name}
    wanted.update(label for label, is_best in labels if is_best and name == BEST)
    found = [each for each in evaluations if each.context.label in wanted and each.context.study_id == study_id]
    if not found:  # outside of studies
        found = [each for each in evaluations if name in (each.report.checkpoint, Path(each.report.checkpoint).name)]
        found = [each for each in found if each.context.label is None]
    if not found and len(name) >= SHORTEST_PREFIX:
        found = [each for each in evaluations if any(one.startswith(name) for one in _ids(each))]
    if not found:
        known = {each.name for each in evaluations} | {label for label, _ in labels if not label.startswith("trial ")}
        raise EvaluationError(f"no evaluation is called {name!r}; {suggestion(name, known)}")
    _refuse_several(found, name)
    with_role = [each for each in found if role in (None, each.report.role)]
    if not with_role:
        roles = sorted({each.report.role for each in found})
        raise EvaluationError(
            f"{name} was not scored on {role} items, but on {', '.join(roles)} items: give --role {roles[0]}"
        )
    return with_role


def choose_one(
    reports: str | Path,
    evaluations: Sequence[Evaluation],
    name: str,
    *,
    role: str | None = None,
    trials: Iterable[TrialRow] = (),
    study_id: str | None = None,
) -> Evaluation:
    """The one evaluation that `name` names, with its samples; names are those of `compare_in_reports`.

    Raises:
        EvaluationError: there is none, or there are several; the message lists them.
    """
    labels = [(trial.label or "", bool(trial.is_winner)) for trial in trials]
    found = find_evaluations(evaluations, name, role=role, study_id=study_id, labels=labels)
    if len(found) > 1:
        listed = ", ".join(
            f"{each.report.evaluation_id[:12]} ({each.report.role}, {each.report.fidelity})" for each in found
        )
        raise EvaluationError(f"{name} has several evaluations: give the id of one, or a --role: {listed}")
    return replace(found[0], report=with_samples(reports, found[0])) if found[0].report.is_ok else found[0]


def _ids(evaluation: Evaluation) -> list[str]:
    ids = (evaluation.context.candidate_id, evaluation.report.evaluation_id, evaluation.report.digest)
    return [one for one in ids if one is not None]


def _refuse_several(found: Sequence[Evaluation], name: str) -> None:
    """A label names one trial. Its digest may change: a parent that won is published with a digest of its own."""
    labels = {(each.context.study_id, each.context.label) for each in found}
    several = {each.report.digest: each for each in found} if len(labels) > 1 or not found[0].context.label else {}
    if len(several) > 1:
        listed = ", ".join(f"{each.name} ({each.report.evaluation_id[:12]})" for each in several.values())
        raise EvaluationError(f"{name!r} may be any of {listed}: give more of its id")


def _matching_pair(
    found_a: Sequence[Evaluation], found_b: Sequence[Evaluation], name_a: str, name_b: str
) -> tuple[Evaluation, Evaluation]:
    """The latest evaluations of both on the same suite and fidelity by the same backend, the full one before others."""
    pairs = [
        (one, two)
        for one, two in product(found_a, found_b)
        if _setting(one.report) == _setting(two.report) and one.report.is_ok and two.report.is_ok
    ]
    if pairs:
        return max(
            pairs,
            key=lambda pair: (pair[0].report.fidelity == "full", pair[0].report.started_at, pair[1].report.started_at),
        )
    a, b = found_a[-1].report, found_b[-1].report
    for name, report in ((name_a, a), (name_b, b)):
        if not report.is_ok:
            raise EvaluationError(f"the evaluation of {name} failed and cannot be compared: {report.error}")
    settings = zip(_SETTING, _setting(a), _setting(b), strict=True)
    how = "; ".join(f"{what} {one[:12]} and {two[:12]}" for what, one, two in settings if one != two)
    raise EvaluationError(f"{name_a} and {name_b} were scored in different ways ({how}): evaluate both on the same")


_SETTING = ("suite digest", "fidelity", "backend", "dtype")


def _setting(report: EvalReport) -> tuple[str, ...]:
    return report.suite_digest, report.fidelity, report.backend, report.dtype


def _one_task(report: EvalReport, wanted: str | None) -> EvalReport:
    if wanted is None:
        return report
    tasks = tuple(task for task in report.tasks if wanted in (task.ability, task.task))
    if not tasks:
        known = {task.ability for task in report.tasks}
        raise EvaluationError(f"suite {report.suite} has no eval task {wanted!r}; {suggestion(wanted, known)}")
    return replace(report, tasks=tasks)


def _in_order_of(a: EvalReport, b: EvalReport) -> list[TaskReport]:
    others = {(task.ability, task.task, task.metric, task.filter): task for task in b.tasks}
    keys = [(task.ability, task.task, task.metric, task.filter) for task in a.tasks]
    if others.keys() != set(keys):
        only = " ".join(min(others.keys() ^ set(keys)))
        raise EvaluationError(f"{a.checkpoint} and {b.checkpoint} have different eval tasks: only one has {only}")
    return [others[key] for key in keys]


def _refuse_other_items(a: EvalReport, b: EvalReport, name_a: str, name_b: str) -> None:
    for one, two in zip(a.tasks, _in_order_of(a, b), strict=True):
        keyed_a, keyed_b = keyed_samples(one.samples), keyed_samples(two.samples)
        only_a, only_b = keyed_a.keys() - keyed_b.keys(), keyed_b.keys() - keyed_a.keys()
        if only_a or only_b:
            raise EvaluationError(
                f"{one.task}: {name_a} and {name_b} answered different items ({len(only_a)} only the first, "
                f"{len(only_b)} only the second, {len(keyed_a.keys() & keyed_b.keys())} both): evaluate both on the "
                "same"
            )
        changed = sum(keyed_a[key].prompt_hash != keyed_b[key].prompt_hash for key in keyed_a)
        if changed:
            raise EvaluationError(
                f"{one.task}: {changed} of {len(keyed_a)} items were put to {name_a} and {name_b} in different "
                "prompts: evaluate both with the same templates and shots"
            )


def _task_comparison(a: TaskReport, b: TaskReport, difference: Difference) -> TaskComparison:
    keyed = keyed_samples(b.samples)
    sign = 1.0 if a.higher_is_better else -1.0
    pairs = [(one, keyed[key]) for key, one in keyed_samples(a.samples).items()]
    changes = [(sign * ((two.score or 0.0) - (one.score or 0.0)), one, two) for one, two in pairs]
    lost = sorted((change for change in changes if change[0] < 0), key=lambda change: (change[0], change[1].doc_id))
    return TaskComparison(
        task=a.task,
        difference=difference,
        num_lost=len(lost),
        num_won=sum(change > 0 for change, _, _ in changes),
        examples=tuple(_flip(one, two) for _, one, two in lost[:_NUM_EXAMPLES]),
    )


def _flip(a: SampleScore, b: SampleScore) -> Flip:
    return Flip(a.doc_id, a.target, a.response, b.response, a.score or 0.0, b.score or 0.0, a.doc_json)


def _side(evaluation: Evaluation) -> dict[str, Any]:
    report, context = evaluation.report, evaluation.context
    return {
        "name": evaluation.name,
        "evaluation_id": report.evaluation_id,
        "candidate_id": context.candidate_id,
        "digest": report.digest,
        "checkpoint": report.checkpoint,
        "study_id": context.study_id,
    }
