"""A study's fidelity ladder, objectives, budgets, cache and evaluators of several nodes, each on a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from remelt.errors import BudgetError, StudyError
from remelt.searchers import TrialState, build_searcher
from remelt_evals.eval_report import report_from_json
from remelt_evals.ladder import stop_early
from remelt_evals.objectives import OBJECTIVES
from remelt_evals.report_tables import read_table
from remelt_jobs.demo import demo_study
from remelt_jobs.journal import Record, read_journal
from remelt_jobs.study import run_study
from remelt_jobs.study_config import Budget, parse_study
from remelt_jobs.study_report import searcher_lines
from remelt_jobs.study_state import Spent, StudyState
from study_fixtures import make_document


def by_type(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["type"] == kind]


@pytest.mark.slow
@pytest.mark.ray
def test_what_is_clearly_worse_on_the_first_items_stops_there(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(parents, suite_file, searcher="random", budget={"trials": 24}, fidelity=[10], seed=3)
    config = parse_study(document)
    result = run_study(config, tmp_path / "study")
    records = read_journal(tmp_path / "study")
    finished = by_type(records, "finished")
    stopped = [record for record in finished if record["state"] == "STOPPED"]
    assert stopped, "choose a seed for which the dummy answers badly"
    assert {record["fidelity"] for record in stopped} == {"first-10"}
    assert {record["fidelity"] for record in finished if record["state"] == "COMPLETE"} == {"full"}
    assert all(record["state"] == "COMPLETE" for record in finished if record["trial"] < 4), "starts are scored in full"
    state = StudyState.of(records, *config.scoring)
    assert not {record["trial"] for record in stopped} & set(state.ranking)
    runs = {row["evaluation_id"]: row for row in read_table(result.reports, "runs").to_pylist()}
    assert all(runs[record["evaluation_id"]]["fidelity"] == "first-10" for record in stopped)
    seen = {trial.number: trial for trial in state.seen}
    for record in stopped:
        trial = seen[record["trial"]]
        assert (trial.state, trial.score) == (TrialState.STOPPED, record["score"])
        best = max(each["score"] for each in finished if each["state"] == "COMPLETE")
        assert record["score"] < best


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_trial_was_worse_than_the_best_of_its_moment(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    """One evaluator, so that the incumbent of each trial is known from the journal: the decision is made again."""
    cache = tmp_path / "cache"
    document = make_document(
        parents, suite_file, searcher="random", budget={"trials": 16}, fidelity=[10], seed=3, cache=str(cache)
    )
    config = parse_study(document | {"evaluators": {"count": 1, "cpus": 1}})
    run_study(config, tmp_path / "study")
    reports = {path.stem: report_from_json(path.read_text()) for path in cache.glob("*.json")}
    state = StudyState(*config.scoring)
    decided = 0
    for record in read_journal(tmp_path / "study"):
        if record["type"] == "finished" and record["trial"] >= 4:
            incumbent = reports[state.finished[state.ranking[0]]["evaluation_id"]]
            digest = record["digest"]
            (rung,) = [
                each
                for each in reports.values()
                if (each.digest, each.fidelity, each.role) == (digest, "first-10", "search")
            ]
            estimate = stop_early(incumbent, rung)
            assert (record["state"] == "STOPPED") == (estimate is not None)
            if estimate is not None:
                assert record["score"] == pytest.approx(estimate.score)
            decided += 1
        state.apply(record)
    assert decided == 12


@pytest.mark.slow
@pytest.mark.ray
def test_an_evaluation_in_the_cache_is_not_done_again(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(parents, suite_file, budget={"trials": 6}, cache=str(tmp_path / "cache"))
    first = run_study(parse_study(document), tmp_path / "one")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    second = run_study(parse_study(document | {"finalists": 3}), tmp_path / "two")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert second.rows[0] == first.rows[0]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ["mean rank", "standardised mean", "worst task", "several"])
def test_every_objective_carries_a_study_to_its_end(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path, name: str
) -> None:
    config = parse_study(make_document(parents, suite_file, objective=name, budget={"trials": 9}))
    result = run_study(config, tmp_path / "study")
    records = read_journal(tmp_path / "study")
    state = StudyState.of(records, *config.scoring)
    values = {record["trial"]: record["values"] for record in by_type(records, "finished")}
    reference = [values[number] for number in range(4)]
    scores = OBJECTIVES[name].scores(values, (1.0, 1.0), reference)
    assert state.ranking == sorted(scores, key=lambda number: (-scores[number], number))
    rows = {row["trial_number"]: row["score"] for row in read_table(result.reports, "trials").to_pylist()}
    assert rows == pytest.approx(scores)
    for place, record in enumerate(records):
        if record["type"] == "asked" and record["candidate"]["origin"] == "searcher":
            searcher = build_searcher(config.searcher, config.space, config.seed, config.searcher_options)
            then = StudyState.of(records[:place], *config.scoring)
            assert searcher.ask(record["candidate"]["number"], then.seen) == record["candidate"]["point"]
    if name == "several":
        assert all(len(trial.objectives) == 2 for trial in state.seen)


@pytest.mark.slow
@pytest.mark.ray
def test_a_wall_budget_ends_the_search_but_not_the_starts(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(parents, suite_file, budget={"wall_hours": 1e-9})
    result = run_study(parse_study(document), tmp_path / "study")
    assert result.num_trials == 4
    assert run_study(parse_study(document), tmp_path / "study").is_reused


@pytest.mark.slow
@pytest.mark.ray
def test_entries_of_a_suite_are_scored_apart_and_make_one_trial(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    evaluators = {"count": 2, "cpus": 1, "parts": 2}
    document = make_document(parents, suite_file, searcher="random", budget={"trials": 7}, evaluators=evaluators)
    result = run_study(parse_study(document), tmp_path / "study")
    finished = by_type(read_journal(tmp_path / "study"), "finished")
    assert sorted(record["trial"] for record in finished) == list(range(7))
    assert all(list(record["abilities"]) == ["sums", "words"] for record in finished)
    runs = read_table(result.reports, "runs").to_pylist()
    assert len(runs) == len({row["evaluation_id"] for row in runs})
    assert [[score.ability for score in row.abilities] for row in result.rows] == [["sums", "words"]] * 5


@pytest.mark.slow
@pytest.mark.ray
def test_what_the_searcher_learned_is_told_at_the_end(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(
        parents, suite_file, searcher={"name": "map", "design": 6}, objective="several", budget={"trials": 8}
    )
    result = run_study(parse_study(document), tmp_path / "study")
    kept = json.loads((result.output / "result.json").read_text())["searcher"]
    assert kept == result.searcher
    assert [fit["observations"] for fit in kept["fit"]] == [8, 8]
    fits = [line for line in searcher_lines(result) if line.startswith("surrogate of")]
    assert [line.partition(":")[0] for line in fits] == ["surrogate of sums", "surrogate of words"]
    assert f"front has {len(kept['front'])} points" in searcher_lines(result)[-1]


@pytest.mark.slow
@pytest.mark.ray
def test_candidates_that_are_merged_together_score_what_each_does_alone(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(parents, suite_file, searcher="random", budget={"trials": 11})
    finished = {}
    for together in (1, 3):
        evaluators = {"count": 1, "cpus": 1, "together": together}
        run_study(parse_study(document | {"evaluators": evaluators}), tmp_path / str(together))
        finished[together] = by_type(read_journal(tmp_path / str(together)), "finished")
    asked = [record["asked_after"] for record in by_type(read_journal(tmp_path / "3"), "asked")]
    assert asked == [0, 1, 2, 3, 4, 4, 4, 7, 7, 7, 10]
    for one, other in zip(finished[1], finished[3], strict=True):
        for key in ("trial", "digest", "candidate_id", "values", "score"):
            assert one[key] == other[key]


def test_a_budget_ends_with_the_first_that_is_spent() -> None:
    budget = Budget(trials=10, gpu_hours=2.0, wall_hours=1.0)
    assert not budget.is_spent(Spent(9, 3599.0, 3599.0), gpus=2)
    assert budget.is_spent(Spent(10, 0.0, 0.0), gpus=2)
    assert budget.is_spent(Spent(0, 3600.0, 0.0), gpus=2)
    assert budget.is_spent(Spent(0, 0.0, 3600.0), gpus=2)


def test_time_between_two_drivers_is_not_spent() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    state = StudyState()
    for minutes, kind in ((0, "study"), (0, "session"), (10, "winner"), (500, "session"), (505, "winner")):
        state.apply({"type": kind, "at": (start + timedelta(minutes=minutes)).isoformat(), "trial": 0})
    assert state.spent().wall_seconds == 15 * 60
    assert state.spent(start + timedelta(minutes=507)).wall_seconds == 17 * 60


def test_candidates_that_do_not_fit_the_disk_budget_are_refused(
    parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(parents, suite_file, evaluators={"count": 3, "disk": "2kB"})
    with pytest.raises(StudyError, match=r"3 candidates of .* lie on disk at one time"):
        run_study(parse_study(document), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_candidates_that_do_not_fit_the_memory_together_are_refused(
    parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    document = make_document(parents, suite_file, evaluators={"together": 64, "memory": "120MB"})
    with pytest.raises(BudgetError, match=r"asked to stay within 57 MiB.*needs"):
        run_study(parse_study(document), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_an_evaluator_of_two_nodes_is_scheduled_whole_or_not_at_all(parents: dict[str, Path], suite_file: Path) -> None:
    """In a process of its own, since this one's cluster has one node."""
    script = Path(__file__).parents[1] / "two_node_evaluators.py"
    command = [sys.executable, str(script), str(parents["p1"]), str(suite_file)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["states"] == ["CREATED", "PENDING"]
    assert told["num_nodes_of_the_one_that_runs"] == 2
    assert told["free_gpus"] == 0
    assert told["states_at_the_end"] == ["REMOVED", "REMOVED"]


@pytest.mark.ray
@pytest.mark.slow
def test_candidates_in_memory_score_what_candidates_on_disk_do(cluster: str, suite_file: Path, tmp_path: Path) -> None:
    """The zoo's real models: the same digests, values and asks, whichever way a candidate comes to the model."""
    document = demo_study(num_trials=7, num_evaluators=1) | {"suite": str(suite_file), "finalists": 1}
    ways = {
        "memory": {},
        "disk": {"resident": False},
        "memory, in twos": {"together": 2},
    }
    finished = {}
    for way, changes in ways.items():
        evaluators = {"count": 1, "cpus": 1, "memory": "1GB", **changes}
        run_study(parse_study(document | {"evaluators": evaluators, "searcher": "random"}), tmp_path / way)
        finished[way] = by_type(read_journal(tmp_path / way), "finished")
        taken = {record["trial"]: record["way"] for record in finished[way]}
        means = way.partition(",")[0]
        assert [taken[number] for number in range(7)] == [means, "", "", "", "", means, means]
    for way in ways:
        for one, other in zip(finished["memory"], finished[way], strict=True):
            for key in ("trial", "digest", "candidate_id", "values", "score"):
                assert one[key] == other[key]
