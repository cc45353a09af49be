"""Rows of the reports for people: a few columns of each table, names and errors in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from remelt.errors import EvaluationError
from remelt.strict_config import suggestion
from remelt_evals.eval_report import entry_names, macro_standard_error
from remelt_evals.report_reading import (
    NO_STUDY,
    Evaluation,
    read_evaluations,
    read_trials,
)
from remelt_evals.report_schemas import table_schema
from remelt_evals.report_tables import TrialRow, read_table


class ListedRow(NamedTuple):
    """A row as it is printed, and all of its columns."""

    cells: list[Any]
    fields: dict[str, Any]


class Listing(NamedTuple):
    """A table, the best first."""

    table: str
    header: list[str]
    rows: list[ListedRow]


def list_rows(reports: str | Path, table: str, study_id: str | None) -> Listing:
    """A table of a study, or of what was evaluated outside of studies.

    Raises:
        EvaluationError: there is no such table, or no row in it.
    """
    if table == "trials":
        if study_id is None:
            raise EvaluationError(f"{reports} holds no study, so there are no trials; see --table runs")
        return _trials(read_trials(reports, study_id), study_id)
    if table == "runs":
        return _runs(read_evaluations(reports, study_id=study_id or NO_STUDY))
    filters = {"study": [study_id or NO_STUDY]}
    rows = read_table(reports, table, filters=filters).to_pylist()
    return (_metrics if table == "metrics" else _samples)(rows, _names(reports, study_id))


def sorted_rows(listing: Listing, by: str | None) -> list[ListedRow]:
    """Rows sorted by a column of the table, or by an ability; rows without a value come last.

    Args:
        by: largest first; smallest first with a minus before it; None leaves the best first.

    Raises:
        EvaluationError: there is no such column.
    """
    if by is None:
        return listing.rows
    name = by.removeprefix("-")
    known = {key for row in listing.rows for key in (*row.fields, *(row.fields.get("scores") or {}))}
    if listing.rows and name not in known:
        raise EvaluationError(f"table {listing.table} has no column {name!r}; {suggestion(name, known)}")
    values: list[tuple[Any, ListedRow]] = [
        (row.fields.get(name, (row.fields.get("scores") or {}).get(name)), row) for row in listing.rows
    ]
    if any(isinstance(value, list | dict) for value, _ in values):
        raise EvaluationError(f"column {name!r} of table {listing.table} has no order; sort by another")
    present = sorted(
        (pair for pair in values if pair[0] is not None), key=lambda pair: pair[0], reverse=not by.startswith("-")
    )
    return [row for _, row in present] + [row for value, row in values if value is None]


def with_error(value: float | None, error: float | None) -> str | None:
    """`0.7213 ± 0.0101`, without an error where there is none; None for no value."""
    if value is None:
        return None
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _trials(trials: Sequence[TrialRow], study_id: str) -> Listing:
    names = list(dict.fromkeys(name for trial in trials for name in trial.scores or {}))
    ranked = sorted(
        trials,
        key=lambda trial: (trial.state != "COMPLETE", -(trial.score if trial.score is not None else -1e300),
                           trial.trial_number),
    )  # fmt: skip
    rows = []
    for trial in ranked:
        scores, errors = trial.scores or {}, trial.standard_errors or {}
        cells = [
            trial.trial_number,
            f"{trial.label} *" if trial.is_winner else trial.label,
            trial.state.lower() if trial.fidelity in (None, "full") else f"{trial.state.lower()} ({trial.fidelity})",
            with_error(trial.score, trial.standard_error),
            *(with_error(scores.get(name), errors.get(name)) for name in names),
            _place(trial.host, trial.device),
            _rounded(trial.seconds),
            _first_line(trial.error),
        ]
        rows.append(ListedRow(cells, {"study_id": study_id, **asdict(trial)}))
    header = ["trial", "label", "state", "score", *names, "where", "seconds", "error"]
    return _without_empty(Listing("trials", header, rows), ("error",))


def _runs(evaluations: Sequence[Evaluation]) -> Listing:
    _refuse_empty(evaluations, "runs")
    names = list(dict.fromkeys(name for one in evaluations for name in entry_names(one.report.tasks)))
    rows = []
    for one in sorted(evaluations, key=lambda one: (one.report.role, -_macro(one), one.report.started_at)):
        report = one.report
        tasks = dict(zip(entry_names(report.tasks), report.tasks, strict=True))
        score = _macro(one) if report.is_ok else None
        cells = [
            one.name,
            report.evaluation_id[:12],
            report.role,
            report.fidelity,
            with_error(score, macro_standard_error(report) if report.tasks else None),
            *(with_error(task.value, task.stderr) if (task := tasks.get(name)) else None for name in names),
            _place(one.context.host, report.device),
            _rounded(report.seconds),
            _first_line(report.error),
        ]
        fields = {name: getattr(report, name, None) for name in table_schema("runs").names if hasattr(report, name)}
        fields |= {name: value for name, value in asdict(one.context).items() if value not in (None, ())}
        fields |= {"objective": score, "scores": {name: task.value for name, task in tasks.items()}}
        rows.append(ListedRow(cells, fields))
    header = ["checkpoint", "evaluation", "role", "fidelity", "objective", *names, "where", "seconds", "error"]
    return _without_empty(Listing("runs", header, rows), ("error",))


def _metrics(found: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Listing:
    _refuse_empty(found, "metrics")
    rows = [
        ListedRow(
            [
                names.get(row["evaluation_id"]),
                row["role"],
                row["fidelity"],
                row["ability"],
                row["task"],
                row["metric"],
                with_error(row["score"], row["standard_error"]),
                row["num_samples"],
            ],
            dict(row),
        )
        for row in sorted(found, key=_best_first)
    ]
    return Listing(
        "metrics", ["checkpoint", "role", "fidelity", "ability", "eval task", "metric", "score", "items"], rows
    )


def _samples(found: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Listing:
    _refuse_empty(found, "samples")
    rows = [
        ListedRow(
            [
                names.get(row["evaluation_id"]),
                row["role"],
                row["task"],
                row["doc_id"],
                row["metric"],
                row["score"],
                _first_line(row["target"]),
                _first_line(row["response"]),
            ],
            dict(row),
        )
        for row in sorted(found, key=lambda row: (row["role"], row["task"], row["doc_id"], row["evaluation_id"]))
    ]
    header = ["checkpoint", "role", "eval task", "item", "metric", "score", "target", "response"]
    return Listing("samples", header, rows)


def _best_first(row: Mapping[str, Any]) -> tuple[Any, ...]:
    sign = -1 if row["higher_is_better"] else 1
    return row["role"], row["ability"], row["metric"], sign * row["score"]


def _names(reports: str | Path, study_id: str | None) -> dict[str, str]:
    return {one.report.evaluation_id: one.name for one in read_evaluations(reports, study_id=study_id or NO_STUDY)}


def _refuse_empty(rows: Sequence[Any], table: str) -> None:
    if not rows:
        raise EvaluationError(f"table {table} has no rows outside of studies: give --study")


def _macro(evaluation: Evaluation) -> float:
    tasks = evaluation.report.tasks
    if not tasks:
        return float("-inf")
    return sum(task.weight * task.oriented_value for task in tasks) / sum(task.weight for task in tasks)


def _place(host: str | None, device: str | None) -> str | None:
    return " ".join(part for part in (host, device) if part) or None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _first_line(text: str | None, most: int = 48) -> str | None:
    if not text:
        return None
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _without_empty(listing: Listing, names: Sequence[str]) -> Listing:
    """Leave out columns in which nothing stands."""
    drop = {
        place
        for place, name in enumerate(listing.header)
        if name in names and all(row.cells[place] is None for row in listing.rows)
    }
    header = [name for place, name in enumerate(listing.header) if place not in drop]
    rows = [
        ListedRow([cell for place, cell in enumerate(row.cells) if place not in drop], row.fields)
        for row in listing.rows
    ]
    return Listing(listing.table, header, rows)
