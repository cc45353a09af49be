"""A study from end to end on a real Ray cluster, with real merges, real lm-eval, and a dummy in the model's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from checkpoint_files import bf16, write_file
from merge_fixtures import parent_tensors, write_pool
from remelt.errors import CheckpointError, ExecutionError, MismatchError, StudyError
from remelt.searchers import TrialState, build_searcher
from remelt.verify import verify_merge
from remelt_evals.report_tables import read_table
from remelt_jobs import study as study_module
from remelt_jobs.journal import Journal, Record, read_journal
from remelt_jobs.lease import take_lease
from remelt_jobs.study import run_study
from remelt_jobs.study_checks import plan_ahead
from remelt_jobs.study_config import StudyConfig, parse_study
from remelt_jobs.study_progress import StudyProgress
from remelt_jobs.study_report import print_study, progress_line, study_files
from remelt_jobs.study_result import StudyResult
from remelt_jobs.study_state import StudyState
from study_fixtures import make_document

NUM_TRIALS = 12
NUM_BEFORE_THE_STOP = 7


class Stopped(Exception):  # noqa: N818 - not an error, a driver's end
    """Raised from a progress callback to end a driver in mid-study."""


class Finished(NamedTuple):
    config: StudyConfig
    result: StudyResult
    records: list[Record]
    steps: list[StudyProgress]
    num_before_resume: int
    """Records of the first driver."""


@pytest.fixture(scope="module")
def study(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A study whose driver ended after some trials, run to its end by a second driver."""
    evaluators = {"count": 2, "cpus": 1, "scratch": str(tmp_path_factory.mktemp("scratch"))}
    config = parse_study(make_document(parents, suite_file, budget={"trials": NUM_TRIALS}, evaluators=evaluators))
    output = tmp_path_factory.mktemp("studies") / "one"
    steps: list[StudyProgress] = []

    def stop_in_the_middle(step: StudyProgress) -> None:
        steps.append(step)
        if step.num_done == NUM_BEFORE_THE_STOP:
            raise Stopped

    with pytest.raises(Stopped):
        run_study(config, output, progress=stop_in_the_middle)
    num_before_resume = len(read_journal(output))
    result = run_study(config, output, progress=steps.append)
    return Finished(config, result, read_journal(output), steps, num_before_resume)


@pytest.mark.ray
def test_the_uniform_merge_and_every_parent_come_first(study: Finished) -> None:
    labels = [record["candidate"]["label"] for record in study.records if record["type"] == "asked"]
    assert labels == ["uniform", "p1", "p2", "p3", *(f"trial {number}" for number in range(4, NUM_TRIALS))]


@pytest.mark.ray
def test_every_trial_is_scored_once_though_its_driver_was_replaced(study: Finished) -> None:
    finished = [record["trial"] for record in study.records if record["type"] == "finished"]
    assert sorted(finished) == list(range(NUM_TRIALS))
    assert study.num_before_resume < len(study.records)


@pytest.mark.ray
def test_a_study_resumed_anywhere_asks_what_the_uninterrupted_one_asked(study: Finished) -> None:
    num_asks = 0
    for place, record in enumerate(study.records):
        if record["type"] == "asked" and record["candidate"]["origin"] == "searcher":
            searcher = build_searcher(study.config.searcher, study.config.space, 0, study.config.searcher_options)
            state = StudyState.of(study.records[:place])
            number = record["candidate"]["number"]
            assert searcher.ask(number, state.seen) == record["candidate"]["point"]
            assert len(state.finished) == record["asked_after"]
            num_asks += 1
    assert num_asks == NUM_TRIALS - 4


@pytest.mark.ray
def test_a_free_evaluator_is_asked_for_at_once(study: Finished) -> None:
    states = [StudyState.of(study.records[:place]) for place in range(1, study.num_before_resume)]
    running = [sum(trial.state is TrialState.RUNNING for trial in state.seen) for state in states]
    assert max(running) == study.config.evaluators.count


@pytest.mark.ray
def test_the_winner_is_published_verified_and_what_was_scored(study: Finished) -> None:
    state = StudyState.of(study.records)
    assert state.winner is not None
    verification = verify_merge(study.result.best_path)
    assert verification.problems == ()
    assert verification.digest == study.result.best_digest
    if state.candidates[state.winner].model is None:
        assert verification.digest == state.finished[state.winner]["digest"]
    assert state.scored["report", state.winner]["digest"] == verification.digest


@pytest.mark.ray
def test_the_winner_has_the_best_selection_score_among_the_finalists(study: Finished) -> None:
    state = StudyState.of(study.records)
    scores = {number: record["score"] for (role, number), record in state.scored.items() if role == "selection"}
    assert state.winner is not None
    assert scores[state.winner] == max(scores.values())
    assert {"uniform", "parent"} <= {state.candidates[number].origin for number in scores}
    assert set(state.ranking[:2]) <= set(scores)


@pytest.mark.ray
def test_the_result_reports_parents_uniform_and_best_on_report_items(study: Finished) -> None:
    result = study.result
    assert [row.kind for row in result.rows] == ["parent", "parent", "parent", "uniform", "best"]
    for row in result.rows:
        assert {score.ability for score in row.abilities} == {"sums", "words"}
        assert all(score.n == 20 and score.stderr is not None for score in row.abilities)
        assert row.objective == pytest.approx(np.mean([score.value for score in row.abilities]))
    for versus in result.versus:
        other = next(row for row in result.rows if row.label == versus.label)
        macro = versus.comparison.macro
        assert macro.difference == pytest.approx(result.rows[-1].objective - other.objective)
        assert macro.low <= macro.difference <= macro.high
    best_parent = max((row for row in result.rows if row.kind == "parent"), key=lambda row: row.objective)
    assert [(versus.against, versus.label) for versus in result.versus] == [
        ("best parent", best_parent.label),
        ("uniform", "uniform"),
    ]
    written = json.loads((result.output / "result.json").read_text())
    assert [row["label"] for row in written["rows"]] == [row.label for row in result.rows]


@pytest.mark.ray
def test_reports_hold_every_trial_and_every_evaluation_with_its_ids(study: Finished) -> None:
    state, study_id = StudyState.of(study.records), study.config.study_id
    trials = {row["trial_number"]: row for row in read_table(study.result.reports, "trials").to_pylist()}
    assert set(trials) == set(range(NUM_TRIALS))
    for number, row in trials.items():
        assert (row["state"], row["study_id"]) == ("COMPLETE", study_id)
        assert row["score"] == state.score(number)
    runs = read_table(study.result.reports, "runs").to_pylist()
    wanted = {record["evaluation_id"] for record in state.finished.values()}
    wanted |= {record["evaluation_id"] for record in state.scored.values()}
    assert {row["evaluation_id"] for row in runs} == wanted
    assert {row["study_id"] for row in runs} == {study_id}
    assert {row["role"] for row in runs} == {"search", "selection", "report"}


@pytest.mark.ray
def test_search_never_saw_report_items(study: Finished) -> None:
    samples = read_table(study.result.reports, "samples").to_pylist()
    items = {role: {row["doc_hash"] for row in samples if row["role"] == role} for role in ("search", "report")}
    assert items["search"]
    assert not items["search"] & items["report"]


@pytest.mark.ray
def test_evaluators_leave_nothing_in_the_scratch_folder(study: Finished) -> None:
    (folder,) = Path(str(study.config.evaluators.scratch)).iterdir()
    assert list(folder.iterdir()) == []


@pytest.mark.ray
def test_progress_counts_trials_and_names_the_best(study: Finished) -> None:
    search = [step for step in study.steps if step.phase == "search"]
    assert [step.num_done for step in search] == list(range(1, NUM_TRIALS + 1))
    assert search[-1].eta_seconds == 0
    state = StudyState.of(study.records)
    assert search[-1].best_score == state.score(state.ranking[0])
    assert {step.phase for step in study.steps} == {"start", "search", "selection", "publication", "report"}


@pytest.mark.ray
def test_a_finished_study_does_nothing(study: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.result.output.rglob("*")}
    again = run_study(study.config, study.result.output)
    assert again.is_reused
    assert again.rows == study.result.rows
    assert again.versus == study.result.versus
    assert {path: path.stat().st_mtime_ns for path in study.result.output.rglob("*")} == before


@pytest.mark.ray
def test_the_table_names_every_row_every_interval_and_files_that_exist(
    study: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    print_study(study.result)
    printed = capsys.readouterr().out
    for words in ("parent p1", "parent p2", "parent p3", "uniform merge", "best merge", "sums", "words", "macro"):
        assert words in printed
    macro = study.result.versus[0].comparison.macro
    assert f"{macro.difference:+.3f} [{macro.low:+.3f}, {macro.high:+.3f}]" in printed
    for path, _ in study_files(study.result):
        assert Path(path).exists()
        assert f"wrote {path}" in printed
    print_study(run_study(study.config, study.result.output))
    assert "nothing done" in capsys.readouterr().out


def test_a_line_of_progress_says_how_far_what_the_best_and_how_long() -> None:
    step = StudyProgress("search", 3, 40, "uniform", 0.5, 65.0, "p2 scored 0.4000 in 1.0 s")
    assert progress_line(step) == "3/40 trials: p2 scored 0.4000 in 1.0 s; best 0.5000 (uniform); ETA 1:05"


@pytest.mark.ray
def test_another_study_on_the_same_output_is_refused_by_what_differs(
    study: Finished, parents: dict[str, Path], suite_file: Path
) -> None:
    other = parse_study(make_document(parents, suite_file, seed=1))
    with pytest.raises(StudyError, match=r"another study.*differ in: seed"):
        run_study(other, study.result.output)


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_with_a_larger_budget_goes_on(study: Finished, parents: dict[str, Path], suite_file: Path) -> None:
    document = make_document(parents, suite_file, budget={"trials": NUM_TRIALS + 2})
    result = run_study(parse_study(document), study.result.output)
    assert (result.num_trials, result.is_reused) == (NUM_TRIALS + 2, False)
    records = read_journal(study.result.output)
    assert records[: len(study.records)] == study.records
    assert sum(record["type"] == "finished" for record in records) == NUM_TRIALS + 2


@pytest.mark.slow
@pytest.mark.ray
def test_failed_trials_are_recorded_and_the_study_goes_on(cluster: str, suite_file: Path, tmp_path: Path) -> None:
    parents = write_pool(tmp_path / "parents", 2)
    tensors: dict[str, Any] = parent_tensors(2)
    dtype, bits = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (dtype, np.where(np.arange(bits.size) == 5, bf16(np.array([np.nan]))[1], bits))
    write_file(parents["p2"] / "model.safetensors", tensors)
    document = make_document(parents, suite_file, searcher="random", budget={"trials": 5})
    result = run_study(parse_study(document), tmp_path / "study")
    records = [record for record in read_journal(tmp_path / "study") if record["type"] == "finished"]
    assert {record["trial"] for record in records if record["state"] == "FAILED"} == {0, 3, 4}
    assert all("NonFiniteError" in record["failure"] for record in records if record["state"] == "FAILED")
    assert (result.num_trials, result.num_failed, result.winner) == (5, 3, "p1")
    assert verify_merge(result.best_path).problems == ()
    assert any("no finalist of the search was better" in note for note in result.notes)
    assert any("without a score on report items: uniform" in note for note in result.notes)


def test_a_study_held_by_another_driver_is_refused(parents: dict[str, Path], suite_file: Path, tmp_path: Path) -> None:
    take_lease(tmp_path / "study")
    (tmp_path / "study" / "journal").mkdir()
    with pytest.raises(StudyError, match="--takeover"):
        run_study(parse_study(make_document(parents, suite_file)), tmp_path / "study")


def test_a_pool_that_changed_since_the_study_began_is_refused(
    suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = write_pool(tmp_path / "parents", 2)
    config = parse_study(make_document(parents, suite_file))

    def no_cluster(**options: object) -> Any:
        raise ExecutionError("no cluster was to be started")

    monkeypatch.setattr(study_module, "ray_session", no_cluster)
    with take_lease(tmp_path / "study").kept_alive() as lease, Journal(tmp_path / "study", lease) as journal:
        journal.append(plan_ahead(config) | {"at": "2026-01-01T00:00:00.000+00:00"})
    with pytest.raises(ExecutionError, match="no cluster"):
        run_study(config, tmp_path / "study")
    kept = sorted(tmp_path.glob("study/journal/*"))
    write_file(parents["p2"] / "model.safetensors", parent_tensors(3))
    with pytest.raises(StudyError, match=r"^p2 changed since the study in .* began.*put the old weights back"):
        run_study(config, tmp_path / "study")
    (parents["p1"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="p1"):
        run_study(config, tmp_path / "study")
    assert sorted(tmp_path.glob("study/journal/*")) == kept


def test_a_directory_of_something_else_is_refused(parents: dict[str, Path], suite_file: Path, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    with pytest.raises(StudyError, match="holds best"):
        run_study(parse_study(make_document(parents, suite_file)), tmp_path)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(suite_file: Path, tmp_path: Path) -> None:
    parents = write_pool(tmp_path / "parents", 2)
    config = parse_study(make_document(parents, suite_file))
    write_file(parents["p2"] / "model.safetensors", parent_tensors(2, vocabulary=60))
    with pytest.raises(MismatchError):
        run_study(config, tmp_path / "study")
    (parents["p2"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        run_study(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()
