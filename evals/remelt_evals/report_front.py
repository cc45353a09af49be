"""The Pareto front: trials that no other trial beats on one objective without losing on another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from remelt.errors import EvaluationError
from remelt.searchers.pareto import front
from remelt.strict_config import suggestion
from remelt_evals.eval_report import entry_names
from remelt_evals.report_reading import Evaluation, search_evaluation
from remelt_evals.report_tables import TrialRow

SCORE = "score"
"""Names the study's own objective, beside the entries of its suite."""


class FrontPoint(NamedTuple):
    """A trial with a value on every objective."""

    trial: TrialRow
    values: tuple[float, ...]
    """In the metrics' units."""
    standard_errors: tuple[float | None, ...]
    is_on_front: bool


@dataclass(frozen=True, slots=True)
class Front:
    """Trials over the objectives of a study."""

    objectives: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    role: str
    fidelity: str
    points: tuple[FrontPoint, ...]
    """Every trial that has all the values, by number."""
    num_left_out: int
    """Trials without values, or with values on other items."""

    @property
    def best(self) -> list[FrontPoint]:
        """The front, best on the first objective first."""
        sign = -1 if self.higher_is_better[0] else 1
        return sorted(
            (point for point in self.points if point.is_on_front),
            key=lambda point: (sign * point.values[0], point.trial.trial_number),
        )

    def to_json(self) -> dict[str, Any]:
        """The front and how many trials it was taken from, as JSON values."""
        return {
            "objectives": [
                {"name": name, "higher_is_better": higher}
                for name, higher in zip(self.objectives, self.higher_is_better, strict=True)
            ],
            "role": self.role,
            "fidelity": self.fidelity,
            "num_trials": len(self.points),
            "num_left_out": self.num_left_out,
            "front": [
                {
                    "trial_number": point.trial.trial_number,
                    "label": point.trial.label,
                    "candidate_id": point.trial.candidate_id,
                    "values": dict(zip(self.objectives, point.values, strict=True)),
                    "standard_errors": dict(zip(self.objectives, point.standard_errors, strict=True)),
                    "coefficients": point.trial.coefficients,
                }
                for point in self.best
            ],
        }


def front_of_trials(
    trials: Sequence[TrialRow],
    evaluations: Iterable[Evaluation],
    objectives: Sequence[str] = (),
    *,
    role: str = "search",
) -> Front:
    """The front of a study's trials.

    Only trials scored on the same items are compared: those at the fidelity that most of them have, `full` before
    others.

    Args:
        objectives: abilities of the suite, or `score` for the study's own objective; every ability by default.
        evaluations: of the trials where another role than search is asked for; else one is enough, to tell where higher
            is better, if trials have scores of their own.
        role: whose items.

    Raises:
        EvaluationError: no trial has values, or an objective is unknown.
    """
    by_id = {evaluation.report.evaluation_id: evaluation for evaluation in evaluations}
    higher_is_better = _orientation(by_id.values())
    scored = [one for trial in trials if (one := _scored(trial, by_id, role, higher_is_better)) is not None]
    if not scored:
        raise EvaluationError(f"none of {len(trials)} trials was scored on {role} items")
    fidelities = [one.fidelity for one in scored]
    fidelity = max(set(fidelities), key=lambda name: (name == "full", fidelities.count(name), name))
    comparable = [one for one in scored if one.fidelity == fidelity]
    known = [name for name in comparable[0].entries if name != SCORE]
    names = tuple(objectives) or tuple(known)
    if unknown := [name for name in names if name not in (*known, SCORE)]:
        raise EvaluationError(f"no objective {unknown[0]!r} in this study; {suggestion(unknown[0], [*known, SCORE])}")
    rows = []
    for trial, _, entries in comparable:
        if all(name in entries for name in names):
            rows.append((trial, [entries[name] for name in names]))
    if not rows:
        raise EvaluationError(f"no trial has values for {', '.join(names)}")
    higher = tuple(entry.higher_is_better for entry in rows[0][1])
    signs_T = np.where(higher, 1.0, -1.0)
    values_NT = np.array([[entry.value for entry in entries] for _, entries in rows])
    points = tuple(
        FrontPoint(
            trial, tuple(entry.value for entry in entries), tuple(entry.standard_error for entry in entries), bool(on)
        )
        for (trial, entries), on in zip(rows, front(values_NT * signs_T), strict=True)
    )
    return Front(names, higher, role, fidelity, points, len(trials) - len(points))


class _Entry(NamedTuple):
    value: float
    standard_error: float | None
    higher_is_better: bool


class _Scored(NamedTuple):
    trial: TrialRow
    fidelity: str
    entries: Mapping[str, _Entry]


def _orientation(evaluations: Iterable[Evaluation]) -> Mapping[str, bool]:
    """Of each entry, whether higher is better."""
    found: dict[str, bool] = {}
    for one in evaluations:
        tasks = one.report.tasks
        found |= {name: task.higher_is_better for name, task in zip(entry_names(tasks), tasks, strict=True)}
    return found


def _scored(
    trial: TrialRow, by_id: Mapping[str, Evaluation], role: str, higher_is_better: Mapping[str, bool]
) -> _Scored | None:
    """A trial's values on the items of a role; None where it has none."""
    evaluation = search_evaluation(trial, by_id, role)
    entries: dict[str, _Entry] = {}
    if evaluation is not None and evaluation.report.is_ok:
        tasks = evaluation.report.tasks
        fidelity = evaluation.report.fidelity
        for name, task in zip(entry_names(tasks), tasks, strict=True):
            entries[name] = _Entry(task.value, task.stderr, task.higher_is_better)
    elif role == "search" and trial.scores and trial.scores.keys() <= higher_is_better.keys():
        fidelity = trial.fidelity or "full"
        for name, value in trial.scores.items():
            entries[name] = _Entry(value, (trial.standard_errors or {}).get(name), higher_is_better[name])
    if not entries:
        return None
    if trial.score is not None:
        entries[SCORE] = _Entry(trial.score, trial.standard_error, True)
    return _Scored(trial, fidelity, entries)
