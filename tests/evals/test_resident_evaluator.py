"""An evaluator scores what it holds in memory as it scores a merge on disk, and nothing else under its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from remelt.errors import EvaluationError, MismatchError
from remelt.merge import merge_recipe
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import EvalReport, EvalRequest, HeldCandidate
from remelt_evals.evaluator import Evaluator
from remelt_evals.evaluator_process import EvaluatorProcess

MB = 1_000_000


def make_recipe(checkpoints: dict[str, Path], weight: float) -> Recipe:
    models = [
        {"model": str(checkpoints[name]), "parameters": {"weight": share}}
        for name, share in (("first", weight), ("second", 1 - weight))
    ]
    return parse_recipe({"merge_method": "linear", "models": models})


def hold(evaluator: Evaluator | EvaluatorProcess, recipe: Recipe, suite: Path) -> HeldCandidate:
    held = evaluator.hold([recipe], str(suite), memory_bytes=200 * MB)
    assert not isinstance(held, str), held
    (one,) = held
    return one


def request_for(held: HeldCandidate, suite: Path, **changes: Any) -> EvalRequest:
    fields = {"checkpoint": held.checkpoint, "digest": held.digest, "suite": str(suite), "role": "search", **changes}
    return EvalRequest(**fields)


def numbers(report: EvalReport) -> dict[str, Any]:
    """All of a report but when, how long, and from where."""
    fields = asdict(report)
    for name in ("started_at", "seconds", "checkpoint"):
        del fields[name]
    return fields


@pytest.fixture(scope="module")
def evaluator() -> Iterator[Evaluator]:
    evaluator = Evaluator(BackendOptions(threads=1))
    yield evaluator
    evaluator.close()


@pytest.mark.slow
def test_scores_and_ids_are_those_of_a_merge_on_disk(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path, tmp_path: Path
) -> None:
    resident = {}
    for weight in (0.2, 0.7):
        held = hold(evaluator, make_recipe(checkpoints, weight), suite_path)
        # Several rungs of one candidate: all from the same memory.
        resident[weight] = [evaluator.evaluate(request_for(held, suite_path, limit=limit)) for limit in (4, None)]
    assert numbers(resident[0.2][1])["tasks"] != numbers(resident[0.7][1])["tasks"]
    for weight, (short, full) in resident.items():
        merged = merge_recipe(make_recipe(checkpoints, weight), tmp_path / str(weight))
        request = EvalRequest(checkpoint=str(merged.path), digest=merged.digest, suite=str(suite_path), role="search")
        assert numbers(evaluator.evaluate(request)) == numbers(full)
        assert short.fidelity == "first-4" and short.is_ok


def test_candidates_held_together_score_as_each_alone(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    recipes = [make_recipe(checkpoints, weight) for weight in (0.2, 0.7, 0.2)]
    together = evaluator.hold(recipes, str(suite_path), memory_bytes=200 * MB)
    assert not isinstance(together, str)
    assert together[0][:3] == together[2][:3] != together[1][:3]
    scores = [numbers(evaluator.evaluate(request_for(held, suite_path))) for held in together]
    alone = []
    for recipe in recipes:
        alone.append(numbers(evaluator.evaluate(request_for(hold(evaluator, recipe, suite_path), suite_path))))
    assert scores == alone


def test_a_name_scores_only_what_is_held_under_it(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    first = hold(evaluator, make_recipe(checkpoints, 0.2), suite_path)
    second = hold(evaluator, make_recipe(checkpoints, 0.7), suite_path)
    with pytest.raises(EvaluationError, match="merge it again"):
        evaluator.evaluate(request_for(first, suite_path))
    with pytest.raises(EvaluationError, match="merge it again"):
        evaluator.evaluate(request_for(second, suite_path, digest=first.digest))
    folder = request_for(second, suite_path, checkpoint=str(checkpoints["first"]), digest="parent")
    assert evaluator.evaluate(folder).is_ok
    # Two models at once might not fit: what was held went when the folder came.
    with pytest.raises(EvaluationError, match="holds nothing"):
        evaluator.evaluate(request_for(second, suite_path))


def test_after_a_failed_merge_nothing_is_held(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    held = hold(evaluator, make_recipe(checkpoints, 0.2), suite_path)
    from remelt_evals import zoo

    alien = {"first": checkpoints["first"], "second": zoo.base()}
    with pytest.raises(MismatchError):
        evaluator.hold([make_recipe(alien, 0.5)], str(suite_path), memory_bytes=200 * MB)
    with pytest.raises(EvaluationError, match="holds nothing"):
        evaluator.evaluate(request_for(held, suite_path))


def test_other_backends_say_that_candidates_go_by_disk(checkpoints: dict[str, Path], suite_path: Path) -> None:
    dummy = Evaluator(BackendOptions(name="dummy"))
    assert "dummy backend loads folders" in str(dummy.hold([make_recipe(checkpoints, 0.2)], str(suite_path)))
    dummy.close()


@pytest.mark.slow
def test_an_evaluator_process_holds_candidates_too(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    recipe = make_recipe(checkpoints, 0.4)
    here = evaluator.evaluate(request_for(hold(evaluator, recipe, suite_path), suite_path))
    with EvaluatorProcess(BackendOptions(threads=1), timeout_seconds=120) as process:
        held = hold(process, recipe, suite_path)
        assert numbers(process.evaluate(request_for(held, suite_path))) == numbers(here)
        with pytest.raises(EvaluationError, match="/nowhere"):
            process.hold([make_recipe({**checkpoints, "first": Path("/nowhere")}, 0.4)], str(suite_path))
        assert process.pid is None
