"""Claim: an objective orders trials as its definition says, whatever the scales of the suite's entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import EvaluationError
from remelt_evals.objectives import OBJECTIVES, average_ranks

# The example of Colombo et al.: three systems on three tasks have Borda counts 5, 3 and 1.
VALUES = {0: (3.0, 3.0, 2.0), 1: (2.0, 1.0, 3.0), 2: (1.0, 2.0, 1.0)}


def test_mean_rank_is_the_borda_count_over_its_greatest_value() -> None:
    scores = OBJECTIVES["mean rank"].scores(VALUES, (1.0, 1.0, 1.0))
    assert {number: round(score * 3 * 2) for number, score in scores.items()} == {0: 5, 1: 3, 2: 1}


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert average_ranks(np.array([2.0, 5.0, 2.0, 1.0])).tolist() == [1.5, 3.0, 1.5, 0.0]


def test_the_macro_mean_weighs_entries() -> None:
    assert OBJECTIVES["macro mean"].scores({7: (1.0, 0.0)}, (3.0, 1.0)) == {7: 0.75}


def test_standardised_values_are_in_units_of_the_reference() -> None:
    scores = OBJECTIVES["standardised mean"].scores({0: (0.6, -3.0)}, (1.0, 1.0), [(0.4, -2.0), (0.6, -4.0)])
    # 0.6 lies 0.1 / sd(0.4, 0.6) above, -3 lies on the mean.
    assert scores[0] == pytest.approx(0.1 / np.std([0.4, 0.6], ddof=1) / 2)


def test_the_worst_task_decides_where_it_is_asked_for() -> None:
    reference = [(0.0, 0.0), (1.0, 1.0)]
    scores = OBJECTIVES["worst task"].scores({0: (5.0, 0.2), 1: (0.5, 0.5)}, (1.0, 1.0), reference)
    assert scores[1] > scores[0]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 12), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from(["standardised mean", "mean rank"])
)
def test_a_change_of_an_entrys_scale_changes_no_order(trials: int, entries: int, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((trials, entries))
    scale, shift = rng.uniform(0.1, 50, entries), rng.standard_normal(entries) * 10
    before = OBJECTIVES[name].scores(dict(enumerate(values.tolist())), [1.0] * entries)
    after = OBJECTIVES[name].scores(dict(enumerate((values * scale + shift).tolist())), [1.0] * entries)
    assert list(after.values()) == pytest.approx(list(before.values()), abs=1e-9)


@pytest.mark.parametrize("name", [name for name, each in OBJECTIVES.items() if not each.is_relative])
def test_a_trial_scores_the_same_alone_and_among_others(name: str) -> None:
    weights = (0.3, 0.2, 0.7)
    together = OBJECTIVES[name].scores(VALUES, weights)
    for number, values in VALUES.items():
        assert OBJECTIVES[name].scores({number: values}, weights)[number] == together[number]


def test_values_of_another_suite_are_refused() -> None:
    with pytest.raises(EvaluationError, match="has not the 2 entries"):
        OBJECTIVES["mean rank"].scores(VALUES, (1.0, 1.0))


def test_nothing_scored_is_nothing() -> None:
    assert OBJECTIVES["mean rank"].scores({}, (1.0,)) == {}
