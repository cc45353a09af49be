"""Evaluations kept by evaluation id: the same weights, items, fidelity, backend and versions are scored once.

lm-eval's own caches are not keyed by model, so they are never used. A folder may serve many studies and hosts: files
are whole or absent, and two that write the same id write the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from remelt.errors import EvaluationError
from remelt.receipts import write_file_durably
from remelt_evals.eval_report import EvalReport, EvalRequest, report_from_json, report_to_json


class EvaluationCache:
    """A folder of `<evaluation id>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, evaluation_id: str) -> EvalReport | None:
        """The kept report, or None.

        Raises:
            EvaluationError: the file is damaged.
        """
        path = self._path(evaluation_id)
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            return None
        try:
            report = report_from_json(text)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is damaged ({error}); remove it, and it will be scored again") from error
        if report.evaluation_id != evaluation_id:
            raise EvaluationError(f"{path} holds evaluation {report.evaluation_id[:12]}; remove it")
        return report

    def put(self, report: EvalReport) -> None:
        """Keep a report that has numbers; a failure may be of the moment and is tried again."""
        if not report.is_ok:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file_durably(self._path(report.evaluation_id), report_to_json(report).encode())

    def _path(self, evaluation_id: str) -> Path:
        return self.folder / f"{evaluation_id}.json"


class _Evaluates(Protocol):
    def evaluation_id(self, request: EvalRequest) -> str: ...

    def evaluate(self, request: EvalRequest) -> EvalReport: ...


def evaluate_once(evaluator: _Evaluates, request: EvalRequest, folder: Path | None) -> EvalReport:
    """Evaluate, or take what `folder` has kept of the same evaluation."""
    if folder is None:
        return evaluator.evaluate(request)
    cache = EvaluationCache(folder)
    known = cache.get(evaluator.evaluation_id(request))
    if known is not None:
        return known
    report = evaluator.evaluate(request)
    cache.put(report)
    return report
