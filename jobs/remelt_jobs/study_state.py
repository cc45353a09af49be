"""What a study's journal says: the state of the study, folded from its records, live and on resume alike.

study      what is studied, and its parents' fingerprints                    once, first
asked      a candidate, and how many trials had finished when it was asked for
finished   a trial's score on search items, or why it has none
scored     a candidate's score on selection or report items
winner     the candidate with the best score on selection items
published  its merge, verified
done       how many trials the study was finished with
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from remelt.errors import StudyError
from remelt.searchers import Trial, TrialState
from remelt_evals.eval_report import EvalReport, Role, objective
from remelt_jobs.candidates import Candidate
from remelt_jobs.journal import Record
from remelt_jobs.trial import Outcome


@dataclass(slots=True)
class StudyState:
    """A study as far as it has come."""

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
    num_done: int = 0
    """Trials that the study was finished with; 0 while it is not."""

    @classmethod
    def of(cls, records: Iterable[Record]) -> StudyState:
        """Fold a journal."""
        state = cls()
        for record in records:
            state.apply(record)
        return state

    def apply(self, record: Record) -> None:
        """Take one more record.

        Raises:
            StudyError: The record is of a kind that this version does not know.
        """
        kind = record["type"]
        if kind == "study":
            self.identity = record
        elif kind == "asked":
            candidate = Candidate.from_record(record["candidate"])
            self.candidates[candidate.number] = candidate
            self.asked_after[candidate.number] = record["asked_after"]
            self.asked_at[candidate.number] = record["at"]
            self.num_done = 0  # a larger budget opened the study again
        elif kind == "finished":
            self.finished[record["trial"]] = record
        elif kind == "scored":
            self.scored[record["role"], record["trial"]] = record
        elif kind == "winner":
            if self.winner is not None:
                self.earlier_winners.add(self.winner)
            self.winner = record["trial"]
        elif kind == "published":
            self.published = record
        elif kind == "done":
            self.num_done = record["trials"]
        else:
            raise StudyError(f"the journal has a record of kind {kind!r}, which this version of remelt does not know")

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

    def score(self, number: int) -> float | None:
        """A trial's score on search items."""
        score: float | None = self.finished.get(number, {}).get("score")
        return score

    @property
    def ranking(self) -> list[int]:
        """Complete trials, best first; of equal scores the earlier trial, so that simpler candidates win ties."""
        scores = {number: score for number in self.finished if (score := self.score(number)) is not None}
        return sorted(scores, key=lambda number: (-scores[number], number))

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
        scores = {number: self.scored["selection", number]["score"] for number in finalists}
        ranked = sorted((number for number in finalists if scores[number] is not None), key=lambda n: (-scores[n], n))
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
            score=record.get("score"),
        )


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """What a `finished` or `scored` record keeps of an outcome; the samples are in the reports."""
    report = outcome.report if outcome.report is not None and outcome.report.is_ok else None
    return {
        "state": str(TrialState.FAILED if report is None else TrialState.COMPLETE),
        "score": None if report is None else objective(report),
        "abilities": {} if report is None else ability_values(report),
        "failure": outcome.failure,
        "digest": outcome.digest,
        "candidate_id": outcome.candidate_id,
        "evaluation_id": None if outcome.report is None else outcome.report.evaluation_id,
        "merge_seconds": round(outcome.merge_seconds, 3),
        "seconds": round(outcome.seconds, 3),
    }


def ability_values(report: EvalReport) -> Mapping[str, float]:
    """Each entry's value by ability, with its metric where an ability has several."""
    names = [task.ability for task in report.tasks]
    return {
        task.ability if names.count(task.ability) == 1 else f"{task.ability} {task.metric}": task.value
        for task in report.tasks
    }
