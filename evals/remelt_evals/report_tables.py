"""Reports as Parquet: `<reports>/<table>/study=<id or none>/date=<UTC>/part-<id>.parquet`.

Tables `runs`, `metrics`, `samples` get one file each for an evaluation, `trials` one for a study. A file is written
whole to a temporary name and renamed, so a reader sees all of it or nothing; `runs` comes last, so an evaluation that
has a row there has its other rows too. Any reader of hive-partitioned Parquet reads them; `read_table` is ours.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, TaskReport, canonical_json, number_or_none, objective
from remelt_evals.report_schemas import SCHEMA_VERSION, SCHEMA_VERSION_KEY, TABLE_KEY, TABLES, table_schema

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
    label: str | None = None
    """The trial's."""
    host: str | None = None
    """The machine that it ran on."""
    merge_seconds: float | None = None


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
    """When it was asked for; with a time zone."""
    finished_at: datetime | None = None
    seconds: float | None = None
    digest: str | None = None
    origin: str | None = None
    fidelity: str | None = None
    standard_error: float | None = None
    """Of the score."""
    standard_errors: Mapping[str, float | None] | None = None
    """Of the scores, by ability."""
    is_winner: bool | None = None
    asked_after: int | None = None
    """How many trials had finished when it was asked for."""
    finish_place: int | None = None
    """Place in the order of finishing, from 0: an ask had seen the trials whose place is below its `asked_after`."""
    host: str | None = None
    device: str | None = None
    merge_seconds: float | None = None
    evaluation_seconds: float | None = None


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
            "digest": trial.digest,
            "origin": trial.origin,
            "fidelity": trial.fidelity,
            "standard_error": number_or_none(trial.standard_error),
            "standard_errors": _pairs(trial.standard_errors),
            "is_winner": trial.is_winner,
            "asked_after": trial.asked_after,
            "finish_place": trial.finish_place,
            "host": trial.host,
            "device": trial.device,
            "merge_seconds": number_or_none(trial.merge_seconds),
            "evaluation_seconds": number_or_none(trial.evaluation_seconds),
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


def read_table(
    reports: str | Path,
    table: str,
    *,
    columns: Sequence[str] | None = None,
    filters: Mapping[str, Collection[str]] | None = None,
) -> Any:
    """All rows of a table as a `pyarrow.Table`, with the partition columns `study` and `date` as text.

    Args:
        columns: those to read; all by default.
        filters: `column: values`; rows whose column has one of these values. On `study` and `date`, and on
            `evaluation_id` (which is in the name of the files), other files are not opened.

    Raises:
        EvaluationError: there is no such table, nothing was written to it yet, or a file of it is damaged or of
            another schema version.
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
    source: Any = folder
    wanted = None
    for name, values in (filters or {}).items():
        one = ds.field(name).isin(list(values))
        wanted = one if wanted is None else wanted & one
        if name == "evaluation_id":
            source = [str(path) for value in values for path in sorted(folder.glob(f"*/*/part-{value}.parquet"))]
    partitioning = ds.partitioning(partitions, flavor="hive")
    try:
        found = ds.dataset(source, schema, format="parquet", partitioning=partitioning, partition_base_dir=str(folder))
        for fragment in found.get_fragments(wanted):
            _check_version(fragment.path, fragment.metadata.metadata, table)
        return found.to_table(columns=None if columns is None else list(columns), filter=wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise EvaluationError(f"{folder} cannot be read as table {table}: {' '.join(str(error).split())}") from error


def _check_version(path: str, metadata: Mapping[bytes, bytes] | None, table: str) -> None:
    """Refuse a file whose columns mean something else."""
    found = metadata or {}
    if found.get(TABLE_KEY, b"").decode() != table:
        raise EvaluationError(f"{path} is no file of table {table}: it was not written by remelt; move it elsewhere")
    version = int(found.get(SCHEMA_VERSION_KEY, b"0"))
    if version != SCHEMA_VERSION:
        what = "a newer remelt; install that" if version > SCHEMA_VERSION else "an older remelt; evaluate again"
        raise EvaluationError(
            f"{path} has version {version} of the tables' columns, this remelt reads {SCHEMA_VERSION}: it is "
            f"from {what}, or read it with any reader of Parquet"
        )


def _run_row(report: EvalReport, context: RunContext, started: datetime) -> dict[str, Any]:
    versions = report.versions
    return {
        "fidelity": report.fidelity,
        "label": context.label,
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
        "host": context.host,
        "lm_eval_version": versions.get("lm-eval"),
        "transformers_version": versions.get("transformers"),
        "torch_version": versions.get("torch"),
        "versions_json": canonical_json(dict(versions)),
        "notes": list(report.notes),
        "git_commit": context.git_commit,
        "ray_job_id": context.ray_job_id,
        "started_at": started,
        "finished_at": started + timedelta(seconds=report.seconds),
        "merge_seconds": number_or_none(context.merge_seconds),
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
        "score": task.value,
        "standard_error": task.stderr,
        "ci_lower": None if half is None else task.value - half,
        "ci_upper": None if half is None else task.value + half,
        "num_samples": task.n,
        "num_total": task.n_total,
        "is_subset": task.n < task.n_total,
        "num_fewshot": task.num_fewshot,
        "higher_is_better": task.higher_is_better,
        "weight": task.weight,
        "aggregation": task.aggregation,
        "sample_ids_hash": hashlib.sha256(hashes.encode()).hexdigest(),
    }


def _sample_rows(ids: Mapping[str, Any], task: TaskReport) -> list[dict[str, Any]]:
    shared = {**ids, "ability": task.ability, "task": task.task, "metric": task.metric, "filter": task.filter}
    names = [name for name in table_schema("samples").names if name not in {*shared, "is_correct"}]
    return [
        shared | {name: getattr(sample, name) for name in names} | {"is_correct": sample.correct}
        for sample in task.samples
    ]


def _pairs(numbers: Mapping[str, float | None] | None) -> list[tuple[str, float | None]] | None:
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
    # A leading dot hides it from every reader of the folder; two writers of one file, on two hosts or in two threads,
    # have a temporary file each.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        pq.write_table(content, temporary, compression="zstd")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
