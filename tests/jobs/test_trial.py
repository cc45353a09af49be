"""What an evaluator's actor does, here without one: candidates are merged together, and fail each for itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from merge_fixtures import make_recipe
from remelt.merge import merge_recipe
from remelt.recipe import Recipe
from remelt_evals.backends import BackendOptions
from remelt_evals.suite import load_suite
from remelt_jobs.trial import TrialEvaluator, Work


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialEvaluator]:
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    made = TrialEvaluator(BackendOptions(name="dummy"), str(tmp_path / "scratch"), "trial-test", 1, 0)
    yield made
    made.close()
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


def work_on(suite: Path, recipe: Recipe | None, checkpoint: Path | None = None) -> Work:
    return Work(
        recipe=recipe,
        checkpoint=None if checkpoint is None else str(checkpoint),
        role="search",
        suite=str(suite),
        suite_digest=load_suite(suite).digest,
        memory_bytes=200_000_000,
    )


def weighted(parents: dict[str, Path], weight: float) -> Recipe:
    models = [{"model": str(parents["p1"]), "parameters": {"weight": weight}}]
    return make_recipe(parents, "task_arithmetic", models=models, out_dtype="float16")


def test_candidates_together_are_each_what_it_is_alone(
    evaluator: TrialEvaluator, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    works = [work_on(suite_file, weighted(parents, weight)) for weight in (0.1, 0.5, 0.9)]
    together = evaluator.run(works)
    for number, (work, outcome) in enumerate(zip(works, together, strict=True)):
        assert work.recipe is not None and outcome.report is not None
        merged = merge_recipe(work.recipe, tmp_path / str(number))
        assert (outcome.digest, outcome.candidate_id) == (merged.digest, merged.candidate_id)
        (alone,) = evaluator.run([work])
        assert alone.report is not None and alone.report.tasks == outcome.report.tasks
    assert len({outcome.digest for outcome in together}) == 3


def test_one_that_cannot_be_merged_fails_by_itself(
    evaluator: TrialEvaluator, parents: dict[str, Path], suite_file: Path
) -> None:
    works = [work_on(suite_file, weighted(parents, weight)) for weight in (0.5, 1e9, 0.7)]
    first, wrong, last = evaluator.run(works)
    assert "NonFiniteError" in str(wrong.failure) and wrong.report is None
    assert first.failure is None and last.failure is None
    assert first.digest != last.digest


def test_parents_among_candidates_are_scored_as_they_lie(
    evaluator: TrialEvaluator, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    works = [
        work_on(suite_file, weighted(parents, 0.5)),
        work_on(suite_file, None, parents["p1"]),
        work_on(suite_file, None, tmp_path / "nowhere"),
    ]
    merged, parent, absent = evaluator.run(works)
    assert merged.report is not None and parent.report is not None
    assert parent.report.checkpoint == str(parents["p1"])
    assert "CheckpointError" in str(absent.failure)


def test_after_an_error_of_the_evaluation_the_rest_is_left_to_another_process(
    evaluator: TrialEvaluator, parents: dict[str, Path], suite_file: Path
) -> None:
    works = [work_on(suite_file, weighted(parents, weight)) for weight in (0.1, 0.2, 0.3)]
    outcomes = evaluator.run([works[0], replace(works[1], suite_digest="another"), works[2]])
    assert [outcome.is_evaluator_sound for outcome in outcomes] == [True, False]
    assert outcomes[0].failure is None
    assert "EvaluationError" in str(outcomes[1].failure)


def test_sockets_find_room_for_their_names_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """107 characters is all that a Unix socket's path may have; vLLM puts names of 36 into the folder."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    evaluator = TrialEvaluator(BackendOptions(name="dummy"), None, "0123456789", 1, 0)
    try:
        child = Path(tempfile.gettempdir()) / "remelt-12345678"
        assert len(str(child / ("x" * 36))) <= 107
    finally:
        evaluator.close()
