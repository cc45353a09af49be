"""Comparison within reports: sides are found by every name they have, and refused unless the items are the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from remelt.errors import EvaluationError
from remelt_evals.paired import compare
from remelt_evals.report_comparing import ReportComparison, choose_one, compare_in_reports, find_evaluations
from remelt_evals.report_reading import read_evaluations, read_trials, with_samples
from remelt_evals.report_tables import write_evaluation
from study_reports import NUM_ITEMS, STUDY_ID, WINNER, make_report, write_study


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_study(folder)
    return folder


def compared(reports: Path, a: str, b: str, **options: object) -> ReportComparison:
    evaluations = read_evaluations(reports)
    trials = read_trials(reports, STUDY_ID, evaluations)
    return compare_in_reports(
        reports, evaluations, a, b, trials=trials, study_id=STUDY_ID, num_resamples=500, **options
    )  # type: ignore[arg-type]


def test_the_difference_is_that_of_the_paired_bootstrap_on_the_reports_themselves(reports: Path) -> None:
    found = compared(reports, "uniform", "best")
    assert (found.a.context.label, found.b.context.label) == ("uniform", f"trial {WINNER}")
    direct = compare(with_samples(reports, found.a), with_samples(reports, found.b), num_resamples=500)
    assert found.macro == direct.macro
    assert tuple(task.difference for task in found.tasks) == direct.abilities
    assert found.macro is not None and found.macro.is_better


@pytest.mark.parametrize(
    "name", [f"trial {WINNER}", str(WINNER), f"c{WINNER}aaaa", "6rep5eed", f"w{WINNER}ddd", "best"]
)
def test_a_trial_is_found_by_label_number_candidate_evaluation_and_digest(reports: Path, name: str) -> None:
    assert compared(reports, "uniform", name).b.context.trial_number == WINNER


def test_lost_and_won_items_are_counted_and_shown(reports: Path) -> None:
    found = compared(reports, "best", "math")
    words, prose = found.tasks
    # Of 40 words the winner has the first 28 right, math the first 16.
    assert (words.num_lost, words.num_won) == (12, 0)
    assert [flip.doc_id for flip in words.examples] == [16, 17, 18, 19, 20]
    assert (words.examples[0].response_a, words.examples[0].response_b) == ("answer 1", "answer 0")
    # Bits per byte: higher is worse, on every item.
    assert (prose.num_lost, prose.num_won) == (NUM_ITEMS, 0)
    assert words.is_worse and prose.is_worse
    back = compared(reports, "math", "best")
    assert [(task.num_lost, task.num_won) for task in back.tasks] == [(0, 12), (0, NUM_ITEMS)]


def test_one_eval_task_can_be_asked_for_by_ability_or_name(reports: Path) -> None:
    for name in ("prose", "prose_report"):
        found = compared(reports, "uniform", "best", task=name)
        assert [task.difference.name for task in found.tasks] == ["prose"]
        assert found.macro is None
    with pytest.raises(EvaluationError, match=r"no eval task 'pros'; did you mean 'prose'"):
        compared(reports, "uniform", "best", task="pros")


def test_the_role_is_kept_and_where_it_is_missing_others_are_named(reports: Path) -> None:
    assert compared(reports, "trial 3", "trial 8", role="search").a.report.role == "search"
    with pytest.raises(EvaluationError, match="trial 3 was not scored on report items, but on search items"):
        compared(reports, "trial 3", "best")


def test_unknown_and_ambiguous_names_are_refused_with_those_that_there_are(reports: Path) -> None:
    with pytest.raises(EvaluationError, match="no evaluation is called 'unifrom'; did you mean 'uniform'"):
        compared(reports, "unifrom", "best")
    twins = [make_report(f"aaaa{n}".ljust(64, "0"), "report", 0.5, digest=f"same{n}") for n in range(2)]
    for twin in twins:
        write_evaluation(reports, twin)
    with pytest.raises(EvaluationError, match=r"'aaaa' may be any of .*give more of its id"):
        find_evaluations(read_evaluations(reports), "aaaa")


def test_other_suites_fidelities_items_and_prompts_are_refused_with_what_differs(tmp_path: Path) -> None:
    report = make_report("a" * 64, "report", 0.5)
    task = report.tasks[0]
    others = {
        "suite digest 5u17e5u17e5u and other": {"suite_digest": "other"},
        "fidelity full and first-8": {"fidelity": "first-8"},
        "1 only the first, 0 only the second, 39 both": {
            "tasks": (dataclasses.replace(task, samples=task.samples[1:], n=task.n - 1), report.tasks[1])
        },
        "1 of 40 items were put to aaaa and bbbb in different prompts": {
            "tasks": (
                dataclasses.replace(
                    task, samples=(dataclasses.replace(task.samples[0], prompt_hash="new"), *task.samples[1:])
                ),
                report.tasks[1],
            )
        },
        "the evaluation of bbbb failed and cannot be compared: NaN": {"status": "failed", "error": "NaN", "tasks": ()},
    }
    for number, (message, changes) in enumerate(others.items()):
        folder = tmp_path / str(number)
        write_evaluation(folder, report)
        write_evaluation(folder, dataclasses.replace(report, evaluation_id="b" * 64, digest="other", **changes))  # type: ignore[arg-type]
        with pytest.raises(EvaluationError, match=message):
            compare_in_reports(folder, read_evaluations(folder), "aaaa", "bbbb")


def test_of_several_fidelities_the_full_one_is_compared(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        for fidelity in ("first-8", "full"):
            evaluation_id = f"{name}{len(fidelity)}".ljust(64, "0")
            report = make_report(
                evaluation_id, "report", 0.4 + 0.1 * number, digest=f"digest-{name}", fidelity=fidelity
            )
            write_evaluation(tmp_path, report)
    found = compare_in_reports(tmp_path, read_evaluations(tmp_path), "digest-a", "digest-b")
    assert found.a.report.fidelity == found.b.report.fidelity == "full"


def test_an_evaluation_among_several_is_not_chosen_by_chance(reports: Path) -> None:
    evaluations = read_evaluations(reports)
    with pytest.raises(EvaluationError, match=r"trial 6 has several evaluations: .*\(search, full\)"):
        choose_one(reports, evaluations, "trial 6", study_id=STUDY_ID)
    chosen = choose_one(reports, evaluations, "trial 6", role="report", study_id=STUDY_ID)
    assert chosen.report.role == "report" and chosen.report.tasks[0].samples
