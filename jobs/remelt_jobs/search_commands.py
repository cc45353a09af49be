"""Commands that run models: evaluate, search, demo."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from remelt.errors import EvaluationError


class RoleName(StrEnum):
    """Whose items a checkpoint is scored on."""

    SEARCH = "search"
    SELECTION = "selection"
    REPORT = "report"


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A path or Hub id.")],
    suite: Annotated[str, typer.Option("--suite", help="Suite in YAML, or `zoo`.")],
    reports: Annotated[Path, typer.Option("--reports", help="Directory of the Parquet tables.")],
    role: Annotated[RoleName, typer.Option("--role", help="Whose items.")] = RoleName.REPORT,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many items of each task.")] = None,
    backend: Annotated[
        str, typer.Option("--backend", help="hf, lm_eval (see --model), or dummy (random answers, to try a suite).")
    ] = "hf",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Any lm-eval model type: vllm, local-completions... (backend lm_eval)."),
    ] = None,
    model_args: Annotated[
        list[str] | None,
        typer.Option("--model-arg", help="NAME=VALUE for the model type; {checkpoint} is the folder. Repeat for more."),
    ] = None,
    interpreter: Annotated[
        str | None,
        typer.Option("--python", help="Interpreter of another environment that has remelt and the model type."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder of evaluations by id: what is there is not scored again.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds for the evaluation.")] = None,
) -> None:
    """Score a checkpoint with lm-eval in a process of its own, and write Parquet reports."""
    from remelt_evals.backends import BackendOptions
    from remelt_evals.eval_report import EvalRequest, objective
    from remelt_evals.evaluation_cache import evaluate_once
    from remelt_evals.evaluator_process import EvaluatorProcess
    from remelt_evals.report_tables import write_evaluation
    from remelt_jobs.candidates import open_for_evaluation
    from remelt_jobs.study_config import suite_path
    from remelt_jobs.tables import print_table

    for folder in (reports, cache):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise EvaluationError(f"{folder} is a file, a folder belongs there; choose another")
    opened = open_for_evaluation(checkpoint)
    request = EvalRequest(
        checkpoint=str(opened.path),
        digest=opened.digest,
        suite=str(suite_path(suite)),
        role=role.value,
        limit=limit,
    )
    options = BackendOptions(
        name="lm_eval" if model else backend, device=device, model=model, model_args=_read_arguments(model_args or [])
    )
    with EvaluatorProcess(options, interpreter=interpreter, timeout_seconds=timeout) as evaluator:
        report = evaluate_once(evaluator, request, cache)
    paths = write_evaluation(reports, report)
    if not report.is_ok:
        raise EvaluationError(f"{checkpoint}: {report.error}; the failure is recorded in {paths[0]}")
    print_table(
        ["ability", "eval task", "metric", "score", "stderr", "items"],
        [[task.ability, task.task, task.metric, task.value, task.stderr, task.n] for task in report.tasks],
    )
    print(f"objective {objective(report):.4f} on {role.value} items in {report.seconds:.1f} s")
    for note in report.notes:
        print(f"note: {note}")
    for path in paths:
        print(f"wrote {path}")


def _read_arguments(pairs: list[str]) -> dict[str, object]:
    """NAME=VALUE pairs; values as YAML reads them, so that numbers and booleans are such."""
    from remelt.strict_config import parse_yaml

    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise EvaluationError(f"--model-arg {pair!r}: expected NAME=VALUE, such as dtype=bfloat16")
        arguments[name.strip()] = parse_yaml(value, where=f"--model-arg {name}", error=EvaluationError)
    return arguments


def search(
    study: Annotated[Path, typer.Argument(help="Study in YAML: recipe, suite, searcher, budget, evaluators.")],
    output: Annotated[Path, typer.Option("--output", help="Directory of the study, its best merge and reports.")],
    takeover: Annotated[bool, typer.Option("--takeover", help="Take the study from a driver that is gone.")] = False,
) -> None:
    """Search the ranges of a recipe by the scores of its merges. Run it again to resume."""
    from remelt_jobs.study import run_study
    from remelt_jobs.study_config import load_study
    from remelt_jobs.study_report import TerminalStudyProgress, print_study

    result = run_study(load_study(study), output, takeover=takeover, progress=TerminalStudyProgress())
    print_study(result)


def demo(
    output: Annotated[Path, typer.Option("--output", help="Where the demo writes.")] = Path("remelt-demo"),
) -> None:
    """Search a merge of the shipped checkpoints from end to end: under three minutes on two cores."""
    from remelt_jobs.demo import run_demo

    run_demo(output)
