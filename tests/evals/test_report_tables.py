"""Report tables: every reader sees the same rows, whole files only, ids in every row, nulls for missing numbers."""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pandas
import polars
import pyarrow.parquet as pq
import pytest

from remelt.errors import EvaluationError
from remelt_evals.eval_report import EvalReport, SampleScore, TaskReport
from remelt_evals.report_schemas import (
    COLUMNS,
    SCHEMA_VERSION,
    SCHEMA_VERSION_KEY,
    TABLE_KEY,
    TABLES,
    schema_markdown,
    table_schema,
)
from remelt_evals.report_tables import (
    ParentRow,
    RunContext,
    TrialRow,
    read_table,
    write_diff,
    write_evaluation,
    write_trials,
)
from study_reports import write_study

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


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder)
    return folder


@pytest.mark.parametrize("table", TABLES)
def test_every_column_of_every_table_is_read_by_all_four_readers(table: str, study: Path) -> None:
    arrow = read_table(study, table)
    names = table_schema(table).names
    pattern = str(study / table / "**" / "*.parquet")
    duck = duckdb.sql(f"select * from read_parquet('{pattern}', hive_partitioning = true)")
    polar = polars.read_parquet(pattern, hive_partitioning=True)
    panda = pandas.read_parquet(study / table)
    for found in (duck.columns, polar.columns, list(panda.columns)):
        assert list(found[: len(names)]) == names
        assert set(found[len(names) :]) == {"study", "date"}
    plain = [column.name for column in COLUMNS[table] if column.kind in ("text", "number", "whole", "flag")]
    expected = sorted(map(repr, arrow.select(plain).to_pylist()))
    assert sorted(repr(dict(zip(plain, row, strict=True))) for row in duck.select(*plain).fetchall()) == expected
    assert sorted(map(repr, polar.select(plain).to_dicts())) == expected
    nothing = panda[plain].isna().sum().sum()
    assert nothing == sum(arrow[name].null_count for name in plain)


def test_the_coefficients_of_trials_are_a_map_that_all_four_readers_take_apart(study: Path) -> None:
    pattern = str(study / "trials" / "**" / "*.parquet")
    expected = [pytest.approx(0.1 * number) for number in range(9)]
    assert [dict(row)["w_math"] for row in read_table(study, "trials")["coefficients"].to_pylist()] == expected
    duck = duckdb.sql(f"select coefficients['w_math'] from '{pattern}' order by trial_number").fetchall()
    assert [row[0] for row in duck] == expected
    polar = polars.read_parquet(pattern).sort("trial_number")["coefficients"].to_list()
    assert [dict(row)["w_math"] for row in polar] == expected
    panda = pandas.read_parquet(study / "trials").sort_values("trial_number")["coefficients"]
    assert [dict(row)["w_math"] for row in panda] == expected


def test_several_writers_and_a_reader_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Four threads write evaluations of their own and one that they share, while another reads."""
    began = datetime(2026, 11, 21, tzinfo=UTC)
    write_evaluation(tmp_path, report(0), CONTEXT)
    write_trials(tmp_path, "a", [], study_started_at=began)
    num_writers, num_each, is_done = 4, 4, threading.Event()

    def write(writer: int) -> None:
        for number in range(num_each):
            write_evaluation(tmp_path, report(1 + writer * num_each + number), CONTEXT)
            write_evaluation(tmp_path, report(0, seconds=float(writer)), CONTEXT)
            row = TrialRow(trial_id=f"a-{number}", trial_number=number, state="COMPLETE", score=0.5)
            write_trials(tmp_path, "a", [row] * (number + 1), study_started_at=began)

    def read() -> int:
        seen, num_reads = 0, 0
        while not is_done.is_set():
            runs = read_table(tmp_path, "runs")["evaluation_id"].to_pylist()
            metrics = set(read_table(tmp_path, "metrics")["evaluation_id"].to_pylist())
            # Nothing vanishes, nothing is half there: every run that is listed has its metrics.
            assert len(runs) >= seen
            assert len(set(runs)) == len(runs)
            assert set(runs) <= metrics
            assert len(set(read_table(tmp_path, "trials")["state"].to_pylist())) <= 1
            duckdb.connect().sql(f"select count(*) from '{tmp_path}/metrics/**/*.parquet'").fetchall()
            seen, num_reads = len(runs), num_reads + 1
        return num_reads

    with ThreadPoolExecutor(num_writers + 1) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, writer) for writer in range(num_writers)]
        try:
            for writer in writers:
                writer.result()
        finally:
            is_done.set()
        assert reader.result() > 0
    assert read_table(tmp_path, "runs").num_rows == 1 + num_writers * num_each
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_files_with_other_columns_are_refused_rather_than_read_as_nulls(tmp_path: Path) -> None:
    *_, runs = write_evaluation(tmp_path, report())
    content = pq.read_table(runs, partitioning=None)
    for version, message in (("1", "from an older remelt; evaluate again"), ("99", "from a newer remelt; install")):
        metadata = {SCHEMA_VERSION_KEY: version.encode(), TABLE_KEY: b"runs"}
        pq.write_table(content.replace_schema_metadata(metadata), runs)
        with pytest.raises(EvaluationError, match=message):
            read_table(tmp_path, "runs")
    pq.write_table(content.replace_schema_metadata(None), runs)
    with pytest.raises(EvaluationError, match="is no file of table runs"):
        read_table(tmp_path, "runs")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    *_, runs = write_evaluation(tmp_path, report())
    runs.write_bytes(runs.read_bytes()[:-5])
    with pytest.raises(EvaluationError, match=r"runs cannot be read as table runs: .*part-"):
        read_table(tmp_path, "runs")


def test_a_column_that_came_later_is_null_in_files_from_before(tmp_path: Path) -> None:
    *_, runs = write_evaluation(tmp_path, report())
    content = pq.read_table(runs, partitioning=None)
    pq.write_table(content.drop_columns(["host"]), runs)
    write_evaluation(tmp_path, report(1), dataclasses.replace(CONTEXT, host="node-7"))
    assert sorted(map(str, read_table(tmp_path, "runs")["host"].to_pylist())) == ["None", "node-7"]


def test_only_files_that_can_matter_are_opened(tmp_path: Path) -> None:
    *_, other = write_evaluation(tmp_path, report(1))
    write_evaluation(tmp_path, report(0), CONTEXT)
    other.write_bytes(b"damaged")
    assert read_table(tmp_path, "runs", filters={"study": ["0123"]}).num_rows == 1
    found = read_table(tmp_path, "runs", columns=["digest"], filters={"evaluation_id": [report(0).evaluation_id]})
    assert found.to_pylist() == [{"digest": "d" * 64}]
    assert read_table(tmp_path, "runs", filters={"evaluation_id": ["nothing"]}).num_rows == 0


def test_the_documentation_lists_every_column_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    assert schema_markdown() in text
    assert f"version {SCHEMA_VERSION}" in text
    for columns in COLUMNS.values():
        assert all(column.meaning or column.name in text for column in columns)


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
