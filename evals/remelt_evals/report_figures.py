"""Figures of the report page: from trials and evaluations to a chart, its caption, its legend and its table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

from remelt_evals.eval_report import entry_names, macro_standard_error, objective
from remelt_evals.report_charts import Bar, Mark, bar_panels, front_chart, heat_map, progress_chart
from remelt_evals.report_coefficients import coefficient_grid
from remelt_evals.report_front import Front
from remelt_evals.report_reading import (
    Evaluation,
)
from remelt_evals.report_tables import TrialRow

_MOST_PANELS = 6
_MOST_LABELS = 6
_MOST_COLUMNS = 120
_MOST_ROWS = 24
_MOST_TABLE_ROWS = 20


class ComparedRow(NamedTuple):
    """A checkpoint among those that are compared."""

    label: str
    kind: str
    """parent, uniform or best."""
    evaluation: Evaluation


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    error: str = ""


class TableRow(NamedTuple):
    """A row of a table."""

    cells: list[Cell]
    is_best: bool


class PageTable(NamedTuple):
    """What stands behind a figure, in numbers."""

    summary: str
    header: list[str]
    rows: list[TableRow]


class Figure(NamedTuple):
    """A section of the page."""

    title: str
    caption: str
    svg: Any
    """Markup, which the template does not escape."""
    legend: Sequence[tuple[str, Any]] = ()
    table: PageTable | None = None


def _origin(trial: TrialRow) -> str:
    if trial.state in ("FAILED", "STOPPED"):
        return trial.state.lower()
    if trial.origin is not None:
        return trial.origin
    label = trial.label or ""
    return label if label in ("uniform", "init") else "searcher" if label.startswith("trial ") else "parent"


def is_start(trial: TrialRow, kind: str) -> bool:
    """Whether a trial is the `uniform` merge or a single `parent`."""
    return (trial.origin or _origin(trial)) == kind


def _mark(trial: TrialRow, best: TrialRow, x: float, y: float, tip: str, **more: Any) -> Mark:
    is_best = trial.trial_number == best.trial_number
    return Mark(x=x, y=y, kind=_origin(trial), tip=tip, is_winner=is_best, **more)


def progress_figure(trials: Sequence[TrialRow], best: TrialRow) -> Figure:
    """Score against trial, with the best so far."""
    marks = []
    for trial in trials:
        if trial.state != "RUNNING" and (trial.score is not None or trial.state == "FAILED"):
            text = trial.error or "failed" if trial.score is None else _with_error(trial.score, trial.standard_error)
            score = trial.score or 0.0
            tip = f"{trial.label}: {text}"
            label = trial.label or "" if trial.trial_number == best.trial_number else ""
            marks.append(_mark(trial, best, trial.trial_number, score, tip, label=label, error=trial.standard_error))
    starts = [trial for trial in trials if trial.score is not None and trial.state == "COMPLETE"]
    references = [("uniform", t.score or 0.0) for t in starts if is_start(t, "uniform")]
    parents = sorted((t for t in starts if is_start(t, "parent")), key=lambda t: -(t.score or 0.0))
    references += [("best parent", t.score or 0.0) for t in parents[:1]]
    kinds = {mark.kind for mark in marks}
    return Figure(
        title="Score of every trial",
        caption="On search items, with standard errors. The line is the best so far; the ring is "
        + ("the published winner, chosen on selection items." if best.is_winner else "the best so far."),
        legend=_keys(kinds),
        svg=_safe(progress_chart(marks, references, "score on search items")),
        table=_trial_table(trials, best),
    )


def front_figure(front: Front, best: TrialRow) -> Figure:
    """Trials over pairs of abilities, and the front over all of them."""
    pairs = list(combinations(range(len(front.objectives)), 2))[:_MOST_PANELS]
    panels = []
    num_parents = sum(is_start(point.trial, "parent") for point in front.points)
    for one, two in pairs:
        marks = []
        for point in front.points:
            trial = point.trial
            values = (point.values[one], point.values[two])
            tip = f"{trial.label}: {front.objectives[one]} {values[0]:.3f}, {front.objectives[two]} {values[1]:.3f}"
            is_named = is_start(trial, "uniform") or (
                is_start(trial, "parent") and (num_parents <= _MOST_LABELS or point.is_on_front)
            )
            is_best = trial.trial_number == best.trial_number
            label = (trial.label or "") if is_named or is_best else ""
            marks.append(_mark(trial, best, *values, tip, label=label, is_on_front=point.is_on_front))
        higher = front.higher_is_better
        panels.append((front.objectives[one], front.objectives[two], higher[one], higher[two], marks))
    num_left = len(list(combinations(range(len(front.objectives)), 2))) - len(pairs)
    caption = (
        f"{len(front.best)} of {len(front.points)} trials on the front over {len(front.objectives)} abilities "
        f"(filled): no other trial is at least as good everywhere and better somewhere. {front.role.capitalize()} "
        "items; arrows point to better."
    )
    if num_left:
        caption += f" {num_left} more pairs are not drawn."
    rows = [
        TableRow(
            [Cell(point.trial.label or "")]
            + [_cell(value, error) for value, error in zip(point.values, point.standard_errors, strict=True)],
            point.trial.trial_number == best.trial_number,
        )
        for point in front.best[:_MOST_TABLE_ROWS]
    ]
    table = PageTable("The front as a table", ["trial", *front.objectives], rows)
    return Figure(
        title="Trade-offs between abilities",
        caption=caption,
        legend=_keys({_origin(point.trial) for point in front.points} | {"front"}),
        svg=_safe(front_chart(panels)),
        table=table,
    )


def search_figures(trials: Sequence[TrialRow], best: TrialRow) -> list[Figure]:
    """The variables of every trial: what the search tried, and where it settled."""
    shown = [trial for trial in trials if trial.coefficients]
    names = list(dict.fromkeys(name for trial in shown for name in trial.coefficients or {}))
    if not names:
        return []
    caption = "Each column is a trial, in the order in which they were asked for; the dot marks the best."
    if len(shown) > _MOST_COLUMNS:
        shown.sort(key=lambda trial: (trial is not best, -(trial.score if trial.score is not None else -1e300)))
        shown = sorted(shown[:_MOST_COLUMNS], key=lambda trial: trial.trial_number)
        caption += f" The best {_MOST_COLUMNS} trials are drawn."
    if len(names) > _MOST_ROWS:
        caption += f" The first {_MOST_ROWS} of {len(names)} variables are drawn."
        names = names[:_MOST_ROWS]
    values = [[(trial.coefficients or {}).get(name) for trial in shown] for name in names]
    most = _full_shades(values, [not is_start(trial, "parent") for trial in shown])
    if len(set(most)) > 1:
        caption += " Variables differ in their ranges, so each has a scale of its own."
    svg = heat_map(
        names,
        [str(trial.trial_number) for trial in shown],
        values,
        marked=[trial.trial_number == best.trial_number for trial in shown],
        with_numbers=False,
        most=most if len(set(most)) > 1 else most[0],
        title="values of the search's variables in every trial",
        axis="trial",
    )
    return [Figure("What the search tried", caption, _safe(svg))]


def _full_shades(values: Sequence[Sequence[float | None]], counts: Sequence[bool]) -> list[float]:
    """What gets the full shade in each row: the largest of all, or of each row where rows differ much.

    Single parents have one coefficient at 1 and would leave all others pale, so their columns do not count.
    """
    largest = [
        max((abs(value) for value, is_in in zip(row, counts, strict=True) if is_in and value is not None), default=0.0)
        for row in values
    ]
    if max(largest) > 3 * median(largest):
        return [each or 1.0 for each in largest]
    return [max(largest) or 1.0] * len(values)


def coefficient_figures(winner: Evaluation, best: TrialRow | None) -> list[Figure]:
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
    # A copied tensor has one coefficient of 1, which says nothing of the merge.
    merged = [abs(value) for group in grid.groups if group.method not in ("copy", "drop") for value in group.values]
    svg = heat_map(grid.rows, columns, values, most=max(merged, default=None), title="coefficients of the best merge")
    return [Figure("Who gets how much", caption, _safe(svg))]


def bars_figure(rows: Sequence[ComparedRow], role: str) -> Figure:
    """Scores of the compared checkpoints, a panel for each eval task."""
    tasks = rows[-1].evaluation.report.tasks
    names = entry_names(tasks)
    panels = []
    for place, (name, task) in enumerate(zip(names, tasks, strict=True)):
        bars = []
        for row in rows:
            own = row.evaluation.report.tasks
            found = own[place] if place < len(own) else None
            bars.append(Bar(row.label, row.kind, found.value if found else None, found.stderr if found else None))
        panels.append((name, task.metric if task.higher_is_better else f"{task.metric}, lower is better", bars))
    table_rows = [
        TableRow(
            [
                Cell(row.label),
                *(_cell(task.value, task.stderr) for task in row.evaluation.report.tasks),
                _cell(objective(row.evaluation.report), macro_standard_error(row.evaluation.report)),
            ],
            row.kind == "best",
        )
        for row in rows
    ]
    counts = sorted({task.n for task in tasks})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return Figure(
        title="By eval task",
        caption=f"On {role} items, {items} for each eval task; whiskers are one standard error to each side.",
        svg=_safe(bar_panels(panels, f"scores by eval task on {role} items")),
        table=PageTable("As a table", ["checkpoint", *names, "macro average"], table_rows),
    )


def _trial_table(trials: Sequence[TrialRow], best: TrialRow) -> PageTable:
    scored = sorted(
        (trial for trial in trials if trial.score is not None), key=lambda t: (-(t.score or 0.0), t.trial_number)
    )[:_MOST_TABLE_ROWS]
    names = list(dict.fromkeys(name for trial in scored for name in trial.scores or {}))
    rows = [
        TableRow(
            [
                Cell(trial.label or ""),
                _cell(trial.score, trial.standard_error),
                *(_cell((trial.scores or {}).get(name), (trial.standard_errors or {}).get(name)) for name in names),
                Cell("–" if trial.seconds is None else f"{trial.seconds:.1f} s"),
            ],
            trial.trial_number == best.trial_number,
        )
        for trial in scored
    ]
    summary = f"The best {len(scored)} trials as a table" if len(scored) < len(trials) else "All trials as a table"
    return PageTable(summary, ["trial", "score", *names, "time"], rows)


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


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _cell(value: float | None, error: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.3f}", "" if error is None else f"{error:.3f}")


def _safe(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)
