"""Evaluators are replaced when they die, hang or fail, and no piece of work is lost with them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from remelt.errors import StudyError
from remelt_evals.backends import BackendOptions
from remelt_evals.suite import load_suite
from remelt_jobs.evaluator_pool import GROWTH_BYTES, MAX_LOSSES, EvaluatorPool, has_grown
from remelt_jobs.study_config import Evaluators
from remelt_jobs.trial import Outcome, Work

DUMMY = BackendOptions(name="dummy")


def work_on(checkpoint: Path, suite: Path) -> Work:
    return Work(
        recipe=None, checkpoint=str(checkpoint), role="search", suite=str(suite), suite_digest=load_suite(suite).digest
    )


def wait_until_up(pool: EvaluatorPool) -> None:
    deadline = time.monotonic() + 120
    while not pool.has_room and time.monotonic() < deadline:
        assert pool.wait(1.0) == {}


def wait_for(pool: EvaluatorPool, key: str) -> Outcome:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        outcomes = pool.wait(1.0)
        if key in outcomes:
            return outcomes[key]
    raise TimeoutError(key)


def kill(pool: EvaluatorPool) -> None:
    os.kill(pool._slots[0].pid, signal.SIGKILL)


@pytest.mark.ray
def test_work_survives_its_evaluator_and_a_wrong_checkpoint_is_its_own_failure(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    with EvaluatorPool(Evaluators(), DUMMY, "pool-test", 1) as pool:
        wait_until_up(pool)
        first = pool._slots[0].pid
        pool.submit({"a": work_on(parents["p1"], suite_file)})
        assert not pool.has_room
        kill(pool)
        outcome = wait_for(pool, "a")
        assert outcome.failure is None
        assert outcome.report is not None
        assert pool._slots[0].pid != first
        pool.submit({"b": work_on(tmp_path / "nowhere", suite_file)})
        assert "CheckpointError" in str(wait_for(pool, "b").failure)
        assert pool.num_running == 0


@pytest.mark.slow
@pytest.mark.ray
def test_work_that_kills_every_evaluator_becomes_a_failure(
    cluster: str, parents: dict[str, Path], suite_file: Path
) -> None:
    with EvaluatorPool(Evaluators(), DUMMY, "pool-test", 2) as pool:
        wait_until_up(pool)
        pool.submit({"a": work_on(parents["p1"], suite_file)})
        outcomes: dict[str, Outcome] = {}
        deadline = time.monotonic() + 120
        while "a" not in outcomes and time.monotonic() < deadline:
            if pool._slots[0].is_up and pool._slots[0].job is not None:
                kill(pool)
            outcomes = pool.wait(1.0)
        assert f"lost {MAX_LOSSES + 1} times" in str(outcomes["a"].failure)


@pytest.mark.slow
@pytest.mark.ray
def test_candidates_that_lost_their_evaluator_together_go_on_one_by_one(
    cluster: str, parents: dict[str, Path], suite_file: Path
) -> None:
    with EvaluatorPool(Evaluators(), DUMMY, "pool-test", 6) as pool:
        wait_until_up(pool)
        pool.submit({name: work_on(parents[name], suite_file) for name in ("p1", "p2")})
        kill(pool)
        outcomes: dict[str, Outcome] = {}
        deadline = time.monotonic() + 120
        while len(outcomes) < 2 and time.monotonic() < deadline:
            found = pool.wait(1.0)
            assert len(found) < 2
            outcomes |= found
        assert {key: outcome.failure for key, outcome in outcomes.items()} == {"p1": None, "p2": None}


@pytest.mark.slow
@pytest.mark.ray
def test_work_past_its_time_is_a_failure_and_the_next_gets_a_new_evaluator(
    cluster: str, parents: dict[str, Path], suite_file: Path
) -> None:
    with EvaluatorPool(Evaluators(timeout_seconds=0.05), DUMMY, "pool-test", 3) as pool:
        wait_until_up(pool)
        first = pool._slots[0].pid
        pool.submit({"a": work_on(parents["p1"], suite_file)})
        assert "timed out after 0.05 s" in str(wait_for(pool, "a").failure)
        wait_until_up(pool)
        assert pool._slots[0].pid != first


@pytest.mark.ray
def test_evaluators_that_the_cluster_cannot_hold_are_refused_with_both_numbers(cluster: str) -> None:
    with (
        EvaluatorPool(Evaluators(cpus=64, start_timeout_seconds=0.5), DUMMY, "pool-test", 4) as pool,
        pytest.raises(StudyError, match=r"asks for 64 CPUs.*the cluster has 3 CPUs"),
    ):
        for _ in range(10):
            pool.wait(1.0)


@pytest.mark.slow
@pytest.mark.ray
def test_an_evaluator_that_cannot_start_is_named(cluster: str) -> None:
    with (
        EvaluatorPool(Evaluators(), BackendOptions(name="nothing"), "pool-test", 5) as pool,
        pytest.raises(StudyError, match=r"in a row failed to start: .*no eval backend"),
    ):
        for _ in range(30):
            pool.wait(10.0)


def test_memory_has_grown_when_it_doubled_by_a_figure_that_matters() -> None:
    assert not has_grown(100, 300)
    assert not has_grown(4 * GROWTH_BYTES, 6 * GROWTH_BYTES)
    assert has_grown(GROWTH_BYTES, 3 * GROWTH_BYTES)
