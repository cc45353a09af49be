"""Reports as Parquet: `<reports>/<table>/study=<id or none>/date=<UTC>/part-<id>.parquet`.

Tables `runs`, `metrics`, `samples` get one file each for an evaluation, `trials` one for a study. A file is written
whole to a temporary name and renamed, so a reader sees all of it or nothing; `runs` comes last, so an evaluation that
has a row there has its other rows too. Any reader of hive-partitioned Parquet reads them; `read_table` is ours.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, TaskReport, canonical_json, number_or_none, objective
from remelt_evals.report_schemas import TABLES, table_schema

# Half the width of a 95 % interval in standard errors.
_Z95 = 1.959963984540054

TrialState: TypeAlias = Literal["RUNNING", "COMPLETE", "STOPPED", "FAILED"]


class ParentRow(NamedTuple):
    """A checkpoint that went into a merge."""

    uri: str
    """As the recipe names it."""
    revision: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What the caller knows of an evaluation and the evaluator does not; all of it may be missing."""

    study_id: str | None = None
    trial_id: str | None = None
    trial_number: int | None = None
    candidate_id: str | None = None
    run_id: str | None = None
    """Of the merge that made the checkpoint."""
    recipe_json: str | None = None
    parents: tuple[ParentRow, ...] = ()
    coefficients: Mapping[str, float] | None = None
    git_commit: str | None = None
    ray_job_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One trial of a study."""

    trial_id: str
    trial_number: int
    state: TrialState
    label: str | None = None
    """Where the trial came from: `uniform`, a parent's name, or the searcher."""
    candidate_id: str | None = None
    evaluation_ids: tuple[str, ...] = ()
    score: float | None = None
    """The objective on search items."""
    scores: Mapping[str, float] | None = None
    """By ability."""
    coefficients: Mapping[str, float] | None = None
    error: str | None = None
    started_at: datetime | None = None
    """With a time zone."""
    finished_at: datetime | None = None
    seconds: float | None = None


def write_evaluation(reports: str | Path, report: EvalReport, context: RunContext | None = None) -> tuple[Path, ...]:
    """Write an evaluation's rows of `samples`, `metrics` and `runs`; returns the files, in that order.

    The same report written again replaces its files.
    """
    context = context or RunContext()
    started = datetime.fromisoformat(report.started_at).astimezone(UTC)
    ids = {
        "evaluation_id": report.evaluation_id,
        "study_id": context.study_id,
        "trial_id": context.trial_id,
        "trial_number": context.trial_number,
        "candidate_id": context.candidate_id,
        "run_id": context.run_id,
        "digest": report.digest,
        "suite_digest": report.suite_digest,
        "suite": report.suite,
        "role": report.role,
    }
    rows = {
        "samples": [row for task in report.tasks for row in _sample_rows(ids, task)],
        "metrics": [{**ids, "fidelity": report.fidelity, **_metric_row(task)} for task in report.tasks],
        "runs": [{**ids, **_run_row(report, context, started)}],
    }
    return tuple(
        _write(_partition(reports, table, context.study_id, started), table, report.evaluation_id, table_rows)
        for table, table_rows in rows.items()
    )


def write_trials(reports: str | Path, study_id: str, trials: Sequence[TrialRow], *, study_started_at: datetime) -> Path:
    """Write all trials of a study so far, in place of what was written of it before.

    Args:
        study_started_at: decides the `date` partition, so that a study over midnight keeps one file.
    """
    rows = [
        {
            "study_id": study_id,
            "trial_id": trial.trial_id,
            "trial_number": trial.trial_number,
            "candidate_id": trial.candidate_id,
            "evaluation_ids": list(trial.evaluation_ids),
            "label": trial.label,
            "state": trial.state,
            "score": number_or_none(trial.score),
            "scores": _pairs(trial.scores),
            "coefficients": _pairs(trial.coefficients),
            "error": trial.error,
            "started_at": trial.started_at,
            "finished_at": trial.finished_at,
            "seconds": number_or_none(trial.seconds),
        }
        for trial in trials
    ]
    folder = _partition(reports, "trials", study_id, study_started_at.astimezone(UTC))
    return _write(folder, "trials", study_id, rows)


def write_diff(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write the rows of a diff between two checkpoints to one Parquet file.

    Raises:
        ValueError: a row has a key that is no column of the `diff` table.
    """
    path = Path(path)
    known = set(table_schema("diff").names)
    unknown = sorted({key for row in rows for key in row} - known)
    if unknown:
        raise ValueError(f"rows of a diff have the unknown keys {', '.join(unknown)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_file(path, "diff", [{key: _without_nan(value) for key, value in row.items()} for row in rows])
    return path


def read_table(reports: str | Path, table: str) -> Any:
    """All rows of a table as a `pyarrow.Table`, with the partition columns `study` and `date` as text.

    Raises:
        EvaluationError: there is no such table, or nothing was written to it yet.
    """
    import pyarrow as pa
    import pyarrow.dataset as ds

    if table not in TABLES:
        raise EvaluationError(f"reports have no table {table!r}: there are {', '.join(TABLES)}")
    folder = Path(reports) / table
    if not folder.is_dir():
        raise EvaluationError(f"{reports} holds no table {table}: nothing was evaluated into this folder yet")
    # Said, not guessed: a study id of digits alone would be read as a number.
    partitions = pa.schema([("study", pa.string()), ("date", pa.string())])
    schema = pa.schema([*table_schema(table), *partitions], metadata=table_schema(table).metadata)
    return ds.dataset(
        folder, schema, format="parquet", partitioning=ds.partitioning(partitions, flavor="hive")
    ).to_table()


def _run_row(report: EvalReport, context: RunContext, started: datetime) -> dict[str, Any]:
    versions = report.versions
    return {
        "fidelity": report.fidelity,
        "status": report.status,
        "error": report.error,
        "objective": number_or_none(objective(report)) if report.is_ok else None,
        "checkpoint": report.checkpoint,
        "recipe_json": context.recipe_json,
        "parents": [parent._asdict() for parent in context.parents],
        "coefficients": _pairs(context.coefficients),
        "backend": report.backend,
        "device": report.device,
        "dtype": report.dtype,
        "lm_eval_version": versions.get("lm-eval"),
        "transformers_version": versions.get("transformers"),
        "torch_version": versions.get("torch"),
        "versions_json": canonical_json(dict(versions)),
        "notes": list(report.notes),
        "git_commit": context.git_commit,
        "ray_job_id": context.ray_job_id,
        "started_at": started,
        "finished_at": started + timedelta(seconds=report.seconds),
        "seconds": report.seconds,
    }


def _metric_row(task: TaskReport) -> dict[str, Any]:
    half = None if task.stderr is None else _Z95 * task.stderr
    hashes = "\n".join(sorted(sample.doc_hash for sample in task.samples))
    return {
        "ability": task.ability,
        "task": task.task,
        "task_version": task.task_version,
        "metric": task.metric,
        "filter": task.filter,
        "value": task.value,
        "stderr": task.stderr,
        "ci_low": None if half is None else task.value - half,
        "ci_high": None if half is None else task.value + half,
        "n_samples": task.n,
        "n_total": task.n_total,
        "is_subset": task.n < task.n_total,
        "num_fewshot": task.num_fewshot,
        "higher_is_better": task.higher_is_better,
        "weight": task.weight,
        "aggregation": task.aggregation,
        "sample_ids_hash": hashlib.sha256(hashes.encode()).hexdigest(),
    }


def _sample_rows(ids: Mapping[str, Any], task: TaskReport) -> list[dict[str, Any]]:
    shared = {**ids, "ability": task.ability, "task": task.task, "metric": task.metric, "filter": task.filter}
    names = [name for name in table_schema("samples").names if name not in shared]
    return [shared | {name: getattr(sample, name) for name in names} for sample in task.samples]


def _pairs(numbers: Mapping[str, float] | None) -> list[tuple[str, float | None]] | None:
    return None if numbers is None else [(name, number_or_none(value)) for name, value in numbers.items()]


def _without_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _partition(reports: str | Path, table: str, study_id: str | None, when: datetime) -> Path:
    folder = Path(reports) / table / f"study={study_id or 'none'}" / f"date={when:%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(folder: Path, table: str, part: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / f"part-{part}.parquet"
    _write_file(path, table, rows)
    return path


def _write_file(path: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.Table.from_pylist([dict(row) for row in rows], schema=table_schema(table))
    # A leading dot hides it from every reader of the folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(content, temporary, compression="zstd")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
