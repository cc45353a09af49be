"""Report tables: every reader sees the same rows, whole files only, ids in every row, nulls for missing numbers."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pandas
import polars
import pyarrow.parquet as pq
import pytest

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, SampleScore, TaskReport
from remelt_evals.report_schemas import SCHEMA_VERSION, SCHEMA_VERSION_KEY, table_schema
from remelt_evals.report_tables import (
    ParentRow,
    RunContext,
    TrialRow,
    read_table,
    write_diff,
    write_evaluation,
    write_trials,
)

CONTEXT = RunContext(
    study_id="0123",
    trial_id="0123-7",
    trial_number=7,
    candidate_id="c" * 64,
    recipe_json="{}",
    parents=(ParentRow("org/math", "main", "d"), ParentRow("./code")),
    coefficients={"w_math": 0.25, "w_code": 0.75},
)


def sample(number: int, score: float | None) -> SampleScore:
    return SampleScore(
        doc_id=number,
        doc_hash=f"doc{number}",
        prompt_hash=f"prompt{number}",
        target_hash=f"target{number}",
        score=score,
        weight=1.0,
        correct=None if score is None else score == 1.0,
        target="1",
        response="b",
        loglik=(-1.5, None, -2.0),
        doc_json='{"question": "é"}',
        arguments_json="[]",
    )


def report(number: int = 0, **changes: object) -> EvalReport:
    task = TaskReport(
        ability="words",
        task="words_search",
        task_version="1.0",
        metric="acc",
        filter="none",
        value=0.5,
        stderr=None if number else 0.1,
        n=3,
        n_total=12,
        higher_is_better=True,
        weight=1.0,
        num_fewshot=0,
        aggregation="mean",
        samples=(sample(0, 1.0), sample(1, 0.0), sample(2, None)),
    )
    fields = {
        "evaluation_id": f"{number:064x}",
        "checkpoint": "/somewhere",
        "digest": "d" * 64,
        "suite": "tiny",
        "suite_digest": "s" * 64,
        "role": "search",
        "fidelity": "full",
        "backend": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "versions": {"lm-eval": "0.4.13"},
        "tasks": (task,),
        "notes": ("one",),
        "started_at": "2026-11-20T23:30:00.000001-05:00",
        "seconds": 2.5,
    }
    return EvalReport(**fields | changes)  # type: ignore[arg-type]


def test_files_lie_where_study_and_utc_date_say(tmp_path: Path) -> None:
    files = write_evaluation(tmp_path, report(), CONTEXT)
    part = f"study=0123/date=2026-11-21/part-{0:064x}.parquet"
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        f"{table}/{part}" for table in ("samples", "metrics", "runs")
    ]
    (runs,) = write_evaluation(tmp_path, report())[2:]
    assert runs.parent.parent.name == "study=none"
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]


@pytest.mark.parametrize("table", ["runs", "metrics", "samples"])
def test_all_four_readers_see_the_same_rows(table: str, tmp_path: Path) -> None:
    write_evaluation(tmp_path, report(0), CONTEXT)
    write_evaluation(tmp_path, report(1), CONTEXT)
    write_evaluation(tmp_path, report(2))
    pattern = str(tmp_path / table / "**" / "*.parquet")
    arrow = read_table(tmp_path, table)
    num_rows = 9 if table == "samples" else 3
    key = ["evaluation_id", "doc_id"] if table == "samples" else ["evaluation_id"]
    expected = sorted(zip(*(arrow[name].to_pylist() for name in key), strict=True))
    assert len(expected) == num_rows
    assert sorted(set(arrow["study"].to_pylist())) == ["0123", "none"]
    order = ", ".join(key)
    duck = duckdb.sql(f"select {order} from read_parquet('{pattern}', hive_partitioning = true) order by {order}")
    assert duck.fetchall() == expected
    polar = polars.read_parquet(pattern, hive_partitioning=True)
    assert sorted(polar.select(key).rows()) == expected
    panda = pandas.read_parquet(tmp_path / table)
    assert sorted(panda[key].itertuples(index=False, name=None)) == expected
    # Every id of the context is in every row that has a study.
    for name in ("study_id", "trial_id", "trial_number", "candidate_id", "digest", "suite_digest"):
        value = getattr(CONTEXT, name, None) or getattr(report(), name, None)
        mine = polar.filter(polars.col("study_id").is_not_null())
        assert set(mine[name].to_list()) == {value}


def test_missing_numbers_are_null_in_every_reader(tmp_path: Path) -> None:
    write_evaluation(tmp_path, report(1), CONTEXT)
    metrics = str(tmp_path / "metrics" / "**" / "*.parquet")
    assert read_table(tmp_path, "metrics")["standard_error"].to_pylist() == [None]
    assert duckdb.sql(
        f"select standard_error is null, ci_lower is null, typeof(standard_error) from '{metrics}'"
    ).fetchall() == [(True, True, "DOUBLE")]
    samples = read_table(tmp_path, "samples")
    assert samples["score"].to_pylist() == [1.0, 0.0, None]
    assert samples["is_correct"].to_pylist() == [True, False, None]
    assert samples["loglik"].to_pylist()[0] == [-1.5, None, -2.0]
    assert polars.read_parquet(metrics)["standard_error"].null_count() == 1


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write_evaluation(tmp_path, report(), CONTEXT)
    (run,) = read_table(tmp_path, "runs").to_pylist()
    assert run["parents"] == [
        {"uri": "org/math", "revision": "main", "digest": "d"},
        {"uri": "./code", "revision": None, "digest": None},
    ]
    assert dict(run["coefficients"]) == CONTEXT.coefficients
    assert run["objective"] == 0.5
    assert run["started_at"] == datetime(2026, 11, 21, 4, 30, 0, 1, tzinfo=UTC)
    assert (run["finished_at"] - run["started_at"]).total_seconds() == 2.5
    (metric,) = read_table(tmp_path, "metrics").to_pylist()
    assert metric["is_subset"] is True
    assert metric["ci_upper"] - metric["ci_lower"] == pytest.approx(2 * 1.959964 * 0.1)


def test_a_failed_evaluation_is_a_run_without_metrics(tmp_path: Path) -> None:
    write_evaluation(tmp_path, report(status="failed", error="NaN", tasks=()), CONTEXT)
    (run,) = read_table(tmp_path, "runs").to_pylist()
    assert (run["status"], run["error"], run["objective"]) == ("failed", "NaN", None)
    assert read_table(tmp_path, "metrics").num_rows == read_table(tmp_path, "samples").num_rows == 0


def test_the_schema_version_is_in_the_file(tmp_path: Path) -> None:
    for file in write_evaluation(tmp_path, report()):
        assert pq.read_schema(file).metadata[SCHEMA_VERSION_KEY] == str(SCHEMA_VERSION).encode()


def test_writing_again_replaces(tmp_path: Path) -> None:
    write_evaluation(tmp_path, report(), CONTEXT)
    write_evaluation(tmp_path, report(seconds=9.0), CONTEXT)
    assert read_table(tmp_path, "runs")["seconds"].to_pylist() == [9.0]


def test_trials_are_one_file_for_a_study(tmp_path: Path) -> None:
    began = datetime(2026, 11, 21, 23, 59, tzinfo=UTC)
    first = TrialRow(trial_id="a-0", trial_number=0, state="RUNNING", label="uniform", coefficients={"w": 0.5})
    write_trials(tmp_path, "a", [first], study_started_at=began)
    done = dataclasses.replace(
        first, state="COMPLETE", score=0.25, scores={"words": 0.25}, evaluation_ids=("e",), started_at=began
    )
    failed = TrialRow(trial_id="a-1", trial_number=1, state="FAILED", score=math.nan, error="killed")
    path = write_trials(tmp_path, "a", [done, failed], study_started_at=began)
    assert path.parent.name == "date=2026-11-21"
    rows = read_table(tmp_path, "trials").to_pylist()
    assert [(row["trial_number"], row["state"], row["score"]) for row in rows] == [
        (0, "COMPLETE", 0.25),
        (1, "FAILED", None),
    ]
    assert dict(rows[0]["scores"]) == {"words": 0.25}


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="reports have no table 'scores': there are runs, metrics"):
        read_table(tmp_path, "scores")
    with pytest.raises(EvaluationError, match="holds no table runs"):
        read_table(tmp_path, "runs")


def test_a_diff_is_one_file_with_every_column(tmp_path: Path) -> None:
    rows = [
        {"level": "tensor", "name": "t", "class": "mlp", "layer": 3, "shape": [2, 3], "num_elements": 6, "cosine": 0.5},
        {"level": "total", "name": None, "class": None, "layer": None, "shape": None, "cosine": math.nan},
    ]
    path = write_diff(rows, tmp_path / "new" / "diff.parquet")
    back = pq.read_table(path)
    assert back.schema.names == table_schema("diff").names
    assert back["cosine"].to_pylist() == [0.5, None]
    assert back["shape"].to_pylist() == [[2, 3], None]
    with pytest.raises(ValueError, match="unknown keys nmae"):
        write_diff([{"nmae": 1}], tmp_path / "x.parquet")


def test_a_diff_of_the_pipeline_fits_the_table(tmp_path: Path) -> None:
    from remelt.diff import DiffReport, Distance, TensorDistance

    tensor = TensorDistance("t", "mlp", 3, "F32", "BF16", (2, 3), Distance(6, 1, 1.0, 1.0, 0.5, 1.0))
    rows = DiffReport("a", "b", (tensor,), (), (), (), ()).to_table()
    assert {key for row in rows for key in row} == set(table_schema("diff").names)
    assert pq.read_table(write_diff(rows, tmp_path / "diff.parquet")).num_rows == 3
