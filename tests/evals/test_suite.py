"""Suites: read strictly, hashed by content."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from remelt.errors import EvaluationError
from remelt_evals.suite import load_suite


def test_a_suite_names_its_tasks_by_role(suite_path: Path) -> None:
    suite = load_suite(suite_path)
    assert suite.roles == ("search", "selection", "report")
    assert suite.task_names("report") == ("words_report", "prose_report")
    assert [(task.ability, task.metric, task.weight) for task in suite.tasks] == [
        ("words", "acc", 1.0),
        ("prose", "bits_per_byte", 0.5),
    ]
    assert suite.is_local
    assert Path(suite.task_files["words_search"].data_files["test"]).is_absolute()
    assert pickle.loads(pickle.dumps(suite)) == suite


def test_the_digest_follows_content_and_not_place(suite_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(suite_path.parent, tmp_path / "copy")
    digest = load_suite(suite_path).digest
    assert load_suite(copy / "suite.yaml").digest == digest
    (copy / "tasks" / "unused.yaml").write_text("task: unused\n")
    (copy / "suite.yaml").write_text("# a comment\n" + suite_path.read_text())
    assert load_suite(copy / "suite.yaml").digest == digest
    seen = {digest}
    for name in ("prose_report.jsonl", "words_search.yaml"):
        file = copy / "tasks" / name
        file.write_text(file.read_text() + "\n")
        seen.add(load_suite(copy / "suite.yaml").digest)
    (copy / "suite.yaml").write_text(suite_path.read_text().replace("weight: 0.5", "weight: 0.6"))
    seen.add(load_suite(copy / "suite.yaml").digest)
    assert len(seen) == 4


def test_includes_are_followed_and_hashed(make_suite: Callable[..., Path]) -> None:
    path = make_suite()
    tasks = path.parent / "tasks"
    (tasks / "shared").mkdir()
    whole = (tasks / "words_report.yaml").read_text()
    head, rest = whole.split("\n", 1)
    (tasks / "shared" / "words.yaml").write_text(rest.replace("words_report.jsonl", "../words_report.jsonl"))
    (tasks / "words_report.yaml").write_text(f"{head}\ninclude: shared/words.yaml\n")
    suite = load_suite(path)
    assert suite.task_files["words_report"].data_files == {"test": str((tasks / "words_report.jsonl").resolve())}
    assert "tasks/shared/words.yaml" in dict(suite.task_files["words_report"].file_digests)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size", "batchsize", r"unknown key 'batchsize'; did you mean 'batch_size'\?"),
        ("search: words_search", "serach: words_search", r"tasks\[0\]: unknown key 'serach'; did you mean 'search'\?"),
        ("words_search", "word_search", r"defines no lm-eval task 'word_search'; did you mean 'words_search'\?"),
        ("tasks_dir: tasks", "tasks_dir: elsewhere", r"tasks_dir .*elsewhere is no folder"),
        ("weight: 0.5", "weight: 0", r"tasks\[1\].weight: 0 leaves the task out"),
        ("weight: 0.5", "weight: -1", r"tasks\[1\].weight"),
        ("weight: 0.5", "limit: 0", r"tasks\[1\].limit: 0 is outside \[1"),
        ("num_fewshot: 0", "num_fewshot: 1.5", r"num_fewshot: expected a whole number"),
        ("report: words_report", "report: words_search", r"words_search serves search and report"),
        ("name: tiny", "", r"the key 'name' is missing"),
    ],
)
def test_a_suite_that_says_something_impossible_is_refused(
    old: str, new: str, message: str, suite_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(suite_path.parent / "tasks", tmp_path / "tasks")
    (tmp_path / "suite.yaml").write_text(suite_path.read_text().replace(old, new))
    with pytest.raises(EvaluationError, match=message):
        load_suite(tmp_path / "suite.yaml")


def test_a_missing_data_file_is_named(make_suite: Callable[..., Path]) -> None:
    path = make_suite()
    (path.parent / "tasks" / "prose_search.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"names the data file .*prose_search\.jsonl, which does not exist"):
        load_suite(path)


def test_a_role_that_a_task_lacks_is_refused_by_name(suite_path: Path, tmp_path: Path) -> None:
    shutil.copytree(suite_path.parent / "tasks", tmp_path / "tasks")
    text = suite_path.read_text().replace(" selection: prose_selection,", "")
    (tmp_path / "suite.yaml").write_text(text)
    suite = load_suite(tmp_path / "suite.yaml")
    assert suite.roles == ("search", "report")
    with pytest.raises(EvaluationError, match="has no selection items for prose"):
        suite.task_names("selection")


def test_lm_eval_names_without_a_folder_make_a_suite_that_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "name: public\ntasks:\n  - {ability: science, metric: acc_norm, report: arc_easy, limit: 100}\n"
    )
    suite = load_suite(tmp_path / "suite.yaml")
    assert not suite.is_local
    assert suite.task_names("report") == ("arc_easy",)
