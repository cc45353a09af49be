"""The report page: one HTML file with everything in it, to be read without a network and without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from remelt import __version__
from remelt.errors import EvaluationError
from remelt_evals.eval_report import objective
from remelt_evals.paired import Difference
from remelt_evals.report_charts import Bar, Mark, bar_panels, front_chart, heat_map, progress_chart
from remelt_evals.report_coefficients import coefficient_grid
from remelt_evals.report_comparing import compare_in_reports
from remelt_evals.report_front import Front, front_of_trials
from remelt_evals.report_reading import (
    NO_STUDY,
    Evaluation,
    entry_names,
    macro_standard_error,
    read_evaluations,
    read_trials,
    search_evaluation,
)
from remelt_evals.report_tables import TrialRow

_MOST_PARENTS = 12
_MOST_PANELS = 6
_MOST_COLUMNS = 120
_MOST_ROWS = 24
_MOST_TABLE_ROWS = 20


class _Row(NamedTuple):
    """A checkpoint among those that are compared."""

    label: str
    kind: str
    """parent, uniform or best."""
    evaluation: Evaluation


class _Cell(NamedTuple):
    text: str
    error: str = ""


def report_page(reports: str | Path, study_id: str | None) -> str:
    """The page of a study, or of the evaluations outside of studies.

    Args:
        reports: folder of the tables.
        study_id: whole; None for evaluations outside of studies.

    Returns:
        HTML with style and charts inside, and no reference to anything outside of it.

    Raises:
        EvaluationError: there is nothing to show.
    """
    import jinja2

    evaluations = read_evaluations(reports, study_id=study_id or NO_STUDY)
    trials = [] if study_id is None else read_trials(reports, study_id, evaluations)
    if not any(evaluation.report.is_ok for evaluation in evaluations):
        raise EvaluationError(f"{reports} holds no evaluation that succeeded, so there is nothing to draw")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    fields = _fields(Path(reports), study_id, trials, evaluations)
    return environment.get_template("report.html.j2").render(fields)


def _fields(
    reports: Path, study_id: str | None, trials: Sequence[TrialRow], evaluations: Sequence[Evaluation]
) -> dict[str, Any]:
    by_id = {evaluation.report.evaluation_id: evaluation for evaluation in evaluations}
    best = _best_trial(trials)
    rows = _rows(trials, best, by_id) if trials else _loose_rows(evaluations)
    role = rows[-1].evaluation.report.role
    winner = rows[-1].evaluation
    figures = [*_study_figures(trials, best, evaluations), *_winner_figures(winner, best), _bars_figure(rows, role)]
    notes = list(dict.fromkeys(note for row in rows for note in row.evaluation.report.notes))
    if role != "report":
        notes.append(f"these are {role} items; nothing was scored on report items yet")
    return {
        "version": __version__,
        "title": f"Study {study_id[:12]}" if study_id else "Evaluations",
        "lead": _lead(trials, best, rows, role),
        "tiles": _tiles(reports, study_id, trials, rows, evaluations, role),
        "figures": figures,
        "provenance": _provenance(study_id, winner),
        "codes": {"study", "candidate", "digest", "suite digest", "evaluation", "run"},
        "parents": winner.context.parents,
        "recipe": _recipe_text(winner.context.recipe_json),
        "notes": notes,
        "source": reports.name if reports.name != "reports" else f"{reports.absolute().parent.name}/reports",
    }


def _origin(trial: TrialRow) -> str:
    if trial.state in ("FAILED", "STOPPED"):
        return trial.state.lower()
    if trial.origin is not None:
        return trial.origin
    label = trial.label or ""
    return label if label in ("uniform", "init") else "searcher" if label.startswith("trial ") else "parent"


def _is_start(trial: TrialRow, kind: str) -> bool:
    return (trial.origin or _origin(trial)) == kind


def _best_trial(trials: Sequence[TrialRow]) -> TrialRow | None:
    """The winner; while there is none, the best on search items."""
    for trial in trials:
        if trial.is_winner:
            return trial
    scored = [trial for trial in trials if trial.score is not None and trial.state == "COMPLETE"]
    return max(scored, key=lambda trial: (trial.score or 0.0, -trial.trial_number), default=None)


def _rows(trials: Sequence[TrialRow], best: TrialRow | None, by_id: Mapping[str, Evaluation]) -> list[_Row]:
    """Parents, uniform and best: on report items if the best has some, else on search items."""
    if best is None:
        raise EvaluationError("no trial of the study has a score yet, so there is nothing to draw")
    role = "report" if search_evaluation(best, by_id, "report") else "search"
    found = {
        trial.trial_number: one
        for trial in trials
        if (one := search_evaluation(trial, by_id, role)) is not None and one.report.is_ok
    }
    parents = [
        _Row(trial.label or "parent", "parent", found[trial.trial_number])
        for trial in trials
        if _is_start(trial, "parent") and trial.trial_number in found
    ]
    if len(parents) > _MOST_PARENTS:
        kept = sorted(parents, key=lambda row: -objective(row.evaluation.report))[:_MOST_PARENTS]
        parents = [row for row in parents if row in kept]
    uniform = [
        _Row("uniform merge", "uniform", found[trial.trial_number])
        for trial in trials
        if _is_start(trial, "uniform") and trial.trial_number in found
    ]
    name = "best merge" if best.is_winner else "best so far"
    return [*parents, *uniform, _Row(f"{name} ({best.label})", "best", found[best.trial_number])]


def _loose_rows(evaluations: Sequence[Evaluation]) -> list[_Row]:
    """Evaluations outside of studies on the suite and role of the latest, the best last."""
    last = [evaluation for evaluation in evaluations if evaluation.report.is_ok][-1].report
    same = {
        (one.report.digest): one
        for one in evaluations
        if one.report.is_ok
        and (one.report.suite_digest, one.report.role, one.report.fidelity)
        == (last.suite_digest, last.role, last.fidelity)
    }
    ranked = sorted(same.values(), key=lambda one: objective(one.report))[-_MOST_PARENTS:]
    return [
        *(_Row(one.name, "parent", one) for one in ranked[:-1]),
        _Row(ranked[-1].name, "best", ranked[-1]),
    ]


def _lead(trials: Sequence[TrialRow], best: TrialRow | None, rows: Sequence[_Row], role: str) -> str:
    report = rows[-1].evaluation.report
    tasks = ", ".join(entry_names(report.tasks))
    if best is None:
        return f"{len(rows)} checkpoints on the {role} items of suite {report.suite} ({tasks})."
    began = min((trial.started_at for trial in trials if trial.started_at), default=None)
    when = f", begun {began:%Y-%m-%d %H:%M} UTC" if began else ""
    what = "The published winner is" if best.is_winner else "Nothing is published yet; the best so far is"
    return f"{what} {best.label}, out of {len(trials)} trials on suite {report.suite} ({tasks}){when}."


def _tiles(
    reports: Path,
    study_id: str | None,
    trials: Sequence[TrialRow],
    rows: Sequence[_Row],
    evaluations: Sequence[Evaluation],
    role: str,
) -> list[dict[str, str]]:
    best = rows[-1]
    error = macro_standard_error(best.evaluation.report)
    tiles = [
        {
            "name": f"{best.label}, {role} items",
            "number": f"{objective(best.evaluation.report):.3f}",
            "more": "macro average" + (f" ± {error:.3f}" if error is not None else ""),
            "kind": "",
        }
    ]
    parents = [row for row in rows if row.kind == "parent"]
    others = [(f"against the best parent, {row.label}", row) for row in _top(parents)] if study_id else []
    others += [("against the uniform merge", row) for row in rows if row.kind == "uniform"]
    for name, row in others:
        found = _difference(reports, evaluations, row, best, role, study_id)
        if found is not None:
            kind = "good" if found.low > 0 else "bad" if found.high < 0 else ""
            verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "no clear difference"
            more = f"{verdict}, 95 % [{found.low:+.3f}, {found.high:+.3f}]"
            tiles.append({"name": name, "number": f"{found.difference:+.3f}", "more": more, "kind": kind})
    if trials:
        states = {state: sum(trial.state == state for trial in trials) for state in ("COMPLETE", "STOPPED", "FAILED")}
        running = len(trials) - sum(states.values())
        parts = [f"{count} {state.lower()}" for state, count in states.items() if count]
        parts += [f"{running} running"] if running else []
        tiles.append({"name": "trials", "number": str(len(trials)), "more": ", ".join(parts), "kind": ""})
    return tiles


def _top(rows: Sequence[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: -objective(row.evaluation.report))[:1]


def _difference(
    reports: Path, evaluations: Sequence[Evaluation], a: _Row, b: _Row, role: str, study_id: str | None
) -> Difference | None:
    """B minus A on the same items; None where the samples are not here."""
    names = (a.evaluation.report.evaluation_id, b.evaluation.report.evaluation_id)
    if names[0] == names[1]:
        return None
    try:
        return compare_in_reports(reports, evaluations, *names, role=role, study_id=study_id).macro
    except EvaluationError:
        return None


def _study_figures(
    trials: Sequence[TrialRow], best: TrialRow | None, evaluations: Sequence[Evaluation]
) -> list[dict[str, Any]]:
    if not trials or best is None:
        return []
    figures = [_progress_figure(trials, best)]
    tasks = next(one.report.tasks for one in evaluations if one.report.tasks)
    if len(tasks) > 1:
        figures.append(_front_figure(front_of_trials(trials, evaluations), best))
    figures += _search_figure(trials, best)
    return figures


def _mark(trial: TrialRow, best: TrialRow, x: float, y: float, tip: str, **more: Any) -> Mark:
    is_best = trial.trial_number == best.trial_number
    return Mark(x=x, y=y, kind=_origin(trial), tip=tip, is_winner=is_best, **more)


def _progress_figure(trials: Sequence[TrialRow], best: TrialRow) -> dict[str, Any]:
    marks = []
    for trial in trials:
        if trial.state != "RUNNING" and (trial.score is not None or trial.state == "FAILED"):
            text = trial.error or "failed" if trial.score is None else _with_error(trial.score, trial.standard_error)
            score = trial.score or 0.0
            tip = f"{trial.label}: {text}"
            label = trial.label or "" if trial.trial_number == best.trial_number else ""
            marks.append(_mark(trial, best, trial.trial_number, score, tip, label=label, error=trial.standard_error))
    starts = [trial for trial in trials if trial.score is not None and trial.state == "COMPLETE"]
    references = [("uniform", t.score or 0.0) for t in starts if _is_start(t, "uniform")]
    parents = sorted((t for t in starts if _is_start(t, "parent")), key=lambda t: -(t.score or 0.0))
    references += [("best parent", t.score or 0.0) for t in parents[:1]]
    kinds = {mark.kind for mark in marks}
    return {
        "title": "Score of every trial",
        "caption": "On search items, with standard errors. The line is the best so far; the ring is "
        + ("the published winner, chosen on selection items." if best.is_winner else "the best so far."),
        "legend": _keys(kinds),
        "svg": _safe(progress_chart(marks, references, "score on search items")),
        "table": _trial_table(trials, best),
    }


def _front_figure(front: Front, best: TrialRow) -> dict[str, Any]:
    pairs = list(combinations(range(len(front.objectives)), 2))[:_MOST_PANELS]
    panels = []
    for one, two in pairs:
        marks = []
        for point in front.points:
            trial = point.trial
            values = (point.values[one], point.values[two])
            tip = f"{trial.label}: {front.objectives[one]} {values[0]:.3f}, {front.objectives[two]} {values[1]:.3f}"
            is_named = _is_start(trial, "parent") or _is_start(trial, "uniform")
            is_best = trial.trial_number == best.trial_number
            label = (trial.label or "") if is_named or is_best else ""
            marks.append(_mark(trial, best, *values, tip, label=label, is_on_front=point.is_on_front))
        higher = front.higher_is_better
        panels.append((front.objectives[one], front.objectives[two], higher[one], higher[two], marks))
    num_left = len(list(combinations(range(len(front.objectives)), 2))) - len(pairs)
    caption = (
        f"{len(front.best)} of {len(front.points)} trials are on the front over all {len(front.objectives)} abilities "
        f"(outlined): no other trial is at least as good everywhere and better somewhere. {front.role.capitalize()} "
        "items; arrows point to better."
    )
    if num_left:
        caption += f" {num_left} more pairs are not drawn."
    rows = [
        {
            "cells": [_Cell(point.trial.label or "")]
            + [_cell(value, error) for value, error in zip(point.values, point.standard_errors, strict=True)],
            "is_best": point.trial.trial_number == best.trial_number,
        }
        for point in front.best[:_MOST_TABLE_ROWS]
    ]
    table = {"summary": "The front as a table", "header": ["trial", *front.objectives], "rows": rows}
    return {
        "title": "Trade-offs between abilities",
        "caption": caption,
        "legend": [*_keys({_origin(point.trial) for point in front.points}), _KEYS["front"]],
        "svg": _safe(front_chart(panels)),
        "table": table,
    }


def _search_figure(trials: Sequence[TrialRow], best: TrialRow) -> list[dict[str, Any]]:
    """The variables of every trial: what the search tried, and where it settled."""
    shown = [trial for trial in trials if trial.coefficients]
    names = list(dict.fromkeys(name for trial in shown for name in trial.coefficients or {}))
    if not names:
        return []
    caption = "Each column is a trial, in the order in which they were asked for; the dot marks the best."
    if len(shown) > _MOST_COLUMNS:
        kept = sorted(shown, key=lambda trial: -(trial.score if trial.score is not None else -1e300))[:_MOST_COLUMNS]
        shown = sorted(kept, key=lambda trial: trial.trial_number)
        caption += f" The best {_MOST_COLUMNS} trials are drawn."
    if len(names) > _MOST_ROWS:
        caption += f" The first {_MOST_ROWS} of {len(names)} variables are drawn."
        names = names[:_MOST_ROWS]
    values = [[(trial.coefficients or {}).get(name) for trial in shown] for name in names]
    svg = heat_map(
        names,
        [str(trial.trial_number) for trial in shown],
        values,
        marked=[trial.trial_number == best.trial_number for trial in shown],
        with_numbers=False,
        title="values of the search's variables in every trial",
        axis="trial",
    )
    return [{"title": "What the search tried", "caption": caption, "legend": [], "svg": _safe(svg), "table": None}]


def _winner_figures(winner: Evaluation, best: TrialRow | None) -> list[dict[str, Any]]:
    """Coefficients over checkpoints and groups of layers."""
    grid = coefficient_grid(winner.context.recipe_json) if winner.context.recipe_json else None
    if grid is None or not grid.rows:
        return []
    methods = list(dict.fromkeys(group.method for group in grid.groups))
    label = "the merge" if best is None else best.label
    caption = f"Coefficients of {label} over checkpoints and groups of layers ({', '.join(methods)})."
    if grid.note:
        caption += f" {grid.note[0].upper()}{grid.note[1:]}."
    columns = [
        group.name if len(methods) == 1 or group.method == methods[0] else f"{group.name} · {group.method}"
        for group in grid.groups
    ]
    values = [[group.values[row] for group in grid.groups] for row in range(len(grid.rows))]
    svg = heat_map(grid.rows, columns, values, title="coefficients of the best merge")
    return [{"title": "Who gets how much", "caption": caption, "legend": [], "svg": _safe(svg), "table": None}]


def _bars_figure(rows: Sequence[_Row], role: str) -> dict[str, Any]:
    tasks = rows[-1].evaluation.report.tasks
    names = entry_names(tasks)
    panels = []
    for place, (name, task) in enumerate(zip(names, tasks, strict=True)):
        bars = []
        for row in rows:
            own = row.evaluation.report.tasks
            found = own[place] if place < len(own) else None
            bars.append(Bar(row.label, row.kind, found.value if found else None, found.stderr if found else None))
        panels.append((f"{name} ({task.metric}{'' if task.higher_is_better else ', lower is better'})", bars))
    table_rows = [
        {
            "cells": [
                _Cell(row.label),
                *(_cell(task.value, task.stderr) for task in row.evaluation.report.tasks),
                _cell(objective(row.evaluation.report), macro_standard_error(row.evaluation.report)),
            ],
            "is_best": row.kind == "best",
        }
        for row in rows
    ]
    counts = sorted({task.n for task in tasks})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return {
        "title": "By eval task",
        "caption": f"On {role} items, {items} for each eval task; whiskers are one standard error to each side.",
        "legend": [],
        "svg": _safe(bar_panels(panels, f"scores by eval task on {role} items")),
        "table": {"summary": "As a table", "header": ["checkpoint", *names, "macro average"], "rows": table_rows},
    }


def _trial_table(trials: Sequence[TrialRow], best: TrialRow) -> dict[str, Any]:
    scored = sorted(
        (trial for trial in trials if trial.score is not None), key=lambda t: (-(t.score or 0.0), t.trial_number)
    )[:_MOST_TABLE_ROWS]
    names = list(dict.fromkeys(name for trial in scored for name in trial.scores or {}))
    rows = [
        {
            "cells": [
                _Cell(trial.label or ""),
                _cell(trial.score, trial.standard_error),
                *(_cell((trial.scores or {}).get(name), (trial.standard_errors or {}).get(name)) for name in names),
                _Cell("–" if trial.seconds is None else f"{trial.seconds:.1f} s"),
            ],
            "is_best": trial.trial_number == best.trial_number,
        }
        for trial in scored
    ]
    summary = f"The best {len(scored)} trials as a table" if len(scored) < len(trials) else "All trials as a table"
    return {"summary": summary, "header": ["trial", "score", *names, "time"], "rows": rows}


_KEYS = {
    "searcher": ("trial", '<circle class="point searcher" r="4"/>'),
    "uniform": ("uniform merge", '<rect class="point uniform" x="-4" y="-4" width="8" height="8"/>'),
    "parent": ("single parent", '<path class="point parent" d="M0 -5l5 8.6h-10z"/>'),
    "init": ("the recipe's own start", '<circle class="point init" r="4"/>'),
    "stopped": ("stopped on a lower fidelity", '<circle class="point stopped" r="4"/>'),
    "failed": ("failed", '<path class="point failed" d="M-3.5 -3.5l7 7m0 -7l-7 7"/>'),
    "front": ("on the front", '<circle class="point front" r="4"/>'),
}


def _keys(kinds: set[str]) -> list[tuple[str, Any]]:
    return [(name, _safe(mark)) for kind, (name, mark) in _KEYS.items() if kind in kinds]


def _provenance(study_id: str | None, winner: Evaluation) -> list[tuple[str, str]]:
    report, context = winner.report, winner.context
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    found = [
        ("study", study_id),
        ("checkpoint", report.checkpoint),
        ("candidate", context.candidate_id),
        ("digest", report.digest),
        ("run", context.run_id),
        ("suite", f"{report.suite}, {report.role} items, fidelity {report.fidelity}"),
        ("suite digest", report.suite_digest),
        ("evaluation", report.evaluation_id),
        ("evaluated", f"{report.started_at[:19].replace('T', ' ')} UTC in {report.seconds:.1f} s"),
        ("backend", f"{report.backend} on {report.device} in {report.dtype}"),
        ("host", context.host),
        ("versions", versions),
        ("git commit", context.git_commit),
        ("Ray job", context.ray_job_id),
    ]
    return [(name, text) for name, text in found if text]


def _recipe_text(recipe_json: str | None) -> str:
    import json

    from remelt.strict_config import dump_yaml

    return "" if recipe_json is None else dump_yaml(json.loads(recipe_json))


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _cell(value: float | None, error: float | None) -> _Cell:
    return _Cell("–") if value is None else _Cell(f"{value:.3f}", "" if error is None else f"{error:.3f}")


def _safe(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)
