"""Reports come back as they were written, and what trials leave out is found in their evaluations."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from remelt.errors import EvaluationError
from remelt_evals.eval_report import macro_standard_error, objective
from remelt_evals.report_reading import (
    NO_STUDY,
    choose_study,
    evaluations_named,
    find_reports,
    is_complete,
    list_studies,
    read_evaluations,
    read_trials,
    with_samples,
)
from remelt_evals.report_tables import TrialRow, write_evaluation, write_trials
from study_reports import BEGAN, STUDY_ID, WINNER, make_report, write_study


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "reports"
    write_study(folder)
    write_evaluation(folder, make_report("e" * 64, "report", 0.5))
    return folder


def test_a_report_comes_back_equal_samples_and_all(reports: Path) -> None:
    report = make_report("e" * 64, "report", 0.5)
    (found,) = read_evaluations(reports, study_id=NO_STUDY)
    assert dataclasses.replace(found.report, tasks=()) == dataclasses.replace(report, tasks=())
    assert with_samples(reports, found).tasks == report.tasks
    assert all(task.samples == () for task in found.report.tasks)


def test_the_folder_of_the_tables_is_found_from_a_studys_output(reports: Path, tmp_path: Path) -> None:
    assert find_reports(reports) == find_reports(reports.parent) == reports
    with pytest.raises(EvaluationError, match="holds no reports"):
        find_reports(tmp_path)
    with pytest.raises(EvaluationError, match="is no folder"):
        find_reports(tmp_path / "nowhere")


def test_the_last_study_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    assert choose_study(tmp_path) is None
    for number, study in enumerate(("abc", "abd", "xyz")):
        began = BEGAN - timedelta(days=number)
        row = TrialRow(trial_id=f"{study}-0", trial_number=0, state="RUNNING", started_at=began)
        write_trials(tmp_path, study, [row], study_started_at=began)
    assert [entry.study_id for entry in list_studies(tmp_path)] == ["xyz", "abd", "abc"]
    assert choose_study(tmp_path) == "abc"
    assert choose_study(tmp_path, "x") == "xyz"
    with pytest.raises(EvaluationError, match="several begin so; there are abc, abd"):
        choose_study(tmp_path, "ab")
    with pytest.raises(EvaluationError, match="none begins so"):
        choose_study(tmp_path, "q")


def test_trials_take_errors_and_places_from_their_evaluations_on_search_items(reports: Path) -> None:
    evaluations = read_evaluations(reports, study_id=STUDY_ID)
    trials = read_trials(reports, STUDY_ID, evaluations)
    assert [trial.trial_number for trial in trials] == list(range(9))
    by_id = {one.report.evaluation_id: one.report for one in evaluations}
    for trial in trials:
        if trial.state == "FAILED":
            assert (trial.score, trial.standard_error, trial.host) == (None, None, None)
            continue
        report = by_id[trial.evaluation_ids[0]]
        assert report.role == "search"
        assert trial.score == pytest.approx(objective(report))
        assert trial.standard_error == macro_standard_error(report)
        assert trial.scores == {task.ability: task.value for task in report.tasks}
        assert trial.standard_errors == {task.ability: task.stderr for task in report.tasks}
        assert (trial.host, trial.device, trial.fidelity) == ("node-1", "cpu", "full")


def test_trials_that_say_everything_are_read_without_their_evaluations(tmp_path: Path) -> None:
    write_study(tmp_path)
    trials = read_trials(tmp_path, STUDY_ID)
    assert not any(is_complete(trial) for trial in write_study(tmp_path) if trial.score is not None)
    assert all(is_complete(trial) for trial in trials)
    write_trials(tmp_path, STUDY_ID, trials, study_started_at=BEGAN)
    shutil.rmtree(tmp_path / "runs")
    assert read_trials(tmp_path, STUDY_ID) == trials


def test_only_evaluations_that_a_name_may_mean_are_read(reports: Path) -> None:
    trials = read_trials(reports, STUDY_ID)
    outside = {one.report.evaluation_id for one in read_evaluations(reports, study_id=NO_STUDY)}
    for name in ("best", f"trial {WINNER}", str(WINNER), f"c{WINNER}aa", f"w{WINNER}dd"):
        found = {one.report.evaluation_id for one in evaluations_named(reports, [name], trials)}
        assert found - outside == set(trials[WINNER].evaluation_ids), name
    (one,) = {each.report.evaluation_id for each in evaluations_named(reports, ["6rep"], trials)} - outside
    assert one == trials[WINNER].evaluation_ids[2]
    assert {each.report.evaluation_id for each in evaluations_named(reports, ["*", "????"], trials)} == outside


def test_runs_that_do_not_say_their_label_take_that_of_their_trial(tmp_path: Path) -> None:
    trials = write_study(tmp_path)
    (one,) = read_evaluations(tmp_path, evaluation_ids=[trials[2].evaluation_ids[0]])
    write_evaluation(tmp_path, with_samples(tmp_path, one), dataclasses.replace(one.context, label=None))
    (found,) = read_evaluations(tmp_path, evaluation_ids=[one.report.evaluation_id])
    assert found.context.label == found.name == "uniform"


def test_samples_that_were_not_brought_along_are_missed(reports: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(reports, tmp_path / "copy")
    shutil.rmtree(copy / "samples" / "study=none")
    (found,) = read_evaluations(copy, study_id=NO_STUDY)
    with pytest.raises(EvaluationError, match="0 of 40 samples of words_report"):
        with_samples(copy, found)
