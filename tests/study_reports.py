"""Reports of a small study, written by the real writers: two parents, their uniform merge, trials of a search."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from remelt_evals.eval_report import EvalReport, Role, SampleScore, TaskReport, objective
from remelt_evals.report_tables import ParentRow, RunContext, TrialRow, write_evaluation, write_trials
from remelt_evals.resampling import standard_error

STUDY_ID = "5eed" * 16
BEGAN = datetime(2026, 11, 20, 23, 30, tzinfo=UTC)
NUM_ITEMS = 40
LABELS = ("math", "code", "uniform", *(f"trial {number}" for number in range(3, 9)))
WINNER = 6
"""Best on selection items; trial 8 is better on search items."""


def make_task(ability: str, role: Role, scores: Sequence[float], *, num_items: int = NUM_ITEMS) -> TaskReport:
    """`words` is accuracy, anything else bits per byte."""
    is_accuracy = ability == "words"
    samples = tuple(
        SampleScore(
            doc_id=place,
            doc_hash=f"{ability} {role} {place}",
            prompt_hash=f"prompt {place}",
            target_hash=f"target {place}",
            score=float(score),
            weight=1.0 if is_accuracy else 20.0 + place % 7,
            correct=bool(score) if is_accuracy else None,
            target=str(place % 2),
            response=f"answer {int(score)}" if is_accuracy else "",
            loglik=(-1.0, -2.0) if is_accuracy else (-30.0,),
            doc_json=json.dumps({"question": f"item {place}"}),
            arguments_json="[]",
        )
        for place, score in enumerate(scores)
    )
    weights = np.array([sample.weight for sample in samples])
    aggregation = "mean" if is_accuracy else "weighted_mean"
    return TaskReport(
        ability=ability,
        task=f"{ability}_{role}",
        task_version="1.0",
        metric="acc" if is_accuracy else "bits_per_byte",
        filter="none",
        value=float(np.average(scores, weights=weights)),
        stderr=standard_error(np.array(scores, np.float64), weights, aggregation, 50),
        n=len(scores),
        n_total=num_items,
        higher_is_better=is_accuracy,
        weight=1.0,
        num_fewshot=0,
        aggregation=aggregation,
        samples=samples,
    )


def make_report(evaluation_id: str, role: Role, skill: float, **changes: object) -> EvalReport:
    """An evaluation of a checkpoint: the first `skill` of the words are right, prose gets better with it."""
    rng = np.random.default_rng(0)
    words = [float(place < skill * NUM_ITEMS) for place in range(NUM_ITEMS)]
    prose = 2.0 - skill + 0.3 * rng.random(NUM_ITEMS)
    fields = {
        "evaluation_id": evaluation_id,
        "checkpoint": f"/pool/{evaluation_id[:8]}",
        "digest": f"digest-{evaluation_id[:8]}",
        "suite": "tiny",
        "suite_digest": "5u17e" * 8,
        "role": role,
        "fidelity": "full",
        "backend": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "versions": {"lm-eval": "0.4.13", "torch": "2.13.0", "transformers": "5.23.0"},
        "tasks": (make_task("words", role, words), make_task("prose", role, list(prose))),
        "started_at": BEGAN.isoformat(),
        "seconds": 2.5,
    }
    return EvalReport(**fields | changes)  # type: ignore[arg-type]


def write_study(reports: Path, study_id: str = STUDY_ID) -> list[TrialRow]:
    """Nine trials: trial 7 failed; search, selection (for finalists) and report items, as a study writes them."""
    skills = {0: 0.4, 1: 0.45, 2: 0.55, 3: 0.3, 4: 0.5, 5: 0.6, 6: 0.7, 8: 0.75}
    trials = []
    for number, label in enumerate(LABELS):
        at = BEGAN + timedelta(minutes=7 * number)
        trial_id = f"{study_id}-{number}"
        values = {"w_math": 0.1 * number, "w_code": 1 - 0.1 * number}
        origin = "uniform" if label == "uniform" else "parent" if number < 2 else "searcher"
        row = TrialRow(
            trial_id=trial_id,
            trial_number=number,
            state="FAILED" if number not in skills else "COMPLETE",
            label=label,
            origin=origin,
            coefficients=values,
            error=None if number in skills else "the evaluator was killed",
            started_at=at,
            finished_at=at + timedelta(minutes=3),
            seconds=180.0,
            is_winner=number == WINNER,
        )
        if number in skills:
            row = dataclasses.replace(row, **_scored(reports, study_id, row, skills[number]))
        trials.append(row)
    write_trials(reports, study_id, trials, study_started_at=BEGAN)
    return trials


def _scored(reports: Path, study_id: str, row: TrialRow, skill: float) -> dict[str, object]:
    number = row.trial_number
    roles: list[Role] = ["search"]
    roles += ["selection"] if number in (2, 6, 8) else []
    roles += ["report"] if number in (0, 1, 2, WINNER) else []
    ids = []
    for role in roles:
        # On selection items the best of the search does worse than the winner.
        own = skill - 0.1 if role == "selection" and number == 8 else skill
        report = make_report(
            f"{number:x}{role[:3]}{study_id[:4]}".ljust(64, "0"),
            role,
            own,
            digest=f"w{number}" + "d" * 62,
            started_at=(row.started_at or BEGAN).isoformat(),
        )
        context = RunContext(
            study_id=study_id,
            trial_id=row.trial_id,
            trial_number=number,
            candidate_id=None if row.origin == "parent" else f"c{number}" + "a" * 62,
            recipe_json=None if row.origin == "parent" else recipe_json(row.coefficients or {}),
            parents=(ParentRow("./math", None, "dm"), ParentRow("./code", None, "dc")),
            coefficients=row.coefficients,
            label=row.label,
            host="node-1",
        )
        write_evaluation(reports, report, context)
        ids.append(report.evaluation_id)
        if role == "search":
            search = report
    return {"evaluation_ids": tuple(ids), "score": objective(search), "candidate_id": context.candidate_id}


def recipe_json(values: object) -> str:
    """A bound recipe whose `code` fades in over the layers."""
    assert isinstance(values, dict)
    models = [
        {"model": "./math", "name": "math", "parameters": {"weight": values["w_math"]}},
        {"model": "./code", "name": "code", "parameters": {"weight": [0.0, values["w_code"]]}},
    ]
    return json.dumps({"merge_method": "task_arithmetic", "base_model": "./base", "models": models})
