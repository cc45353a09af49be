"""A study on the terminal: a bar or plain lines while it runs, a table of report items at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from remelt_evals.eval_report import entry_names
from remelt_evals.paired import Difference
from remelt_jobs.progress import human_seconds
from remelt_jobs.study_progress import StudyProgress
from remelt_jobs.study_result import StudyResult, Versus

_LISTS = ("fit", "front")
"""Keys of a searcher's report that have lines of their own."""

_PHASES = {
    "search": "trials",
    "selection": "finalists on selection items",
    "publication": "publication",
    "report": "on report items",
}


class TerminalStudyProgress:
    """Told of every step of a study, it shows a bar on stderr; a line for each step where nobody watches."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._bar_task: Any = None
        self._phase = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, step: StudyProgress) -> None:
        if step.phase == "start" or not sys.stderr.isatty():
            print(progress_line(step), file=sys.stderr, flush=True)
            return
        if step.phase != self._phase:
            self._stop()
            self._start(step)
        self._bar.update(self._bar_task, completed=step.num_done, description=_best(step) or step.last)
        if step.num_done == step.num_total:
            self._stop()

    def _start(self, step: StudyProgress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._phase = step.phase
        self._bar = Progress(
            TextColumn(_PHASES[step.phase]),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._bar_task = self._bar.add_task("", total=step.num_total)
        self._bar.start()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._phase = ""


def progress_line(step: StudyProgress) -> str:
    """One step as a line: how far, what happened, the best so far, and how long it may take yet."""
    if step.phase == "start":
        return step.last
    parts = [f"{step.num_done}/{step.num_total} {_PHASES[step.phase]}: {step.last}", _best(step)]
    if step.eta_seconds:
        parts.append(f"ETA {human_seconds(step.eta_seconds)}")
    return "; ".join(part for part in parts if part)


def _best(step: StudyProgress) -> str:
    if step.phase != "search" or step.best_score is None:
        return ""
    return f"best {step.best_score:.4f} ({step.best_label})"


def print_study(result: StudyResult) -> None:
    """Print what came of a study: table, intervals, files. One line for a study that was finished already."""
    if result.is_reused:
        print(
            f"{result.output}: finished with {result.num_trials} trials, nothing done; best is {result.winner} with "
            f"{result.rows[-1].objective:.4f} on report items, in {result.best_path}"
        )
        return
    print_result(result)
    for path, what in study_files(result):
        print(f"wrote {path}  {what}")


def print_result(result: StudyResult) -> None:
    """The table of report items, the paired intervals and the notes."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(result_table(result))
    for versus in result.versus:
        console.print(versus_line(versus), soft_wrap=True)
    failed = f", {result.num_failed} of them failed" if result.num_failed else ""
    console.print(f"{result.num_trials} trials{failed}; the winner is {result.winner}{_values(result)}", soft_wrap=True)
    for line in searcher_lines(result):
        console.print(line, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)


def searcher_lines(result: StudyResult) -> list[str]:
    """What the searcher learned: its figures in a line, then a line for the fit of each objective."""
    report = result.searcher
    figures = [f"{name.removeprefix('is_')} {_figure(value)}" for name, value in report.items() if name not in _LISTS]
    names = entry_names(result.rows[-1].abilities)
    lines = [f"searcher: {', '.join(figures)}"] if figures else []
    for number, fit in enumerate(report.get("fit", ())):
        name = names[number] if len(report["fit"]) == len(names) else "objective"
        left_out = "undetermined" if fit["left_out"] is None else f"{fit['left_out']:.4f}"
        lines.append(
            f"surrogate of {name}: {fit['observations']} trials for {fit['coefficients']} coefficients, R2 "
            f"{fit['r_squared']:.3f}, error of trials left out {left_out}"
        )
    if report.get("front"):
        lines.append(f"the surrogate's front has {len(report['front'])} points, in {result.output / 'result.json'}")
    return lines


def _figure(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, Mapping):
        return " + ".join(f"{count} {name}" for name, count in value.items()) or "nothing"
    return str(value)


def result_table(result: StudyResult) -> Any:
    """Parents, uniform merge and best merge by ability, as a rich table; standard errors behind the scores."""
    from rich.table import Table

    table = Table(title="Report items: score ± standard error", title_justify="left")
    table.add_column("checkpoint")
    names = entry_names(result.rows[-1].abilities)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("macro average", justify="right")
    for row in result.rows:
        cells = [_score(score.value, score.stderr) for score in row.abilities]
        style = "bold" if row.kind == "best" else None
        label = {"parent": f"parent {row.label}", "uniform": "uniform merge", "best": "best merge"}[row.kind]
        table.add_row(label, *cells, _score(row.objective, row.stderr), style=style)
    return table


def versus_line(versus: Versus) -> str:
    """The paired difference to another checkpoint in words: macro average first, then by ability."""
    label = "the uniform merge" if versus.against == "uniform" else f"the best parent ({versus.label})"
    macro = versus.comparison.macro
    verdict = "better" if macro.is_better else "worse" if macro.high < 0 else "no clear difference"
    abilities = ", ".join(f"{each.name} {_interval(each)}" for each in versus.comparison.abilities)
    return f"best merge minus {label}: {_interval(macro)} on the macro average, {verdict}; {abilities}"


def study_files(result: StudyResult) -> list[tuple[str, str]]:
    """What a study wrote, and what it is."""
    return [
        (f"{result.best_path}", "the winner: shards, config, tokenizer, model card, recipe, manifest"),
        (f"{result.output / 'result.json'}", "this table, and the intervals"),
        (f"{result.reports}", "Parquet tables: trials, runs, metrics, samples"),
        (f"{result.output / 'journal'}", "every trial as it was asked for and finished"),
    ]


def _score(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _interval(difference: Difference) -> str:
    return f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _values(result: StudyResult) -> str:
    values = ", ".join(f"{name} {value:.3f}" for name, value in result.values.items())
    return f" ({values})" if values else ""
