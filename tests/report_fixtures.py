"""Evaluations made of item scores, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remelt_evals.eval_report import Aggregation, EvalReport, SampleScore, TaskReport


def make_task(
    name: str, scores: Sequence[float], *, aggregation: Aggregation = "mean", higher: bool = True, weight: float = 1.0
) -> TaskReport:
    samples = tuple(
        SampleScore(
            doc_id=place,
            doc_hash=f"{name}{place}",
            prompt_hash="",
            target_hash="",
            score=float(score),
            weight=1.0 if aggregation == "mean" else 10.0 + place % 7,
            correct=None,
            target="",
            response="",
            loglik=(),
            doc_json="",
            arguments_json="",
        )
        for place, score in enumerate(scores)
    )
    weights = [sample.weight for sample in samples]
    value = float(np.average(scores, weights=weights))
    return TaskReport(
        ability=name,
        task=name,
        task_version="1",
        metric="m",
        filter="none",
        value=float(np.exp(value)) if aggregation == "exp_weighted_mean" else value,
        stderr=None,
        n=len(scores),
        n_total=len(scores),
        higher_is_better=higher,
        weight=weight,
        num_fewshot=0,
        aggregation=aggregation,
        samples=samples,
    )


def make_report(*tasks: TaskReport, **changes: object) -> EvalReport:
    fields = {
        "evaluation_id": "e",
        "checkpoint": "c",
        "digest": "d",
        "suite": "s",
        "suite_digest": "sd",
        "role": "report",
        "fidelity": "full",
        "backend": "dummy",
        "device": "cpu",
        "dtype": "none",
        "tasks": tasks,
        "started_at": "2026-11-21T00:00:00+00:00",
        "seconds": 1.0,
    }
    return EvalReport(**fields | changes)  # type: ignore[arg-type]
