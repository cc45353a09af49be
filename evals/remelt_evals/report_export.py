"""An evaluation in the shape of lm-eval's own results file, for tools that read that.

What lm-eval 0.4.13 writes and a report does not know (the eval task's prompts, tokenizer, hardware) is left out, never
made up. A suite scores one metric of each eval task, so there is one here. Standard errors are ours: rates per byte
have one, where lm-eval says "N/A". What lm-eval has no place for stands under `remelt`.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

from remelt.errors import EvaluationError
from remelt_evals.eval_report import TaskReport
from remelt_evals.report_reading import Evaluation

# What lm-eval writes where it has no standard error.
_MISSING = "N/A"


def lm_eval_results(evaluation: Evaluation) -> dict[str, Any]:
    """The results of an evaluation as lm-eval's `results_<time>.json` has them.

    Args:
        evaluation: with samples, for lm-eval's hash of each eval task's items.

    Raises:
        EvaluationError: the evaluation failed.
    """
    report = evaluation.report
    if not report.is_ok:
        raise EvaluationError(f"evaluation {report.evaluation_id[:12]} failed and has no results: {report.error}")
    tasks: dict[str, list[TaskReport]] = {}
    for task in report.tasks:
        tasks.setdefault(task.task, []).append(task)
    return {
        "results": {name: _result(name, own) for name, own in tasks.items()},
        "group_subtasks": {},
        "configs": {name: _config(own[0]) for name, own in tasks.items()},
        "versions": {name: _version(own[0].task_version) for name, own in tasks.items()},
        "n-shot": {name: own[0].num_fewshot for name, own in tasks.items()},
        "higher_is_better": {name: {task.metric: task.higher_is_better for task in own} for name, own in tasks.items()},
        "n-samples": {name: {"original": own[0].n_total, "effective": own[0].n} for name, own in tasks.items()},
        "config": {
            "model": report.backend,
            "model_args": {"pretrained": report.checkpoint, "dtype": report.dtype},
            "device": report.device,
            "limit": None if report.fidelity == "full" else int(report.fidelity.removeprefix("first-")),
        },
        "git_hash": evaluation.context.git_commit,
        "date": datetime.fromisoformat(report.started_at).timestamp(),
        "transformers_version": report.versions.get("transformers"),
        "lm_eval_version": report.versions.get("lm-eval"),
        "task_hashes": {name: _task_hash(own) for name, own in tasks.items() if own[0].samples},
        "model_name": report.checkpoint,
        "total_evaluation_time_seconds": str(report.seconds),
        "remelt": {
            "evaluation_id": report.evaluation_id,
            "digest": report.digest,
            "suite": report.suite,
            "suite_digest": report.suite_digest,
            "role": report.role,
            "notes": list(report.notes),
        },
    }


def _result(name: str, tasks: list[TaskReport]) -> dict[str, Any]:
    result: dict[str, Any] = {"name": name, "alias": name, "sample_len": tasks[0].n}
    for task in tasks:
        result[f"{task.metric},{task.filter}"] = task.value
        result[f"{task.metric}_stderr,{task.filter}"] = _MISSING if task.stderr is None else task.stderr
    return result


def _config(task: TaskReport) -> dict[str, Any]:
    return {
        "task": task.task,
        "num_fewshot": task.num_fewshot,
        "metric_list": [{"metric": task.metric, "higher_is_better": task.higher_is_better}],
        "metadata": {"version": _version(task.task_version)},
    }


def _version(text: str) -> float | str:
    """lm-eval has versions as the eval task's file writes them, mostly as a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _task_hash(tasks: list[TaskReport]) -> str:
    """lm-eval's hash over the hashes of all items."""
    samples = tasks[0].samples
    hashes = "".join(sample.doc_hash + sample.prompt_hash + sample.target_hash for sample in samples)
    return hashlib.sha256(hashes.encode()).hexdigest()
