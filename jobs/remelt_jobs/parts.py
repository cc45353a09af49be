"""A candidate's evaluation in parts: entries of the suite that different evaluators score at the same time.

Every part makes the candidate for itself; the same weights, as their digests say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from remelt.errors import EvaluationError
from remelt_evals.eval_report import join_reports
from remelt_evals.suite import Suite
from remelt_jobs.trial import Outcome, Work


def deal_entries(suite: Suite, num_parts: int) -> tuple[tuple[int, ...], ...]:
    """The suite's entries in parts, in turn; entries that one lm-eval task serves stay together, no part is empty."""
    tasks: dict[tuple[str | None, ...], list[int]] = {}
    for place, entry in enumerate(suite.tasks):
        tasks.setdefault((entry.search, entry.selection, entry.report), []).append(place)
    groups = list(tasks.values())
    dealt = [groups[part::num_parts] for part in range(min(num_parts, len(groups)))]
    return tuple(tuple(sorted(place for group in each for place in group)) for each in dealt)


def split_work(number: int, work: Work, parts: Sequence[tuple[int, ...]]) -> dict[str, Work]:
    """The parts of a candidate's work by key; as it is, where there is one part."""
    if len(parts) == 1:
        return {str(number): work}
    return {f"{number}/{part}": replace(work, entries=entries) for part, entries in enumerate(parts)}


class Gathering:
    """Holds parts until their candidate is whole."""

    def __init__(self, parts: Sequence[tuple[int, ...]]) -> None:
        self._entries = parts
        self._parts: dict[int, dict[int, Outcome]] = {}

    def take(self, outcomes: Mapping[str, Outcome]) -> dict[int, Outcome]:
        """The outcomes of the candidates that these make whole, by number."""
        whole = {}
        for key, outcome in outcomes.items():
            number, _, part = key.partition("/")
            if not part:
                whole[int(number)] = outcome
                continue
            parts = self._parts.setdefault(int(number), {})
            parts[int(part)] = outcome
            if len(parts) == len(self._entries):
                whole[int(number)] = self._join(self._parts.pop(int(number)))
        return whole

    def _join(self, parts: Mapping[int, Outcome]) -> Outcome:
        outcomes = [parts[part] for part in sorted(parts)]
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        reports = {self._entries[part]: outcome.report for part, outcome in parts.items() if outcome.report is not None}
        failure, report = failures[0] if failures else None, None
        if len(reports) == len(parts):
            try:
                report = join_reports(reports)
            except EvaluationError as error:
                failure = failure or str(error)
        return replace(
            outcomes[0],
            report=report,
            failure=failure,
            merge_seconds=sum(outcome.merge_seconds for outcome in outcomes),
            seconds=sum(outcome.seconds for outcome in outcomes),
            where=", ".join(dict.fromkeys(outcome.where for outcome in outcomes if outcome.where)),
        )
