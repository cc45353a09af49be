"""The report page: one HTML file with everything in it, to be read without a network and without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt import __version__
from remelt.errors import EvaluationError
from remelt_evals.eval_report import entry_names, macro_standard_error, objective
from remelt_evals.paired import Difference
from remelt_evals.report_comparing import compare_in_reports
from remelt_evals.report_figures import (
    ComparedRow,
    Figure,
    bars_figure,
    coefficient_figures,
    front_figure,
    is_start,
    progress_figure,
    search_figures,
)
from remelt_evals.report_front import front_of_trials
from remelt_evals.report_reading import (
    NO_STUDY,
    Evaluation,
    evaluations_of,
    read_evaluations,
    read_trials,
    search_evaluation,
)
from remelt_evals.report_tables import TrialRow

_MOST_PARENTS = 12


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

    trials = [] if study_id is None else read_trials(reports, study_id)
    best = _best_trial(trials)
    starts = [trial for trial in trials if is_start(trial, "uniform") or is_start(trial, "parent")]
    evaluations = (
        evaluations_of(reports, [*starts, *([best] if best else [])])
        if study_id
        else read_evaluations(reports, study_id=NO_STUDY)
    )
    if not any(evaluation.report.is_ok for evaluation in evaluations):
        raise EvaluationError(f"{reports} holds no evaluation that succeeded, so there is nothing to draw")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    fields = _fields(Path(reports), study_id, trials, best, evaluations)
    return environment.get_template("report.html.j2").render(fields)


def _fields(
    reports: Path,
    study_id: str | None,
    trials: Sequence[TrialRow],
    best: TrialRow | None,
    evaluations: Sequence[Evaluation],
) -> dict[str, Any]:
    by_id = {evaluation.report.evaluation_id: evaluation for evaluation in evaluations}
    rows = _rows(trials, best, by_id) if trials else _loose_rows(evaluations)
    role = rows[-1].evaluation.report.role
    winner = rows[-1].evaluation
    figures = [*_study_figures(trials, best, evaluations), *coefficient_figures(winner, best), bars_figure(rows, role)]
    notes = list(dict.fromkeys(note for row in rows for note in row.evaluation.report.notes))
    num_parents = sum(is_start(trial, "parent") for trial in trials)
    if num_parents > _MOST_PARENTS:
        notes.append(f"of {num_parents} single parents the best {_MOST_PARENTS} on {role} items are in the bars")
    if role != "report":
        notes.append(f"these are {role} items; nothing was scored on report items yet")
    return {
        "version": __version__,
        "title": f"Study {study_id[:12]}" if study_id else "Evaluations",
        "lead": _lead(trials, best, rows, role),
        "tiles": _tiles(reports, study_id, trials, rows, evaluations, role),
        "figures": figures,
        "provenance": _provenance(study_id, winner, best),
        "codes": {"study", "candidate", "digest", "suite digest", "evaluation", "run"},
        "parents": winner.context.parents,
        "recipe": _recipe_text(winner.context.recipe_json),
        "notes": notes,
        "source": reports.name if reports.name != "reports" else f"{reports.absolute().parent.name}/reports",
    }


def _best_trial(trials: Sequence[TrialRow]) -> TrialRow | None:
    """The winner; while there is none, the best on search items."""
    for trial in trials:
        if trial.is_winner:
            return trial
    scored = [trial for trial in trials if trial.score is not None and trial.state == "COMPLETE"]
    return max(scored, key=lambda trial: (trial.score or 0.0, -trial.trial_number), default=None)


def _rows(trials: Sequence[TrialRow], best: TrialRow | None, by_id: Mapping[str, Evaluation]) -> list[ComparedRow]:
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
        ComparedRow(trial.label or "parent", "parent", found[trial.trial_number])
        for trial in trials
        if is_start(trial, "parent") and trial.trial_number in found
    ]
    if len(parents) > _MOST_PARENTS:
        kept = sorted(parents, key=lambda row: -objective(row.evaluation.report))[:_MOST_PARENTS]
        parents = [row for row in parents if row in kept]
    uniform = [
        ComparedRow("uniform merge", "uniform", found[trial.trial_number])
        for trial in trials
        if is_start(trial, "uniform") and trial.trial_number in found
    ]
    name = "best merge" if best.is_winner else "best so far"
    return [*parents, *uniform, ComparedRow(f"{name} ({best.label})", "best", found[best.trial_number])]


def _loose_rows(evaluations: Sequence[Evaluation]) -> list[ComparedRow]:
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
        *(ComparedRow(one.name, "parent", one) for one in ranked[:-1]),
        ComparedRow(ranked[-1].name, "best", ranked[-1]),
    ]


def _lead(trials: Sequence[TrialRow], best: TrialRow | None, rows: Sequence[ComparedRow], role: str) -> str:
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
    rows: Sequence[ComparedRow],
    evaluations: Sequence[Evaluation],
    role: str,
) -> list[dict[str, str]]:
    best = rows[-1]
    error = macro_standard_error(best.evaluation.report)
    tiles = [
        {
            "name": f"macro average, {role} items",
            "number": f"{objective(best.evaluation.report):.3f}",
            "more": best.label if error is None else f"± {error:.3f}, {best.label}",
            "kind": "",
        }
    ]
    parents = [row for row in rows if row.kind == "parent"]
    others = [(f"gain over best parent, {row.label}", row) for row in _top(parents)] if study_id else []
    others += [("gain over the uniform merge", row) for row in rows if row.kind == "uniform"]
    for name, row in others:
        found = _difference(reports, evaluations, row, best, role, study_id)
        if found is not None:
            kind = "good" if found.low > 0 else "bad" if found.high < 0 else ""
            verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "not clear"
            more = f"{verdict}: [{found.low:+.3f}, {found.high:+.3f}]"
            tiles.append({"name": name, "number": f"{found.difference:+.3f}", "more": more, "kind": kind})
    if trials:
        states = {state: sum(trial.state == state for trial in trials) for state in ("COMPLETE", "STOPPED", "FAILED")}
        running = len(trials) - sum(states.values())
        parts = [f"{count} {state.lower()}" for state, count in states.items() if count]
        parts += [f"{running} running"] if running else []
        tiles.append({"name": "trials", "number": str(len(trials)), "more": ", ".join(parts), "kind": ""})
    return tiles


def _top(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    return sorted(rows, key=lambda row: -objective(row.evaluation.report))[:1]


def _difference(
    reports: Path, evaluations: Sequence[Evaluation], a: ComparedRow, b: ComparedRow, role: str, study_id: str | None
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
) -> list[Figure]:
    if not trials or best is None:
        return []
    figures = [progress_figure(trials, best)]
    tasks = next(one.report.tasks for one in evaluations if one.report.tasks)
    if len(tasks) > 1:
        figures.append(front_figure(front_of_trials(trials, evaluations), best))
    figures += search_figures(trials, best)
    return figures


def _provenance(study_id: str | None, winner: Evaluation, best: TrialRow | None) -> list[tuple[str, str]]:
    report, context = winner.report, winner.context
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    found = [
        ("study", study_id),
        ("checkpoint", report.checkpoint),
        ("candidate", context.candidate_id or (best.candidate_id if best else None)),
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
