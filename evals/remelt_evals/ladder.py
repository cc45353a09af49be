"""A fidelity ladder: score few items first, and go on to more only while the candidate may still be the best.

A rung is a limit on the items of each eval task. After each rung but the last, the candidate is compared with the best
complete trial so far on the very items that both answered (paired bootstrap); where its 95 % interval lies below zero
it stops there. What it would have scored is then estimated as the incumbent's full score plus the paired difference,
which takes the luck of the items out (a control variate).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, objective
from remelt_evals.paired import Comparison, compare

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """What a stopped candidate is expected to score on all items."""

    score: float
    values: tuple[float, ...]
    """Of the suite's entries, higher is better."""


def is_worse(comparison: Comparison, *, on_every_entry: bool) -> bool:
    """Whether B is clearly worse than A: on the macro average or, for several objectives, on every entry."""
    if on_every_entry:
        return all(ability.high < 0 for ability in comparison.abilities)
    return comparison.macro.high < 0


def stop_early(incumbent: EvalReport, report: EvalReport, *, on_every_entry: bool = False) -> Estimate | None:
    """The estimate where a candidate is to stop after this rung, else None.

    Args:
        incumbent: the best complete trial so far, on all items.
        report: the candidate's, on a rung's.
        on_every_entry: stop only what is worse on every entry.
    """
    try:
        comparison = compare(incumbent, report, num_resamples=NUM_RESAMPLES)
    except EvaluationError:
        return None  # nothing to compare item by item: such metrics are decided on all items
    if not is_worse(comparison, on_every_entry=on_every_entry):
        return None
    values = tuple(
        task.oriented_value + ability.difference
        for task, ability in zip(incumbent.tasks, comparison.abilities, strict=True)
    )
    return Estimate(objective(incumbent) + comparison.macro.difference, values)


def without_texts(report: EvalReport) -> EvalReport:
    """The report with what a comparison needs: scores and weights of items, not what was asked and said."""
    return replace(
        report,
        tasks=tuple(
            replace(
                task,
                samples=tuple(
                    replace(sample, doc_json="", arguments_json="", response="", target="", loglik=())
                    for sample in task.samples
                ),
            )
            for task in report.tasks
        ),
    )


def rungs_of(limits: Iterable[int]) -> tuple[int | None, ...]:
    """The limits in ascending order, then all items."""
    return (*sorted(set(limits)), None)
