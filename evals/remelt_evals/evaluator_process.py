"""An evaluator in a child process."""

from __future__ import annotations

from types import TracebackType

from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest


class EvaluatorProcess:
    """An `Evaluator` in a child process, replaced when it fails, hangs or grows."""

    def __init__(
        self,
        options: BackendOptions,
        *,
        interpreter: str | None = None,
        timeout_seconds: float | None = None,
        memory_limit_bytes: int | None = None,
        growth_limit_bytes: int | None = None,
        max_evaluations: int | None = None,
    ) -> None:
        raise NotImplementedError

    def evaluation_id(self, request: EvalRequest) -> str:
        raise NotImplementedError

    def evaluate(self, request: EvalRequest) -> EvalReport:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> EvaluatorProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
