"""From lm-eval's result of one eval task to a `TaskReport`.

lm-eval reports mixed dictionaries, standard errors as numbers or "N/A", and none at all for rates per byte. Here every
item gets a score and a weight, from which the value can be computed again, so that standard errors and paired
comparisons need nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from remelt.errors import EvaluationError
from remelt_evals.eval_report import Aggregation, SampleScore, TaskReport, number_or_none
from remelt_evals.resampling import standard_error
from remelt_evals.suite import SuiteTask

# lm-eval metrics whose item score is (log-likelihood in nats, bytes or words), with the unit of the score per item.
_RATE_METRICS: Mapping[str, tuple[Aggregation, float]] = {
    "bits_per_byte": ("weighted_mean", math.log(2)),
    "byte_perplexity": ("exp_weighted_mean", 1.0),
    "word_perplexity": ("exp_weighted_mean", 1.0),
}


def find_metric(entry: SuiteTask, task: str, results: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, filter) of a suite's entry among the keys `metric,filter` of lm-eval's results.

    Raises:
        EvaluationError: the eval task has no such metric, or several filters and the suite names none.
    """
    keys = [key for key in results if "," in key and not key.partition(",")[0].endswith("_stderr")]
    matches = [key for key in keys if entry.metric in (key, key.partition(",")[0])]
    if len(matches) == 1:
        metric, _, filter_name = matches[0].partition(",")
        return metric, filter_name
    if matches:
        raise EvaluationError(f"eval task {task} has {entry.metric} under several filters: say {' or '.join(matches)}")
    known = sorted({key.partition(",")[0] for key in keys})
    raise EvaluationError(f"eval task {task} has no metric {entry.metric!r}: it has {', '.join(known)}")


def report_task(entry: SuiteTask, task: str, lm_task: Any, outcome: Mapping[str, Any]) -> TaskReport:
    """One entry of a suite, from what `lm_eval.evaluator.evaluate` returned.

    Args:
        lm_task: the lm-eval task object that ran.
        outcome: lm-eval's whole result.

    Raises:
        EvaluationError: the metric does not exist.
        ArithmeticError: a log-likelihood or the value is not a number; the message says how many and where.
    """
    results = outcome["results"][task]
    metric, filter_name = find_metric(entry, task, results)
    raw_samples = [sample for sample in outcome["samples"][task] if sample["filter"] == filter_name]
    _refuse_nan(task, raw_samples)
    aggregation = _aggregation(metric, lm_task)
    samples = tuple(_sample_score(sample, metric, aggregation) for sample in raw_samples)
    value = number_or_none(results[f"{metric},{filter_name}"])
    if value is None:
        raise ArithmeticError(f"{metric} of eval task {task} is {results[f'{metric},{filter_name}']}")
    scores = [sample.score for sample in samples]
    stderr = number_or_none(results.get(f"{metric}_stderr,{filter_name}"))
    if aggregation != "other" and None not in scores:
        weights_N = np.array([sample.weight for sample in samples], dtype=np.float64)
        stderr = standard_error(np.array(scores, dtype=np.float64), weights_N, aggregation)
    return TaskReport(
        ability=entry.ability,
        task=task,
        task_version=str(outcome["versions"].get(task, "")),
        metric=metric,
        filter=filter_name,
        value=value,
        stderr=stderr,
        n=len(samples),
        n_total=int(outcome["n-samples"][task]["original"]),
        higher_is_better=bool(outcome["higher_is_better"][task].get(metric, True)),
        weight=entry.weight,
        num_fewshot=int(outcome["n-shot"].get(task) or 0),
        aggregation=aggregation,
        samples=samples,
    )


def _aggregation(metric: str, lm_task: Any) -> Aggregation:
    if metric in _RATE_METRICS:
        return _RATE_METRICS[metric][0]
    name = getattr(lm_task.aggregation().get(metric), "__name__", "")
    # lm-eval takes the mean of a metric that names no aggregation.
    by_name: dict[str, Aggregation] = {"mean": "mean", "": "mean", "perplexity": "exp_weighted_mean"}
    return by_name.get(name, "other")


def _sample_score(sample: Mapping[str, Any], metric: str, aggregation: Aggregation) -> SampleScore:
    raw = sample.get(metric)
    score, weight = _score_and_weight(raw, metric, aggregation)
    loglik = _logliks(sample["resps"])
    return SampleScore(
        doc_id=int(sample["doc_id"]),
        doc_hash=sample["doc_hash"],
        prompt_hash=sample["prompt_hash"],
        target_hash=sample["target_hash"],
        score=score,
        weight=weight,
        correct=bool(score) if aggregation == "mean" and score in (0.0, 1.0) else None,
        target=str(sample["target"]),
        response=_response(sample, loglik),
        loglik=tuple(number_or_none(value) for value in loglik),
        doc_json=_as_json(sample["doc"]),
        arguments_json=_as_json(sample["arguments"]),
    )


def _score_and_weight(raw: Any, metric: str, aggregation: Aggregation) -> tuple[float | None, float]:
    if metric in _RATE_METRICS:
        loglik, amount = raw
        # An item without a byte or word says nothing; weight 0 keeps it out of every mean.
        return (-loglik / (amount * _RATE_METRICS[metric][1]), float(amount)) if amount else (0.0, 0.0)
    if aggregation == "exp_weighted_mean":
        return -float(raw), 1.0
    if aggregation == "mean":
        return number_or_none(raw), 1.0
    return None, 1.0


def _logliks(responses: Sequence[Any]) -> list[float]:
    """The log-likelihood of each request of an item; empty for generated text."""
    values = []
    for repeats in responses:
        first = repeats[0]
        value = first[0] if isinstance(first, tuple | list) else first
        if isinstance(value, str):
            return []
        values.append(float(value))
    return values


def _response(sample: Mapping[str, Any], loglik: Sequence[float]) -> str:
    arguments = sample["arguments"]
    if not loglik:
        return str(sample["filtered_resps"][0])
    if len(arguments[0]) < 2:
        return ""
    return str(arguments[int(np.argmax(loglik))][1])


def _refuse_nan(task: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """A NaN log-likelihood loses no argmax: the first choice wins, and the score looks like any other."""
    bad = [sample["doc_id"] for sample in samples if any(math.isnan(value) for value in _logliks(sample["resps"]))]
    if bad:
        raise ArithmeticError(
            f"{len(bad)} of {len(samples)} items of eval task {task} have log-likelihoods that are not a number "
            f"(first: item {bad[0]})"
        )


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
