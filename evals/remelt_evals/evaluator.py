"""The evaluator: scores one checkpoint after another, in a process of its own."""

from __future__ import annotations

from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest


class Evaluator:
    """Scores checkpoints with lm-eval, one at a time."""

    def __init__(self, options: BackendOptions) -> None:
        raise NotImplementedError

    def evaluation_id(self, request: EvalRequest) -> str:
        """The id that `evaluate` would put on its report, without evaluating."""
        raise NotImplementedError

    def evaluate(self, request: EvalRequest) -> EvalReport:
        """Score a checkpoint."""
        raise NotImplementedError
