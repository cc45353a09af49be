"""What came of a study: every parent, the uniform merge and the winner on report items, and how sure that is.

Nothing here was searched or selected on. The best parent is the one that is best on these very items, a choice made
with hindsight in the parents' favour, so a lead over it is not the luck of the draw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from remelt.errors import StudyError
from remelt.searchers import build_searcher, searcher_report
from remelt_evals.eval_report import EvalReport, macro_standard_error, objective, report_from_json
from remelt_evals.paired import Comparison, compare
from remelt_jobs.candidates import Candidate
from remelt_jobs.study_config import StudyConfig
from remelt_jobs.study_state import StudyState

EVALUATIONS = "evaluations"
"""Folder in the study's output with the evaluations on report items, as JSON."""
BEST = "best"
REPORTS = "reports"
RESULT_FILE = "result.json"


class AbilityScore(NamedTuple):
    """One entry of the suite."""

    ability: str
    metric: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One checkpoint on report items."""

    label: str
    kind: Literal["parent", "uniform", "best"]
    objective: float
    stderr: float | None
    """Of the objective, its entries taken as independent."""
    abilities: tuple[AbilityScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Versus:
    """The winner against another, paired item by item, with 95 % intervals."""

    against: Literal["best parent", "uniform"]
    label: str
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """What came of a study."""

    study_id: str
    output: Path
    best_path: Path
    """The published winner."""
    best_digest: str
    winner: str
    """The winning candidate's label; the uniform merge or a parent may have won."""
    values: Mapping[str, float]
    """Of the recipe's variables, for the winner; empty for a parent that they cannot express."""
    rows: tuple[ResultRow, ...]
    """Parents in the order of the recipe, the uniform merge, the winner."""
    versus: tuple[Versus, ...]
    """Against the best parent, then against uniform; without what could not be scored."""
    num_trials: int
    num_failed: int
    notes: tuple[str, ...]
    searcher: Mapping[str, Any]
    """What the searcher learned, as JSON values: a surrogate's fit errors and front, a soup's members. May be empty."""
    reports: Path
    is_reused: bool = False
    """Whether it was finished already, and nothing was done."""

    def to_json(self) -> str:
        """For people and scripts; the journal is what a resume reads."""
        fields = asdict(self) | {"output": ".", "best_path": BEST}
        del fields["is_reused"], fields["reports"]
        fields["rows"] = [asdict(row) | {"abilities": [a._asdict() for a in row.abilities]} for row in self.rows]
        fields["versus"] = [
            {
                "against": versus.against,
                "label": versus.label,
                "macro": versus.comparison.macro._asdict(),
                "abilities": [each._asdict() for each in versus.comparison.abilities],
            }
            for versus in self.versus
        ]
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def build_result(config: StudyConfig, state: StudyState, output: Path, *, is_reused: bool = False) -> StudyResult:
    """Put the result together from the journal's state and the kept evaluations.

    Raises:
        StudyError: The published winner has no score on report items, or an evaluation file is gone.
    """
    assert state.winner is not None and state.published is not None
    winner = state.candidates[state.winner]
    reports = {number: report for number in state.candidates if (report := _load(state, output, number)) is not None}
    if winner.number not in reports:
        failure = state.scored.get(("report", winner.number), {}).get("failure")
        raise StudyError(f"the winner ({winner.label}) has no score on report items: {failure}; run the study again")
    baselines = [one for one in state.candidates.values() if one.origin == "parent"]
    baselines += [one for one in state.candidates.values() if one.origin == "uniform"]
    rows = [_row(one, reports[one.number]) for one in baselines if one.number in reports]
    unscored = [one.label for one in baselines if one.number not in reports]
    return StudyResult(
        study_id=config.study_id,
        output=output,
        best_path=output / BEST,
        best_digest=state.published["digest"],
        winner=winner.label,
        values=winner.values,
        rows=(*rows, replace(_row(winner, reports[winner.number]), kind="best")),
        versus=_versus(winner, baselines, reports),
        num_trials=len(state.finished),
        num_failed=sum(record["state"] == "FAILED" for record in state.finished.values()),
        notes=(*_notes(config, winner, unscored), *reports[winner.number].notes),
        searcher=searcher_report(
            build_searcher(config.searcher, config.space, config.seed, config.searcher_options), state.seen
        ),
        reports=config.reports or output / REPORTS,
        is_reused=is_reused,
    )


def _load(state: StudyState, output: Path, number: int) -> EvalReport | None:
    record = state.scored.get(("report", number))
    if record is None or record["score"] is None:
        return None
    path = output / EVALUATIONS / f"{record['evaluation_id']}.json"
    try:
        return report_from_json(path.read_text())
    except FileNotFoundError:
        raise StudyError(
            f"{path} is gone, which the journal says was written; restore it, or start the study in another directory"
        ) from None


def _row(candidate: Candidate, report: EvalReport) -> ResultRow:
    return ResultRow(
        label=candidate.label,
        kind="uniform" if candidate.origin == "uniform" else "parent",
        objective=objective(report),
        stderr=macro_standard_error(report),
        abilities=tuple(
            AbilityScore(task.ability, task.metric, task.value, task.stderr, task.n) for task in report.tasks
        ),
    )


def _versus(winner: Candidate, baselines: list[Candidate], reports: Mapping[int, EvalReport]) -> tuple[Versus, ...]:
    """Comparisons with the parent that is best on these items, and with the uniform merge.

    Where one of them is the winner itself, the difference is nothing, and that is what is said.
    """
    scored = [one for one in baselines if one.number in reports]
    parents = sorted((one for one in scored if one.origin == "parent"), key=lambda o: -objective(reports[o.number]))
    uniform = [one for one in scored if one.origin == "uniform"]
    pairs: list[tuple[Literal["best parent", "uniform"], Candidate]] = []
    pairs += [("best parent", one) for one in parents[:1]]
    pairs += [("uniform", one) for one in uniform]
    return tuple(
        Versus(against=kind, label=one.label, comparison=compare(reports[one.number], reports[winner.number]))
        for kind, one in pairs
    )


def _notes(config: StudyConfig, winner: Candidate, unscored: list[str]) -> list[str]:
    notes = []
    if winner.origin in ("uniform", "parent"):
        notes.append(
            f"no finalist of the search was better on selection items than {winner.label}, so that is published"
        )
    if unscored:
        notes.append(f"without a score on report items: {', '.join(unscored)}")
    if config.allow_public_benchmarks and not config.suite.is_local:
        notes.append("coefficients were optimised on items of public benchmarks (allow_public_benchmarks)")
    return notes
