"""Study files are read strictly, and their id is what they ask, not how it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remelt.errors import EvaluationError, RecipeError, RemeltError, StudyError
from remelt.strict_config import dump_yaml
from remelt_jobs.study_config import load_study, parse_study
from study_fixtures import make_document


@pytest.fixture
def document(parents: dict[str, Path], suite_file: Path) -> dict[str, Any]:
    return make_document(parents, suite_file)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": {"trials": 99}},
        {"evaluators": {"count": 7, "cpus": 2, "memory": "4GB", "timeout_seconds": 5}},
        {"reports": "elsewhere"},
        {"cache": "evaluations"},
        {"budget": {"wall_hours": 2.5}},
        {"searcher": {"name": "cmaes", "population": 4, "sigma": 1 / 6}},
    ],
)
def test_what_cannot_change_a_trial_leaves_the_study_id(document: dict[str, Any], change: dict[str, Any]) -> None:
    assert parse_study(document | change).study_id == parse_study(document).study_id


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"searcher": "random"},
        {"searcher": {"name": "cmaes", "population": 5}},
        {"backend": {"name": "hf"}},
        {"finalists": 3},
        {"fidelity": [10]},
        {"objective": "mean rank"},
        {"backend": {"name": "lm_eval", "model": "hf"}},
    ],
)
def test_what_can_change_a_trial_changes_the_study_id(document: dict[str, Any], change: dict[str, Any]) -> None:
    assert parse_study(document | change).study_id != parse_study(document).study_id


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bugdet": {}}, RecipeError, "did you mean 'budget'"),
        ({"budget": {"trails": 9}}, RecipeError, "did you mean 'trials'"),
        ({"budget": {"trials": 4}}, RecipeError, "4 of them are the uniform merge.*at least 5"),
        ({"searcher": "cmae"}, RecipeError, "did you mean 'cmaes'"),
        ({"searcher": {"name": "cmaes", "sgima": 1}}, RecipeError, "did you mean 'sigma'"),
        ({"objective": "hypervolume"}, RecipeError, "macro mean"),
        ({"evaluators": {"memory": "lots"}}, RecipeError, "no size"),
        ({"budget": {}}, RecipeError, "give trials, gpu_hours or wall_hours"),
        ({"budget": {"gpu_hours": 1}}, StudyError, "evaluators ask for no GPU"),
        ({"fidelity": [10, "all"]}, RecipeError, "'all' is no number of items"),
        ({"backend": {"name": "hf", "model": "vllm"}}, RecipeError, "give `name: lm_eval`"),
        (
            {"backend": {"name": "lm_eval", "model": "local-completions", "model_args": {"base_url": "http://h"}}},
            StudyError,
            "name a model of their own",
        ),
        ({"suite": "nowhere.yaml"}, EvaluationError, "nowhere.yaml"),
        ({"recipe": "nowhere.yaml"}, RecipeError, "nowhere.yaml"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    document: dict[str, Any], change: dict[str, Any], error: type[RemeltError], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse_study(document | change)


def test_a_recipe_without_a_range_is_refused(document: dict[str, Any]) -> None:
    models = [{**model, "parameters": {"weight": 0.5}} for model in document["recipe"]["models"]]
    with pytest.raises(RecipeError, match="no variable"):
        parse_study(document | {"recipe": {"merge_method": "linear", "models": models}})


def test_a_suite_without_items_for_a_role_is_refused(
    document: dict[str, Any], suite_file: Path, tmp_path: Path
) -> None:
    text = suite_file.read_text().replace("tasks_dir: tasks", f"tasks_dir: {suite_file.parent / 'tasks'}")
    (tmp_path / "suite.yaml").write_text(text.replace("report: sums_report", "weight: 1"))
    with pytest.raises(StudyError, match="has no report items"):
        parse_study(document | {"suite": str(tmp_path / "suite.yaml")})


def test_public_benchmarks_need_leave(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "name: public\ntasks:\n  - {ability: a, metric: acc, search: arc_easy, selection: boolq, report: piqa}\n"
    )
    document["suite"] = str(tmp_path / "suite.yaml")
    with pytest.raises(StudyError, match="public test sets"):
        parse_study(document)
    assert parse_study(document | {"allow_public_benchmarks": True}).allow_public_benchmarks


def test_paths_are_relative_to_the_study_file(document: dict[str, Any], suite_file: Path, tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(dump_yaml(document["recipe"]))
    (tmp_path / "study.yaml").write_text(dump_yaml(document | {"recipe": "merge.yaml", "reports": "tables"}))
    config = load_study(tmp_path / "study.yaml")
    assert config.study_id == parse_study(document).study_id
    assert config.reports == tmp_path / "tables"
