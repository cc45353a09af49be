"""Export: what lm-eval itself reports for the same run, key by key."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest
from remelt_evals.evaluator import Evaluator
from remelt_evals.report_export import lm_eval_results
from remelt_evals.report_reading import Evaluation, read_evaluations, with_samples
from remelt_evals.report_tables import RunContext, write_evaluation
from study_reports import make_report

DIGEST = "d" * 64

_UNKNOWN = {
    *("chat_template", "chat_template_sha", "system_instruction", "system_instruction_sha", "fewshot_as_multiturn"),
    *("start_time", "end_time", "model_source", "model_name_sanitized"),
}
"""What lm-eval's tracker says of its own command and a report does not."""


@pytest.fixture(scope="module")
def report(suite_path: Path) -> EvalReport:
    request = EvalRequest(checkpoint="/pool/x", digest=DIGEST, suite=str(suite_path), role="report", limit=7)
    return Evaluator(BackendOptions(name="dummy")).evaluate(request)


@pytest.fixture(scope="module")
def theirs(suite_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval's own tracker writes for the same model, items and metrics."""
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers import EvaluationTracker

    from remelt_evals.dummy_backend import load
    from remelt_evals.lm_tasks import TaskBuilder
    from remelt_evals.suite import load_suite

    folder = tmp_path_factory.mktemp("lm_eval")
    tasks = TaskBuilder(str(folder / "cache")).build(load_suite(suite_path), "report")
    # `simple_evaluate` would add what is around the run (hardware, packages), which takes long to find out.
    outcome = evaluate(
        lm=load(DIGEST).lm,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=7,
        bootstrap_iters=100,
        log_samples=True,
    )
    samples = outcome.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder / "out"))
    tracker.general_config_tracker.log_experiment_args("dummy", "", "", "", None)
    tracker.save_results_aggregated(results=outcome, samples=samples)
    (path,) = (folder / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def ours(report: EvalReport, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exported from what the tables hold."""
    folder = tmp_path_factory.mktemp("reports")
    write_evaluation(folder, report)
    (evaluation,) = read_evaluations(folder)
    exported = lm_eval_results(dataclasses.replace(evaluation, report=with_samples(folder, evaluation)))
    found: dict[str, Any] = json.loads(json.dumps(exported, allow_nan=False))
    return found


def test_every_key_is_one_of_lm_evals(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    from lm_eval.result_schema import EvalResults

    known = {*EvalResults.__annotations__, *theirs}
    assert ours.keys() - known == {"remelt"}
    assert theirs.keys() - ours.keys() <= {"groups", *_UNKNOWN}
    assert {
        "results",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
        "date",
    } <= ours.keys()


@pytest.mark.parametrize("key", ["versions", "n-shot", "n-samples", "group_subtasks", "task_hashes"])
def test_what_both_know_is_equal(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours[key] == theirs[key]


def test_scores_and_closed_form_errors_are_lm_evals(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    words, prose = ours["results"]["words_report"], ours["results"]["prose_report"]
    assert {"name", "alias", "sample_len", "acc,none", "acc_stderr,none"} == words.keys()
    for key, value in words.items():
        expected = theirs["results"]["words_report"][key]
        assert value == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)
    their_prose = theirs["results"]["prose_report"]
    assert prose["bits_per_byte,none"] == pytest.approx(their_prose["bits_per_byte,none"], rel=1e-12)
    # lm-eval has no error for rates; we do.
    assert their_prose["bits_per_byte_stderr,none"] == "N/A"
    assert prose["bits_per_byte_stderr,none"] > 0


def test_configs_say_what_theirs_say(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for task, config in ours["configs"].items():
        assert config["num_fewshot"] == theirs["configs"][task]["num_fewshot"]
        assert config["metadata"].items() <= theirs["configs"][task]["metadata"].items()
        (metric,) = config["metric_list"]
        assert metric["metric"] in [one["metric"] for one in theirs["configs"][task]["metric_list"]]
        assert ours["higher_is_better"][task].items() <= theirs["higher_is_better"][task].items()
    assert ours["config"]["limit"] == 7
    assert ours["lm_eval_version"] == version("lm-eval")


def test_a_failed_evaluation_has_nothing_to_export() -> None:
    failed = make_report("e" * 64, "report", 0.5, status="failed", error="NaN", tasks=())
    with pytest.raises(EvaluationError, match="failed and has no results: NaN"):
        lm_eval_results(Evaluation(failed, RunContext()))


def test_bits_per_byte_carry_their_own_standard_error(tmp_path: Path) -> None:
    """The zoo's suite in bits per byte: the bootstrap agrees with the error of a ratio of means."""
    import numpy as np

    from remelt_evals import zoo

    request = EvalRequest(checkpoint="x", digest=DIGEST, suite=str(zoo.bits_suite_path()), role="report", limit=60)
    write_evaluation(tmp_path, Evaluator(BackendOptions(name="dummy")).evaluate(request))
    (evaluation,) = read_evaluations(tmp_path)
    for task in with_samples(tmp_path, evaluation).tasks:
        assert task.metric == "bits_per_byte" and task.stderr is not None
        weights_N = np.array([sample.weight for sample in task.samples])
        scores_N = np.array([sample.score for sample in task.samples], np.float64)
        residuals_N = weights_N * (scores_N - task.value)
        delta_method = residuals_N.std(ddof=1) / np.sqrt(len(scores_N)) / weights_N.mean()
        assert task.stderr == pytest.approx(delta_method, rel=0.15)
