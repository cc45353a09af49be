"""Columns of the report tables, as Arrow schemas.

Every row carries all ids that lead to it. Names follow what users of evaluation logs know (Inspect, Every Eval Ever)
where they have one. Numbers that are missing are null, never NaN or text; what differs from eval task to eval task
(documents, arguments) is a JSON string, so that all tasks share one table.
"""

from __future__ import annotations

import functools
from typing import Any

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning or type; a new column that may be null does not raise it."""

TABLES = ("runs", "metrics", "samples", "trials")

SCHEMA_VERSION_KEY = b"remelt_schema_version"
TABLE_KEY = b"remelt_table"


@functools.cache
def table_schema(table: str) -> Any:
    """The `pyarrow.Schema` of one of `TABLES` or of `diff`, with its version in the metadata."""
    import pyarrow as pa

    text, number, whole, flag = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    time = pa.timestamp("us", tz="UTC")
    ids = [
        ("evaluation_id", text),
        ("study_id", text),
        ("trial_id", text),
        ("trial_number", whole),
        ("candidate_id", text),
        ("run_id", text),
        ("digest", text),
        ("suite_digest", text),
    ]
    parent = pa.struct([("uri", text), ("revision", text), ("digest", text)])
    columns = {
        # One row for each evaluation.
        "runs": [
            *ids,
            ("suite", text),
            ("role", text),
            ("fidelity", text),
            ("status", text),
            ("error", text),
            ("objective", number),
            ("checkpoint", text),
            ("recipe_json", text),
            ("parents", pa.list_(parent)),
            ("coefficients", pa.map_(text, number)),
            ("backend", text),
            ("device", text),
            ("dtype", text),
            ("lm_eval_version", text),
            ("transformers_version", text),
            ("torch_version", text),
            ("versions_json", text),
            ("notes", pa.list_(text)),
            ("git_commit", text),
            ("ray_job_id", text),
            ("started_at", time),
            ("finished_at", time),
            ("seconds", number),
        ],
        # Long form: one row for each evaluation, eval task and metric.
        "metrics": [
            *ids,
            ("suite", text),
            ("role", text),
            ("fidelity", text),
            ("ability", text),
            ("task", text),
            ("task_version", text),
            ("metric", text),
            ("filter", text),
            ("value", number),
            ("stderr", number),
            ("ci_low", number),
            ("ci_high", number),
            ("n_samples", whole),
            ("n_total", whole),
            ("is_subset", flag),
            ("num_fewshot", whole),
            ("higher_is_better", flag),
            ("weight", number),
            ("aggregation", text),
            ("sample_ids_hash", text),
        ],
        # One row for each evaluation, eval task, metric and item.
        "samples": [
            *ids,
            ("suite", text),
            ("role", text),
            ("ability", text),
            ("task", text),
            ("metric", text),
            ("filter", text),
            ("doc_id", whole),
            ("doc_hash", text),
            ("prompt_hash", text),
            ("target_hash", text),
            ("score", number),
            ("weight", number),
            ("correct", flag),
            ("target", text),
            ("response", text),
            ("loglik", pa.list_(number)),
            ("doc_json", text),
            ("arguments_json", text),
        ],
        # One row for each trial of a study.
        "trials": [
            ("study_id", text),
            ("trial_id", text),
            ("trial_number", whole),
            ("candidate_id", text),
            ("evaluation_ids", pa.list_(text)),
            ("label", text),
            ("state", text),
            ("score", number),
            ("scores", pa.map_(text, number)),
            ("coefficients", pa.map_(text, number)),
            ("error", text),
            ("started_at", time),
            ("finished_at", time),
            ("seconds", number),
        ],
        # What `remelt diff --parquet` writes: `level` is tensor, class or total.
        "diff": [
            ("level", text),
            ("name", text),
            ("class", text),
            ("layer", whole),
            ("dtype_a", text),
            ("dtype_b", text),
            ("shape", pa.list_(whole)),
            ("num_elements", whole),
            ("num_changed", whole),
            ("absolute", number),
            ("rms", number),
            ("relative", number),
            ("cosine", number),
        ],
    }
    metadata = {SCHEMA_VERSION_KEY: str(SCHEMA_VERSION).encode(), TABLE_KEY: table.encode()}
    return pa.schema(columns[table], metadata=metadata)
