"""The Pareto front: exactly the points that no other dominates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import EvaluationError
from remelt.searchers.pareto import front
from remelt_evals.report_front import front_of_trials
from remelt_evals.report_reading import evaluations_of, read_evaluations, read_trials
from study_reports import STUDY_ID, write_study


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_study(folder)
    return folder


Points = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(Points)
def test_a_point_is_on_the_front_if_and_only_if_none_dominates_it(points: list[tuple[int, ...]]) -> None:
    found = front(np.array(points, np.float64))
    for place, point in enumerate(points):
        dominated = any(
            all(theirs >= mine for theirs, mine in zip(other, point, strict=True)) and other != point
            for other in points
        )
        assert bool(found[place]) is not dominated
    assert found.any()


def test_the_front_of_a_study_knows_which_way_is_better(reports: Path) -> None:
    evaluations = read_evaluations(reports, study_id=STUDY_ID)
    trials = read_trials(reports, STUDY_ID, evaluations)
    front = front_of_trials(trials, evaluations)
    assert front.objectives == ("words", "prose")
    assert front.higher_is_better == (True, False)
    # Trial 8 is best at both: more words right, fewer bits per byte.
    assert [point.trial.trial_number for point in front.best] == [8]
    assert (len(front.points), front.num_left_out) == (8, 1)
    one = front_of_trials(trials, evaluations, ["score", "words"])
    assert one.best[0].values[0] == trials[8].score
    on_report = front_of_trials(trials, evaluations, role="report")
    assert {point.trial.trial_number for point in on_report.points} == {0, 1, 2, 6}
    assert on_report.to_json()["front"][0]["trial_number"] == 6


def test_trials_of_a_lower_fidelity_are_left_out(reports: Path) -> None:
    evaluations = [
        dataclasses.replace(one, report=dataclasses.replace(one.report, fidelity="first-8"))
        if one.context.trial_number == 8
        else one
        for one in read_evaluations(reports, study_id=STUDY_ID)
    ]
    front = front_of_trials(read_trials(reports, STUDY_ID, evaluations), evaluations)
    assert (front.fidelity, front.num_left_out) == ("full", 2)
    assert [point.trial.trial_number for point in front.best] == [6]


def test_unknown_objectives_and_empty_roles_are_refused(reports: Path) -> None:
    evaluations = read_evaluations(reports, study_id=STUDY_ID)
    trials = read_trials(reports, STUDY_ID, evaluations)
    with pytest.raises(EvaluationError, match="no objective 'word' in this study; did you mean 'words'"):
        front_of_trials(trials, evaluations, ["word"])
    with pytest.raises(EvaluationError, match="none of 9 trials was scored on search items"):
        front_of_trials(trials, [])


def test_one_evaluation_is_enough_where_trials_have_their_own_scores(reports: Path) -> None:
    evaluations = read_evaluations(reports, study_id=STUDY_ID)
    trials = read_trials(reports, STUDY_ID, evaluations)
    assert front_of_trials(trials, evaluations_of(reports, trials[:1])) == front_of_trials(trials, evaluations)
