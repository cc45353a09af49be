"""A study's rows in the Parquet reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from remelt_evals.report_tables import ParentRow, RunContext, TrialRow, write_evaluation, write_trials
from remelt_jobs.candidates import Candidate, bound_recipe
from remelt_jobs.study_config import StudyConfig
from remelt_jobs.study_state import StudyState
from remelt_jobs.trial import Outcome


def trial_id(study_id: str, number: int) -> str:
    """A trial's id: its study's, and its number."""
    return f"{study_id}-{number}"


def write_candidate(
    reports: Path, config: StudyConfig, inputs: Mapping[str, str], candidate: Candidate, outcome: Outcome
) -> None:
    """Write one evaluation of a candidate: runs, metrics and samples, with every id that leads to it.

    Args:
        inputs: Identity of each of the recipe's checkpoints, by name.
    """
    assert outcome.report is not None
    recipe = bound_recipe(config.recipe, candidate)
    context = RunContext(
        study_id=config.study_id,
        trial_id=trial_id(config.study_id, candidate.number),
        trial_number=candidate.number,
        candidate_id=outcome.candidate_id,
        recipe_json=None if recipe is None else json.dumps(recipe.canonical(), sort_keys=True),
        parents=tuple(ParentRow(ref.source, None, inputs[ref.name]) for ref in config.recipe.checkpoints),
        coefficients=candidate.values or None,
        label=candidate.label,
        host=outcome.where or None,
        merge_seconds=outcome.merge_seconds,
    )
    write_evaluation(reports, outcome.report, context)


def write_trials_so_far(reports: Path, config: StudyConfig, state: StudyState) -> Path:
    """Write the trials table anew, as it is done with every trial for those who watch."""
    assert state.identity is not None
    started = datetime.fromisoformat(state.identity["at"])
    places = {number: place for place, number in enumerate(state.finished)}
    rows = [
        _trial_row(config.study_id, state, candidate, places.get(number))
        for number, candidate in state.candidates.items()
    ]
    return write_trials(reports, config.study_id, rows, study_started_at=started)


def _trial_row(study_id: str, state: StudyState, candidate: Candidate, place: int | None) -> TrialRow:
    number = candidate.number
    record = state.finished.get(number, {})
    records = [record, state.scored.get(("selection", number), {}), state.scored.get(("report", number), {})]
    finished_at = record.get("at")
    return TrialRow(
        trial_id=trial_id(study_id, number),
        trial_number=number,
        state=record.get("state", "RUNNING"),
        label=candidate.label,
        candidate_id=record.get("candidate_id"),
        evaluation_ids=tuple(each["evaluation_id"] for each in records if each.get("evaluation_id")),
        score=state.score(number),
        scores=record.get("abilities") or None,
        coefficients=candidate.values or None,
        error=record.get("failure"),
        started_at=datetime.fromisoformat(state.asked_at[number]),
        finished_at=None if finished_at is None else datetime.fromisoformat(finished_at),
        seconds=record.get("seconds"),
        digest=record.get("digest"),
        # Errors of ranks and of values standardised by other trials do not follow from those of the entries.
        standard_error=None if state.objective.is_relative else record.get("score_error"),
        standard_errors=record.get("ability_errors") or None,
        origin=candidate.origin,
        fidelity=record.get("fidelity"),
        is_winner=None if state.published is None else state.published["trial"] == number,
        asked_after=state.asked_after[number],
        finish_place=place,
        host=record.get("where") or None,
        merge_seconds=record.get("merge_seconds"),
        evaluation_seconds=_difference(record.get("seconds"), record.get("merge_seconds")),
    )


def _difference(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else round(whole - part, 3)
