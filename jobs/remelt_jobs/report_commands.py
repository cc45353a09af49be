"""`remelt report`: show, compare, front, pull, export and html. What was measured, for people and for scripts."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from remelt.errors import EvaluationError
from remelt_jobs.search_commands import RoleName

app = typer.Typer(
    name="report",
    help="Show, compare, plot, fetch and export what was measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Reports = Annotated[Path, typer.Argument(help="Folder of the Parquet tables, or a study's output.")]
Study = Annotated[str | None, typer.Option("--study", help="Beginning of a study id; the last study by default.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]


class TableName(StrEnum):
    """Which rows."""

    TRIALS = "trials"
    RUNS = "runs"
    METRICS = "metrics"
    SAMPLES = "samples"


@app.command("show")
def show(
    reports: Reports,
    study: Study = None,
    table: Annotated[
        TableName | None, typer.Option("--table", help="By default trials, or runs where no study was.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option("--sort", help="Column, largest first; -COLUMN smallest first. By default the best come first."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Rows at most; 0 for all.")] = 30,
    as_json: Json = False,
) -> None:
    """Trials, runs, metrics or samples as a table: by default the last study's trials, best first."""
    from remelt_evals.report_listing import list_rows, sorted_rows
    from remelt_evals.report_reading import choose_study, find_reports

    folder = find_reports(reports)
    study_id = choose_study(folder, study)
    name = table.value if table else "trials" if study_id else "runs"
    listing = list_rows(folder, name, study_id)
    rows = sorted_rows(listing, sort)
    shown = rows[:limit] if limit else rows
    if as_json:
        _print_json([row.fields for row in shown])
        return
    from remelt_jobs.tables import print_table

    if study_id:
        print(f"study {study_id[:12]}, {name}:")
    print_table(listing.header, [row.cells for row in shown])
    if any(row.fields.get("is_winner") for row in shown):
        print("* published by the study")
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown)} more; --limit 0 shows all")


@app.command("compare")
def compare(
    reports: Reports,
    a: Annotated[str, typer.Argument(help="Label, `best`, checkpoint, or the beginning of an id or digest.")],
    b: Annotated[str, typer.Argument(help="The same for what A is compared with.")],
    role: Annotated[RoleName, typer.Option("--role", help="Whose items.")] = RoleName.REPORT,
    task: Annotated[str | None, typer.Option("--task", help="One ability or eval task.")] = None,
    study: Study = None,
    examples: Annotated[int, typer.Option("--examples", min=0, max=5, help="Lost items to show for each task.")] = 3,
    as_json: Json = False,
) -> None:
    """Is B better than A, and where is it worse? Paired bootstrap over the items that both answered."""
    from remelt_evals.report_comparing import compare_in_reports
    from remelt_evals.report_reading import choose_study, evaluations_named, find_reports, read_trials

    folder = find_reports(reports)
    study_id = choose_study(folder, study)
    trials = [] if study_id is None else read_trials(folder, study_id)
    evaluations = evaluations_named(folder, (a, b), trials)
    found = compare_in_reports(folder, evaluations, a, b, role=role.value, task=task, trials=trials, study_id=study_id)
    if as_json:
        _print_json(found.to_json())
        return
    _print_comparison(found, examples)


@app.command("front")
def front(
    reports: Reports,
    objectives: Annotated[
        str, typer.Option("--objectives", help="Abilities, with commas between; `score` is the study's own objective.")
    ] = "",
    role: Annotated[RoleName, typer.Option("--role", help="Whose items.")] = RoleName.SEARCH,
    study: Study = None,
    as_json: Json = False,
) -> None:
    """The trials that no other trial beats on one ability without losing on another."""
    from remelt_evals.report_front import front_of_trials
    from remelt_evals.report_reading import choose_study, evaluations_of, find_reports, read_trials
    from remelt_jobs.tables import print_table

    folder = find_reports(reports)
    study_id = choose_study(folder, study)
    if study_id is None:
        raise EvaluationError(f"{folder} holds no study, and a front is one of a study's trials")
    trials = read_trials(folder, study_id)
    # On search items trials have their own scores; one evaluation tells where higher is better.
    scored = [trial for trial in trials if trial.scores]
    evaluations = evaluations_of(folder, scored[:1] if role is RoleName.SEARCH else trials)
    names = [name.strip() for name in objectives.split(",") if name.strip()]
    found = front_of_trials(trials, evaluations, names, role=role.value)
    if as_json:
        _print_json({"study_id": study_id, **found.to_json()})
        return
    arrows = ["" if higher else " (lower is better)" for higher in found.higher_is_better]
    header = [f"{name}{arrow}" for name, arrow in zip(found.objectives, arrows, strict=True)]
    print_table(
        ["trial", *header],
        [[point.trial.label, *map(_with_error, point.values, point.standard_errors)] for point in found.best],
    )
    left_out = f"; {found.num_left_out} trials without these scores" if found.num_left_out else ""
    print(f"{len(found.best)} of {len(found.points)} trials, {found.role} items, fidelity {found.fidelity}{left_out}")


@app.command("pull")
def pull(
    source: Annotated[str, typer.Option("--from", help="Folder, or URI: file://, s3://bucket/path, gs://.")],
    since: Annotated[
        datetime, typer.Option("--since", formats=["%Y-%m-%d"], help="First date of the partitions, in UTC.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder of the tables here.")] = Path("reports"),
) -> None:
    """Bring report files here from where a cluster left them; only those that are not here yet."""
    from remelt_evals.report_pulling import pull_reports
    from remelt_jobs.progress import human_bytes
    from remelt_jobs.tables import print_table

    pulled = pull_reports(source, since.date(), to)
    if pulled.parts:
        count: dict[tuple[str, str], list[int]] = {}
        for part in pulled.parts:
            entry = count.setdefault((part.study[:12], part.table), [0, 0])
            entry[0] += 1
            entry[1] += part.num_bytes
        rows = [[study, table, files, human_bytes(size)] for (study, table), (files, size) in sorted(count.items())]
        print_table(["study", "table", "files", "bytes"], rows)
    print(
        f"{len(pulled.parts)} files ({human_bytes(pulled.num_bytes)}) came to {pulled.folder}; "
        f"{pulled.num_present} were here already"
    )
    if pulled.damaged:
        raise EvaluationError(f"{len(pulled.damaged)} files were left out: {'; '.join(pulled.damaged[:3])}")


@app.command("export")
def export(
    reports: Reports,
    evaluation: Annotated[str, typer.Argument(help="Evaluation id, or what `compare` takes.")],
    output: Annotated[Path, typer.Option("--output", help="JSON file to write.")],
    role: Annotated[RoleName | None, typer.Option("--role", help="Whose items, where several were scored.")] = None,
    study: Study = None,
) -> None:
    """Write an evaluation as lm-eval's own results JSON."""
    from remelt.receipts import write_file_durably
    from remelt_evals.report_comparing import choose_one
    from remelt_evals.report_export import lm_eval_results
    from remelt_evals.report_reading import choose_study, evaluations_named, find_reports, read_trials

    folder = find_reports(reports)
    study_id = choose_study(folder, study)
    trials = [] if study_id is None else read_trials(folder, study_id)
    evaluations = evaluations_named(folder, (evaluation,), trials)
    wanted = None if role is None else role.value
    chosen = choose_one(folder, evaluations, evaluation, role=wanted, trials=trials, study_id=study_id)
    text = json.dumps(lm_eval_results(chosen), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file_durably(output, text.encode())
    report = chosen.report
    print(f"wrote {output}: {chosen.name} on {report.role} items, evaluation {report.evaluation_id[:12]}")


@app.command("html")
def html(
    reports: Reports,
    output: Annotated[Path, typer.Option("--output", help="HTML file to write.")],
    study: Study = None,
) -> None:
    """Write one self-contained page: trials, trade-offs, coefficients, scores by eval task, provenance."""
    from remelt.receipts import write_file_durably
    from remelt_evals.report_page import report_page
    from remelt_evals.report_reading import choose_study, find_reports

    folder = find_reports(reports)
    study_id = choose_study(folder, study)
    text = report_page(folder, study_id)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file_durably(output, text.encode())
    print(f"wrote {output}: {f'study {study_id[:12]}' if study_id else 'evaluations outside of studies'}")


def _print_comparison(found: Any, num_examples: int) -> None:
    from remelt_jobs.tables import print_table

    report = found.a.report
    print(f"A: {_side(found.a)}")
    print(f"B: {_side(found.b)}")
    print(f"{report.role} items of suite {report.suite}, fidelity {report.fidelity}; B - A, paired, 95 % interval")
    print()
    differences = [*([found.macro] if found.macro else []), *(task.difference for task in found.tasks)]
    rows = [
        [
            each.name,
            each.metric or "mean",
            each.n,
            f"{each.a:.4f}",
            f"{each.b:.4f}",
            f"{each.difference:+.4f}",
            f"[{each.low:+.4f}, {each.high:+.4f}]",
            "better" if each.low > 0 else "worse" if each.high < 0 else "no clear difference",
        ]
        for each in differences
    ]
    print_table(["ability", "metric", "items", "A", "B", "gain", "interval", "B is"], rows)
    worse = [task.difference.name for task in found.tasks if task.is_worse]
    print()
    print(f"B is worse on: {', '.join(worse)}" if worse else "B is clearly worse on nothing")
    for task in found.tasks:
        print(f"{task.difference.name}: {task.num_lost} items lost, {task.num_won} won of {task.difference.n}")
        for flip in task.examples[:num_examples]:
            said = f"A {flip.response_a!r}, B {flip.response_b!r}"
            if not flip.response_a and not flip.response_b:
                said = f"A {flip.score_a:.4g}, B {flip.score_b:.4g}"
            print(f"  lost item {flip.doc_id}: {_short(said)}; target {_short(repr(flip.target))}")


def _side(evaluation: Any) -> str:
    report = evaluation.report
    return f"{evaluation.name}, evaluation {report.evaluation_id[:12]}, digest {report.digest[:24]}"


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str))
