"""What a study's journal says: the state of the study, folded from its records, live and on resume alike.

study      what is studied, and its parents' fingerprints                    once, first
session    a driver began to work
asked      a candidate, and how many trials had finished when it was asked for
finished   a trial's score on search items, or why it has none
scored     a candidate's score on selection or report items
winner     the candidate with the best score on selection items
published  its merge, verified
done       how many trials the study was finished with, its budget spent
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from remelt.errors import StudyError
from remelt.searchers import Trial, TrialState
from remelt_evals.eval_report import Role, entry_names, macro_standard_error, objective
from remelt_evals.objectives import OBJECTIVES, Objective
from remelt_jobs.candidates import Candidate
from remelt_jobs.journal import Record
from remelt_jobs.trial import Outcome


class Spent(NamedTuple):
    """What a study has used up."""

    trials: int
    """Finished ones."""
    evaluator_seconds: float
    """Of all evaluators together, from the start of each candidate's merge to the end of its evaluation."""
    wall_seconds: float
    """While a driver was at work; the time between two drivers is not counted."""


@dataclass(slots=True)
class StudyState:
    """A study as far as it has come."""

    objective: Objective = OBJECTIVES["macro mean"]
    weights: tuple[float, ...] = ()
    """Of the suite's entries; an objective that depends on other trials needs them."""
    identity: Record | None = None
    candidates: dict[int, Candidate] = field(default_factory=dict)
    """Every candidate asked for, by trial number."""
    asked_after: dict[int, int] = field(default_factory=dict)
    asked_at: dict[int, str] = field(default_factory=dict)
    """When, as ISO 8601."""
    finished: dict[int, Record] = field(default_factory=dict)
    """By trial number, in the order in which they finished."""
    scored: dict[tuple[Role, int], Record] = field(default_factory=dict)
    """Selection and report scores by role and trial number."""
    winner: int | None = None
    earlier_winners: set[int] = field(default_factory=set)
    """Other candidates that won before the budget was raised."""
    published: Record | None = None
    is_done: bool = False
    """Whether everything was done that the budget of then allowed."""
    _scores: dict[int, float] | None = None
    _earlier_seconds: float = 0.0
    _session_at: datetime | None = None
    _last_at: datetime | None = None

    @classmethod
    def of(
        cls, records: Iterable[Record], objective: Objective = OBJECTIVES["macro mean"], weights: Sequence[float] = ()
    ) -> StudyState:
        """Fold a journal."""
        state = cls(objective=objective, weights=tuple(weights))
        for record in records:
            state.apply(record)
        return state

    def apply(self, record: Record) -> None:
        """Take one more record.

        Raises:
            StudyError: The record is of a kind that this version does not know.
        """
        kind = record["type"]
        at = datetime.fromisoformat(record["at"])
        if kind == "session":
            self._earlier_seconds, self._session_at = self._wall_seconds(self._last_at or at), at
        elif kind == "study":
            self.identity = record
        elif kind == "asked":
            candidate = Candidate.from_record(record["candidate"])
            self.candidates[candidate.number] = candidate
            self.asked_after[candidate.number] = record["asked_after"]
            self.asked_at[candidate.number] = record["at"]
            self.is_done = False  # a larger budget opened the study again
        elif kind == "finished":
            self.finished[record["trial"]] = record
            self._scores = None
        elif kind == "scored":
            self.scored[record["role"], record["trial"]] = record
        elif kind == "winner":
            if self.winner is not None:
                self.earlier_winners.add(self.winner)
            self.winner = record["trial"]
        elif kind == "published":
            self.published = record
        elif kind == "done":
            self.is_done = True
        else:
            raise StudyError(f"the journal has a record of kind {kind!r}, which this version of remelt does not know")
        self._last_at = at

    def spent(self, now: datetime | None = None) -> Spent:
        """What was used up by the last record, or by `now`, for the driver at work."""
        seconds = sum(float(record["seconds"]) for record in self.finished.values())
        at = now or self._last_at
        return Spent(len(self.finished), seconds, 0.0 if at is None else self._wall_seconds(at))

    def _wall_seconds(self, at: datetime) -> float:
        current = 0.0 if self._session_at is None else (at - self._session_at).total_seconds()
        return self._earlier_seconds + max(0.0, current)

    @property
    def unfinished(self) -> list[Candidate]:
        """Asked for without an end: running, or left behind by a driver that died."""
        return [candidate for number, candidate in self.candidates.items() if number not in self.finished]

    @property
    def seen(self) -> list[Trial]:
        """All trials as a searcher sees them: finished ones as they finished, then running ones by number."""
        return [self._trial(number) for number in self.finished] + [
            self._trial(candidate.number) for candidate in sorted(self.unfinished, key=lambda one: one.number)
        ]

    @property
    def scores(self) -> Mapping[int, float]:
        """The objective of every trial that has values on search items, estimated ones included."""
        if self._scores is None:
            records = {number: record for number, record in self.finished.items() if record["score"] is not None}
            if self.objective.is_relative:
                values = {number: record["values"] for number, record in records.items()}
                self._scores = self.objective.scores(values, self.weights, self._reference)
            else:
                self._scores = {number: record["score"] for number, record in records.items()}
        return self._scores

    @property
    def _reference(self) -> list[list[float]]:
        """Values of the uniform merge and the single parents on search items."""
        starts = [number for number, one in self.candidates.items() if one.origin in ("uniform", "parent")]
        return [self.finished[number]["values"] for number in starts if self.finished.get(number, {}).get("values")]

    def score(self, number: int) -> float | None:
        """A trial's objective on search items; an estimate where a lower fidelity stopped it."""
        return self.scores.get(number)

    @property
    def ranking(self) -> list[int]:
        """Complete trials, best first; of equal scores the earlier trial, so that simpler candidates win ties."""
        complete = [number for number in self.scores if self.finished[number]["state"] == TrialState.COMPLETE]
        return sorted(complete, key=lambda number: (-self.scores[number], number))

    def finalists(self, count: int) -> list[int]:
        """The best `count` trials of different weights, the best single parent and the uniform merge, best first."""
        digests: set[str] = set()
        chosen: set[int] = set()
        for number in self.ranking:
            digest = self.finished[number]["digest"]
            if len(chosen) < count and digest not in digests:
                chosen.add(number)
                digests.add(digest)
        for origin in ("parent", "uniform"):
            chosen.update([number for number in self.ranking if self.candidates[number].origin == origin][:1])
        return [number for number in self.ranking if number in chosen]

    def choose_winner(self, finalists: Sequence[int]) -> int:
        """The finalist with the best score on selection items; of equals the earlier trial.

        Raises:
            StudyError: No finalist has a score.
        """
        records = {number: self.scored["selection", number] for number in finalists}
        scores = {number: record["score"] for number, record in records.items() if record["score"] is not None}
        if self.objective.is_relative:
            values = {number: records[number]["values"] for number in scores}
            scores = self.objective.scores(values, self.weights, self._reference)
        ranked = sorted(scores, key=lambda number: (-scores[number], number))
        if not ranked:
            reasons = sorted({str(self.scored["selection", number]["failure"]) for number in finalists})
            raise StudyError(f"none of the {len(finalists)} finalists could be scored on selection items: {reasons}")
        return ranked[0]

    def _trial(self, number: int) -> Trial:
        record = self.finished.get(number, {})
        return Trial(
            number=number,
            state=TrialState(record.get("state", TrialState.RUNNING)),
            point=self.candidates[number].point,
            asked_after=self.asked_after[number],
            score=self.score(number),
            objectives=tuple(record.get("values") or ()) if self.objective.is_several else (),
            values=self.candidates[number].values,
        )


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """What a `finished` or `scored` record keeps of an outcome; the samples are in the reports."""
    report = outcome.report if outcome.report is not None and outcome.report.is_ok else None
    state = TrialState.COMPLETE if report is not None else TrialState.FAILED
    tasks = () if report is None else report.tasks
    names = entry_names(tasks)
    values = [task.oriented_value for task in tasks]
    score = None if report is None else objective(report)
    if outcome.estimate is not None:
        state, values, score = TrialState.STOPPED, list(outcome.estimate.values), outcome.estimate.score
    return {
        "state": str(state),
        "score": score,
        "values": values,
        "abilities": {name: task.value for name, task in zip(names, tasks, strict=True)},
        "ability_errors": {name: task.stderr for name, task in zip(names, tasks, strict=True)},
        "score_error": None if report is None or outcome.estimate is not None else macro_standard_error(report),
        "fidelity": None if report is None else report.fidelity,
        "failure": outcome.failure,
        "digest": outcome.digest,
        "candidate_id": outcome.candidate_id,
        "evaluation_id": None if outcome.report is None else outcome.report.evaluation_id,
        "merge_seconds": round(outcome.merge_seconds, 3),
        "seconds": round(outcome.seconds, 3),
        "where": outcome.where,
        "way": outcome.way,
    }
