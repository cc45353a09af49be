"""Reports as they were written: studies, their trials, and evaluations with every score.

    find_reports --> choose_study --> read_trials, read_evaluations --> with_samples

Reading is safe while others write: a file is whole or not there, and `runs` is read first, which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, Role, SampleScore, TaskReport, entry_names, macro_standard_error
from remelt_evals.report_schemas import TABLES
from remelt_evals.report_tables import ParentRow, RunContext, TrialRow, read_table

NO_STUDY = "none"
"""The partition of evaluations outside of studies."""

BEST = "best"
"""Names the trial that a study published."""

SHORTEST_PREFIX = 4
"""Characters of an id that name it."""


class StudyEntry(NamedTuple):
    """A study that has trials in the reports."""

    study_id: str
    began_at: datetime
    num_trials: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, and what led to it."""

    report: EvalReport
    """Without samples, until `with_samples` reads them."""
    context: RunContext

    @property
    def name(self) -> str:
        """What people call it: the trial's label, else the checkpoint's folder."""
        return self.context.label or Path(self.report.checkpoint).name or self.report.checkpoint


def find_reports(path: str | Path) -> Path:
    """The folder of the tables: `path`, or `reports` in it where `path` is a study's output.

    Raises:
        EvaluationError: neither holds a table.
    """
    path = Path(path)
    for folder in (path, path / "reports"):
        if any((folder / table).is_dir() for table in TABLES):
            return folder
    if not path.is_dir():
        raise EvaluationError(f"{path} is no folder; give the folder that `--reports` named, or a study's output")
    raise EvaluationError(
        f"{path} holds no reports (none of {', '.join(TABLES)}); give the folder that `--reports` named, or a study's "
        "output"
    )


def list_studies(reports: str | Path) -> list[StudyEntry]:
    """Studies that have trials, the latest last."""
    if not (Path(reports) / "trials").is_dir():
        return []
    began: dict[str, datetime] = {}
    count: dict[str, int] = {}
    for row in read_table(reports, "trials", columns=["study_id", "started_at"]).to_pylist():
        study = row["study_id"]
        count[study] = count.get(study, 0) + 1
        if row["started_at"] is not None:
            began[study] = min(row["started_at"], began.get(study, row["started_at"]))
    ordered = sorted(began, key=lambda study: (began[study], study))
    return [StudyEntry(study, began[study], count[study]) for study in ordered]


def choose_study(reports: str | Path, wanted: str | None = None) -> str | None:
    """A study's id from the beginning of it; without one, the study that began last, or None where there is none.

    Raises:
        EvaluationError: no study, or several, begin so.
    """
    studies = [entry.study_id for entry in list_studies(reports)]
    if wanted is None:
        return studies[-1] if studies else None
    found = [study for study in studies if study.startswith(wanted)]
    if len(found) != 1:
        listed = ", ".join(study[:12] for study in sorted(found or studies)) or "none"
        what = "several begin so" if found else "none begins so"
        raise EvaluationError(f"study {wanted!r} in {reports}: {what}; there are {listed}")
    return found[0]


def read_trials(reports: str | Path, study_id: str, evaluations: Iterable[Evaluation] | None = None) -> list[TrialRow]:
    """The trials of a study by number.

    Args:
        evaluations: of the study; what trials do not say themselves is taken from theirs on search items. They are read
            where they are needed and not given.

    Raises:
        EvaluationError: the study has no trials.
    """
    rows = read_table(reports, "trials", filters={"study": [study_id]}).to_pylist()
    if not rows:
        raise EvaluationError(f"{reports} holds no trials of study {study_id[:12]}")
    trials = [_trial(row) for row in sorted(rows, key=lambda row: row["trial_number"])]
    if all(is_complete(trial) for trial in trials):
        return trials
    if evaluations is None:
        evaluations = read_evaluations(reports, study_id=study_id)
    by_id = {evaluation.report.evaluation_id: evaluation for evaluation in evaluations}
    return [_completed(trial, by_id) for trial in trials]


def is_complete(trial: TrialRow) -> bool:
    """Whether a trial says all that `show` wants of it, so that its evaluations need not be read."""
    return trial.score is None or None not in (trial.scores, trial.standard_errors, trial.fidelity)


def read_evaluations(
    reports: str | Path, *, study_id: str | None = None, evaluation_ids: Collection[str] | None = None
) -> list[Evaluation]:
    """Evaluations with their scores, without samples, as they began.

    Args:
        study_id: of this study alone; `NO_STUDY` for those outside of studies. All by default.
        evaluation_ids: these alone.
    """
    filters: dict[str, Collection[str]] = {}
    if study_id is not None:
        filters["study"] = [study_id]
    if evaluation_ids is not None:
        filters["evaluation_id"] = evaluation_ids
    if not (Path(reports) / "runs").is_dir():
        return []
    runs = read_table(reports, "runs", filters=filters).to_pylist()
    tasks: dict[tuple[str, str], list[TaskReport]] = {}
    for row in read_table(reports, "metrics", filters=filters).to_pylist():
        tasks.setdefault((row["evaluation_id"], row["study"]), []).append(_task(row))
    labels = _labels(reports, runs)
    found = [
        _evaluation(row, labels.get(row["trial_id"]), tasks.get((row["evaluation_id"], row["study"]), []))
        for row in runs
    ]
    return sorted(found, key=lambda evaluation: evaluation.report.started_at)


def _labels(reports: str | Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Labels by trial id, for runs that do not say theirs."""
    studies = {row["study"] for row in runs if row["label"] is None and row["trial_id"] is not None}
    if not studies or not (Path(reports) / "trials").is_dir():
        return {}
    rows = read_table(reports, "trials", columns=["trial_id", "label"], filters={"study": studies}).to_pylist()
    return {row["trial_id"]: row["label"] for row in rows}


def evaluations_of(reports: str | Path, trials: Iterable[TrialRow]) -> list[Evaluation]:
    """The evaluations of some trials; reads no others."""
    ids = {each for trial in trials for each in trial.evaluation_ids}
    return read_evaluations(reports, evaluation_ids=ids) if ids else []


def evaluations_named(reports: str | Path, names: Iterable[str], trials: Sequence[TrialRow]) -> list[Evaluation]:
    """Evaluations that one of the names may mean, and all outside of studies; reads no others.

    Args:
        names: as `report_comparing.find_evaluations` takes them.
        trials: of the study.
    """
    ids: set[str] = set()
    for name in names:
        ids.update(each for trial in trials if _may_mean(trial, name) for each in trial.evaluation_ids)
        if len(name) >= SHORTEST_PREFIX:
            files = (Path(reports) / "runs").glob(f"*/*/part-{escape(name)}*.parquet")
            ids.update(file.stem.removeprefix("part-") for file in files)
    named = read_evaluations(reports, evaluation_ids=ids) if ids else []
    others = read_evaluations(reports, study_id=NO_STUDY)
    return [*named, *(one for one in others if one.report.evaluation_id not in ids)]


def _may_mean(trial: TrialRow, name: str) -> bool:
    if name in (trial.label, str(trial.trial_number)) or (name == BEST and trial.is_winner):
        return True
    ids = (trial.candidate_id or "", trial.digest or "")
    return len(name) >= SHORTEST_PREFIX and any(one.startswith(name) for one in ids)


def with_samples(reports: str | Path, evaluation: Evaluation) -> EvalReport:
    """The report of an evaluation with the score of every item.

    Raises:
        EvaluationError: its samples are not there.
    """
    report = evaluation.report
    filters = {
        "study": [evaluation.context.study_id or NO_STUDY],
        "evaluation_id": [report.evaluation_id],
    }
    samples: dict[tuple[str, ...], list[SampleScore]] = {}
    for row in read_table(reports, "samples", filters=filters).to_pylist():
        samples.setdefault((row["ability"], row["task"], row["metric"], row["filter"]), []).append(_sample(row))
    tasks = []
    for task in report.tasks:
        own = samples.get((task.ability, task.task, task.metric, task.filter), [])
        if len(own) != task.n:
            raise EvaluationError(
                f"{reports}: evaluation {report.evaluation_id[:12]} has {len(own)} of {task.n} samples of {task.task}; "
                "copy its files of table samples here too"
            )
        tasks.append(replace(task, samples=tuple(sorted(own, key=lambda sample: sample.doc_id))))
    return replace(report, tasks=tuple(tasks))


def search_evaluation(trial: TrialRow, by_id: Mapping[str, Evaluation], role: str = "search") -> Evaluation | None:
    """A trial's evaluation on the items of a role; the last one where there are several fidelities."""
    found = [by_id[each] for each in trial.evaluation_ids if each in by_id and by_id[each].report.role == role]
    return found[-1] if found else None


def _completed(trial: TrialRow, by_id: Mapping[str, Evaluation]) -> TrialRow:
    """A trial with what its evaluation on search items knows better."""
    evaluation = search_evaluation(trial, by_id)
    if evaluation is None:
        return trial
    report, context = evaluation.report, evaluation.context
    names = entry_names(report.tasks)
    error = trial.standard_error
    if error is None and trial.score is not None and report.tasks:
        # Only the macro mean has a standard error that follows from those of the entries.
        weights = [task.weight for task in report.tasks]
        values = [task.oriented_value for task in report.tasks]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        error = macro_standard_error(report) if abs(mean - trial.score) < 1e-9 else None
    return replace(
        trial,
        fidelity=trial.fidelity or report.fidelity,
        digest=trial.digest or report.digest,
        standard_error=error,
        scores=trial.scores or dict(zip(names, [task.value for task in report.tasks], strict=True)) or None,
        standard_errors=trial.standard_errors or dict(zip(names, [task.stderr for task in report.tasks], strict=True)),
        host=trial.host or context.host,
        device=trial.device or report.device,
        evaluation_seconds=report.seconds if trial.evaluation_seconds is None else trial.evaluation_seconds,
        merge_seconds=context.merge_seconds if trial.merge_seconds is None else trial.merge_seconds,
    )


def _trial(row: Mapping[str, Any]) -> TrialRow:
    maps = ("scores", "standard_errors", "coefficients")
    fields = {name: row[name] for name in TrialRow.__slots__}
    fields |= {name: None if row[name] is None else dict(row[name]) for name in maps}
    fields["evaluation_ids"] = tuple(row["evaluation_ids"] or ())
    return TrialRow(**fields)


def _evaluation(row: Mapping[str, Any], label: str | None, tasks: Sequence[TaskReport]) -> Evaluation:
    report = EvalReport(
        evaluation_id=row["evaluation_id"],
        checkpoint=row["checkpoint"],
        digest=row["digest"],
        suite=row["suite"],
        suite_digest=row["suite_digest"],
        role=_role(row),
        fidelity=row["fidelity"],
        backend=row["backend"],
        device=row["device"],
        dtype=row["dtype"],
        versions=json.loads(row["versions_json"] or "{}"),
        status=row["status"],
        error=row["error"],
        tasks=tuple(tasks),
        notes=tuple(row["notes"] or ()),
        started_at=row["started_at"].isoformat(),
        seconds=row["seconds"],
    )
    context = RunContext(
        parents=tuple(ParentRow(**parent) for parent in row["parents"] or ()),
        coefficients=None if row["coefficients"] is None else dict(row["coefficients"]),
        **{name: row[name] for name in RunContext.__slots__ if name not in ("parents", "coefficients", "label")},
        label=row["label"] or label,
    )
    return Evaluation(report, context)


def _role(row: Mapping[str, Any]) -> Role:
    role: Role = row["role"]
    return role


def _task(row: Mapping[str, Any]) -> TaskReport:
    return TaskReport(
        ability=row["ability"],
        task=row["task"],
        task_version=row["task_version"],
        metric=row["metric"],
        filter=row["filter"],
        value=row["score"],
        stderr=row["standard_error"],
        n=row["num_samples"],
        n_total=row["num_total"],
        higher_is_better=row["higher_is_better"],
        weight=row["weight"],
        num_fewshot=row["num_fewshot"],
        aggregation=row["aggregation"],
    )


def _sample(row: Mapping[str, Any]) -> SampleScore:
    fields = {name: row[name] for name in SampleScore.__slots__ if name not in ("correct", "loglik")}
    return SampleScore(correct=row["is_correct"], loglik=tuple(row["loglik"] or ()), **fields)
