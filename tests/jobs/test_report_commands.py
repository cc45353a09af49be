"""`remelt report` on the command line: what it prints, what it writes, what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command import Command, the_line
from remelt_evals.eval_report import macro_standard_error
from remelt_evals.report_tables import read_table, write_evaluation
from remelt_jobs.candidates import starting_candidates
from remelt_jobs.study_config import parse_study
from remelt_jobs.study_state import StudyState, outcome_fields
from remelt_jobs.study_tables import write_candidate, write_trials_so_far
from remelt_jobs.trial import Outcome
from study_fixtures import make_document
from study_reports import STUDY_ID, make_report, write_study


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's output."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder / "reports")
    return folder


def test_show_lists_the_trials_of_the_last_study_best_first(remelt: Command, study: Path) -> None:
    run = remelt("report", "show", study)
    assert (run.status, run.err) == (0, "")
    lines = run.out.splitlines()
    assert lines[0] == f"study {STUDY_ID[:12]}, trials:"
    assert lines[1].split() == ["trial", "label", "state", "score", "words", "prose", "where", "seconds", "error"]
    numbers = [int(line.split()[0]) for line in lines[2:-1]]
    assert lines[-1] == "* published by the study"
    assert numbers == [8, 6, 5, 2, 4, 1, 0, 3, 7]
    assert "trial 6 *" in lines[3] and "±" in lines[3] and "node-1 cpu" in lines[3]
    assert "failed" in lines[-2] and "the evaluator was killed" in lines[-2]


def test_show_sorts_and_limits(remelt: Command, study: Path) -> None:
    run = remelt("report", "show", study, "--sort", "-trial_number", "--limit", 2)
    assert [line.split()[0] for line in run.out.splitlines()[2:4]] == ["0", "1"]
    assert run.out.splitlines()[-1] == "7 more; --limit 0 shows all"
    by_ability = json.loads(remelt("report", "show", study, "--sort", "words", "--json").out)
    assert [row["trial_number"] for row in by_ability][:3] == [8, 6, 5]
    line = the_line(remelt("report", "show", study, "--sort", "scroe"))
    assert line.startswith("table trials has no column 'scroe'; did you mean 'score'?")
    assert "has no order" in the_line(remelt("report", "show", study, "--sort", "coefficients"))


@pytest.mark.parametrize(("table", "rows"), [("trials", 9), ("runs", 15), ("metrics", 30), ("samples", 1200)])
def test_show_has_every_table_for_people_and_for_machines(table: str, rows: int, remelt: Command, study: Path) -> None:
    run = remelt("report", "show", study, "--table", table, "--limit", 0)
    assert run.status == 0
    assert len(run.out.splitlines()) == rows + 2 + (table == "trials")
    found = json.loads(remelt("report", "show", study, "--table", table, "--limit", 3, "--json").out)
    assert len(found) == 3 and all(row["study_id"] == STUDY_ID for row in found)


def test_show_without_a_study_lists_what_was_evaluated(remelt: Command, tmp_path: Path) -> None:
    for number in range(2):
        write_evaluation(tmp_path, make_report(f"{number}" * 64, "report", 0.5 + 0.1 * number))
    lines = remelt("report", "show", tmp_path).out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "11111111", "00000000"]
    assert "holds no study" in the_line(remelt("report", "show", tmp_path, "--table", "trials"))
    assert "holds no study" in the_line(remelt("report", "front", tmp_path))


def test_compare_says_where_b_is_worse(remelt: Command, study: Path) -> None:
    run = remelt("report", "compare", study, "best", "math")
    assert (run.status, run.err) == (0, "")
    assert "B is worse on: words, prose" in run.out
    assert "words: 12 items lost, 0 won of 40" in run.out
    assert "lost item 16: A 'answer 1', B 'answer 0'; target '0'" in run.out
    found = json.loads(remelt("report", "compare", study, "best", "math", "--json").out)
    assert found["macro"]["high"] < 0 and found["role"] == "report"
    assert [task["num_lost"] for task in found["tasks"]] == [12, 40]
    assert "clearly worse on nothing" in remelt("report", "compare", study, "math", "best").out
    one = remelt("report", "compare", study, "math", "best", "--task", "words").out
    assert "words" in one and "prose" not in one and "macro" not in one


def test_compare_refuses_in_one_line(remelt: Command, study: Path) -> None:
    assert "trial 3 was not scored on report items" in the_line(remelt("report", "compare", study, "best", "trial 3"))
    assert "no evaluation is called" in the_line(remelt("report", "compare", study, "best", "nobody"))
    assert "none begins so" in the_line(remelt("report", "compare", study, "best", "math", "--study", "beef"))


def test_front_lists_the_undominated(remelt: Command, study: Path) -> None:
    run = remelt("report", "front", study, "--role", "report")
    assert run.out.splitlines()[0].split() == ["trial", "words", "prose", "(lower", "is", "better)"]
    assert run.out.splitlines()[1].startswith("trial 6")
    assert "1 of 4 trials, report items, fidelity full; 5 trials without these scores" in run.out
    found = json.loads(remelt("report", "front", study, "--objectives", "prose,score", "--json").out)
    assert [one["name"] for one in found["objectives"]] == ["prose", "score"]
    assert found["front"][0]["coefficients"]["w_math"] == pytest.approx(0.8)
    assert "did you mean 'prose'" in the_line(remelt("report", "front", study, "--objectives", "pross"))


def test_pull_prints_what_came_and_leaves_what_is_here(remelt: Command, study: Path, tmp_path: Path) -> None:
    command = ("report", "pull", "--from", study / "reports", "--since", "2026-11-20", "--to", tmp_path / "here")
    run = remelt(*command)
    assert run.status == 0
    assert run.out.splitlines()[-1].startswith("46 files (")
    assert "; 0 were here already" in run.out
    again = remelt(*command)
    assert again.out.startswith("0 files (0 B) came to") and "46 were here already" in again.out
    assert remelt("report", "show", tmp_path / "here").out == remelt("report", "show", study).out


def test_pull_refuses_in_one_line_and_exits_2(remelt: Command, study: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for source, message in (("nope://x", "cannot be opened"), (tmp_path / "none", "there is nothing")):
        assert message in the_line(remelt("report", "pull", "--from", source, "--since", "2026-11-20", "--to", here))
    assert "yesterday" in the_line(remelt("report", "pull", "--from", study, "--since", "yesterday", "--to", here))
    broken = shutil.copytree(study / "reports", tmp_path / "broken")
    next(broken.glob("runs/**/*.parquet")).write_bytes(b"PAR1")
    run = remelt("report", "pull", "--from", broken, "--since", "2026-11-20", "--to", here)
    assert run.status == 2 and run.out.startswith("study")
    assert run.err.startswith("remelt: 1 files were left out: runs/")


def test_export_writes_lm_evals_json(remelt: Command, study: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "results.json"
    run = remelt("report", "export", study, "best", "--role", "report", "--output", output)
    assert run.status == 0
    assert run.out.startswith(f"wrote {output}: trial 6 on report items")
    found = json.loads(output.read_text())
    assert found["results"]["words_report"]["acc,none"] == 0.7
    assert "has several evaluations" in the_line(remelt("report", "export", study, "best", "--output", output))


def test_html_writes_one_page(remelt: Command, study: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    run = remelt("report", "html", study, "--output", output)
    assert (run.status, run.out) == (0, f"wrote {output}: study {STUDY_ID[:12]}\n")
    assert output.read_text().startswith("<!doctype html>")


def test_a_folder_without_reports_is_refused(remelt: Command, tmp_path: Path) -> None:
    for command in ("show", "front"):
        assert "holds no reports" in the_line(remelt("report", command, tmp_path))
    assert "is no folder" in the_line(remelt("report", "show", tmp_path / "nowhere"))


def test_a_study_writes_all_that_show_wants_of_a_trial(
    parents: dict[str, Path], suite_file: Path, remelt: Command, tmp_path: Path
) -> None:
    """The study's own writer, without running one: what it is told of a trial, `show` prints, and it reads one file."""
    config = parse_study(make_document(parents, suite_file))
    state = StudyState()
    at = "2026-11-21T10:00:00.000+00:00"
    state.apply({"type": "study", "at": at, "inputs": {}})
    starts = starting_candidates(config.recipe, config.space)[:3]
    for candidate in starts:
        state.apply({"type": "asked", "at": at, "candidate": candidate.to_record(), "asked_after": 0})
    for number, skill in ((1, 0.4), (0, 0.6)):
        report = make_report(f"{number}" * 64, "search", skill)
        outcome = Outcome(report=report, digest="d" * 64, merge_seconds=1.5, seconds=4.0, where="node-3")
        state.apply({"type": "finished", "at": at, "trial": number, **outcome_fields(outcome)})
        inputs = {ref.name: "identity" for ref in config.recipe.checkpoints}
        write_candidate(tmp_path, config, inputs, starts[number], outcome)
    state.apply({"type": "published", "at": at, "trial": 0, "digest": "d" * 64})
    write_trials_so_far(tmp_path, config, state)

    (first, second, third) = read_table(tmp_path, "trials").to_pylist()
    assert (first["standard_error"], first["host"], first["fidelity"]) == (
        pytest.approx(macro_standard_error(report)),
        "node-3",
        "full",
    )
    assert (first["merge_seconds"], first["evaluation_seconds"], first["origin"]) == (1.5, 2.5, "uniform")
    assert [row["finish_place"] for row in (first, second, third)] == [1, 0, None]
    assert [row["is_winner"] for row in (first, second, third)] == [True, False, False]
    assert {row["label"]: row["host"] for row in read_table(tmp_path, "runs").to_pylist()} == {
        "uniform": "node-3",
        starts[1].label: "node-3",
    }
    shutil.rmtree(tmp_path / "runs")
    lines = remelt("report", "show", tmp_path).out.splitlines()
    assert "uniform *" in lines[2] and "node-3" in lines[2] and "±" in lines[2]
    assert "running" in lines[4]
