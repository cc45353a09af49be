"""Columns of the report tables: names, types and meanings, from which come the Arrow schemas and the documentation.

Every row carries all ids that lead to it. Names are those of Every Eval Ever (github.com/evaleval/every_eval_ever,
schema 0.2.1) where it has one for the same thing, and the column then says which; others follow lm-eval and Inspect.
Numbers that are missing are null, never NaN or text; what differs from eval task to eval task (documents, arguments) is
a JSON string, so that all eval tasks share one table.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

SCHEMA_VERSION = 2
"""Raised when a column changes its name, meaning or type; a new column that may be null does not raise it."""

TABLES = ("runs", "metrics", "samples", "trials")

SCHEMA_VERSION_KEY = b"remelt_schema_version"
TABLE_KEY = b"remelt_table"


class Column(NamedTuple):
    """A column of a table."""

    name: str
    kind: str
    """A key of `_arrow_types`."""
    meaning: str
    eee: str = ""
    """The field of Every Eval Ever that holds the same, by its path; `samples.` for the instance level."""


_RESULT = "evaluation_results[]"

_IDS = (
    Column("evaluation_id", "text", "sha256 of what decides the numbers", "evaluation_id"),
    Column("study_id", "text", "sha256 of the study; null outside of studies"),
    Column("trial_id", "text", "study id and trial number"),
    Column("trial_number", "whole", "place in the study, from 0"),
    Column("candidate_id", "text", "the merge that was scored; null for a checkpoint scored as it lies"),
    Column("run_id", "text", "of the merge that made the checkpoint, layout included"),
    Column("digest", "text", "of the scored weights: checkpoint digest, or `fingerprint:` and a hash"),
    Column("suite_digest", "text", "of the suite, its eval tasks and their items"),
)
_SUITE = (
    Column("suite", "text", "the suite's name"),
    Column("role", "text", "whose items: search, selection or report"),
)
_FIDELITY = Column("fidelity", "text", "`full`, or `first-N` items of each eval task")
_TASK = (
    Column("ability", "text", "the entry of the suite"),
    Column("task", "text", "lm-eval's name of the eval task", f"{_RESULT}.evaluation_name"),
)
_METRIC = (
    Column("metric", "text", "lm-eval's name of the metric"),
    Column("filter", "text", "lm-eval's filter of the answers"),
)
_TIMES = (
    Column(
        "started_at", "time", "when the evaluation began; of a trial, when it was asked for", "evaluation_timestamp"
    ),
    Column("finished_at", "time", "when it ended; null while it runs"),
)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "runs": (
        *_IDS,
        *_SUITE,
        _FIDELITY,
        Column("label", "text", "the trial's: `uniform`, a parent's name, or `trial N`"),
        Column("status", "text", "`ok` or `failed`"),
        Column("error", "text", "why it failed", "samples.error"),
        Column("objective", "number", "weighted mean of the entries' scores, negated where lower is better"),
        Column("checkpoint", "text", "folder that was loaded", "model_info.id"),
        Column("recipe_json", "text", "the bound recipe that made it, canonical"),
        Column("parents", "parents", "checkpoints that went into it: uri, revision, digest"),
        Column("coefficients", "map", "the search's variables and their values"),
        Column("backend", "text", "what ran the model", "model_info.inference_engine.name"),
        Column("device", "text", "`cpu`, or the accelerator's name"),
        Column("dtype", "text", "what the model computed in"),
        Column("host", "text", "the machine that it ran on"),
        Column("lm_eval_version", "text", "", "eval_library.version"),
        Column("transformers_version", "text", ""),
        Column("torch_version", "text", ""),
        Column("versions_json", "text", "versions of all that decides the numbers"),
        Column("notes", "texts", "what a reader of the numbers must know"),
        Column("git_commit", "text", "of the caller's code"),
        Column("ray_job_id", "text", "the Ray job that it was part of"),
        *_TIMES,
        Column("merge_seconds", "number", "to make the candidate before it was scored"),
        Column("seconds", "number", "for the evaluation, loading included"),
    ),
    "metrics": (
        *_IDS,
        *_SUITE,
        _FIDELITY,
        *_TASK,
        Column("task_version", "text", "lm-eval's version of the eval task"),
        *_METRIC,
        Column("score", "number", "the value, in the metric's unit", f"{_RESULT}.score_details.score"),
        Column(
            "standard_error",
            "number",
            "of the score: closed form for means, bootstrap over items for rates and perplexities",
            f"{_RESULT}.score_details.uncertainty.standard_error.value",
        ),
        Column(
            "ci_lower",
            "number",
            "score - 1.96 standard errors",
            f"{_RESULT}.score_details.uncertainty.confidence_interval.lower",
        ),
        Column(
            "ci_upper",
            "number",
            "score + 1.96 standard errors",
            f"{_RESULT}.score_details.uncertainty.confidence_interval.upper",
        ),
        Column("num_samples", "whole", "items scored", f"{_RESULT}.score_details.uncertainty.num_samples"),
        Column("num_total", "whole", "items that the eval task holds"),
        Column("is_subset", "flag", "whether fewer items were scored than there are"),
        Column("num_fewshot", "whole", "shots in the prompt"),
        Column("higher_is_better", "flag", "", f"not {_RESULT}.metric_config.lower_is_better"),
        Column("weight", "number", "of the entry in the objective"),
        Column("aggregation", "text", "score from item scores: mean, weighted_mean, exp_weighted_mean, other"),
        Column("sample_ids_hash", "text", "sha256 of the sorted item hashes: equal for equal items"),
    ),
    "samples": (
        *_IDS,
        *_SUITE,
        *_TASK,
        *_METRIC,
        Column("doc_id", "whole", "lm-eval's number of the item", "samples.sample_id"),
        Column("doc_hash", "text", "lm-eval's hash of the item: what pairs it between evaluations"),
        Column("prompt_hash", "text", "lm-eval's hash of the prompt"),
        Column("target_hash", "text", "lm-eval's hash of the target"),
        Column("score", "number", "of the item, in the metric's unit", "samples.evaluation.score"),
        Column("weight", "number", "bytes or words for rates, else 1"),
        Column("is_correct", "flag", "for metrics that are 0 or 1", "samples.evaluation.is_correct"),
        Column("target", "text", "what was right", "samples.input.reference"),
        Column("response", "text", "what the model said, or the choice it preferred", "samples.output.raw"),
        Column("loglik", "numbers", "log-likelihoods in nats of the requests; null for minus infinity"),
        Column("doc_json", "text", "the item as lm-eval read it", "samples.input.raw"),
        Column("arguments_json", "text", "the requests as the model saw them", "samples.input.formatted"),
    ),
    "trials": (
        *_IDS[1:5],
        Column("digest", "text", "of the weights that were scored"),
        Column("evaluation_ids", "texts", "evaluations of this trial: search items first"),
        Column("label", "text", "`uniform`, a parent's name, or `trial N`"),
        Column("origin", "text", "uniform, parent, init or searcher"),
        Column("state", "text", "RUNNING, COMPLETE, STOPPED (on a lower fidelity) or FAILED"),
        _FIDELITY,
        Column("score", "number", "the objective on search items"),
        Column("standard_error", "number", "of the score"),
        Column("scores", "map", "by ability, on search items"),
        Column("standard_errors", "map", "of the scores, by ability"),
        Column("coefficients", "map", "the search's variables and their values"),
        Column("is_winner", "flag", "whether the study published it; null while it has published nothing"),
        Column("asked_after", "whole", "how many trials had finished when it was asked for"),
        Column(
            "finish_place",
            "whole",
            "place in the order of finishing, from 0; an ask had seen those below its asked_after",
        ),
        Column("host", "text", "the machine that it ran on"),
        Column("device", "text", "`cpu`, or the accelerator's name"),
        Column("error", "text", "why it failed"),
        *_TIMES,
        Column("merge_seconds", "number", "to make the candidate"),
        Column("evaluation_seconds", "number", "to score it"),
        Column("seconds", "number", "both, as its evaluator was busy"),
    ),
    "diff": (
        Column("level", "text", "tensor, class or total"),
        Column("name", "text", "of the tensor"),
        Column("class", "text", "tensor class"),
        Column("layer", "whole", "null outside of the layers"),
        Column("dtype_a", "text", ""),
        Column("dtype_b", "text", ""),
        Column("shape", "wholes", ""),
        Column("num_elements", "whole", ""),
        Column("num_changed", "whole", "elements that differ"),
        Column("absolute", "number", "Euclidean distance"),
        Column("rms", "number", "root of the mean squared difference"),
        Column("relative", "number", "distance over the norm of a"),
        Column("cosine", "number", "of the angle between a and b"),
    ),
}

_ABOUT: Mapping[str, str] = {
    "runs": "One row for each evaluation.",
    "metrics": "Long form: one row for each evaluation, eval task and metric.",
    "samples": "One row for each evaluation, eval task, metric and item.",
    "trials": "One row for each trial of a study; its file is written anew with every trial that ends.",
    "diff": "What `remelt diff --parquet` writes; a file of its own, not a table of reports.",
}


def _arrow_types() -> dict[str, Any]:
    import pyarrow as pa

    text, number, whole = pa.string(), pa.float64(), pa.int64()
    return {
        "text": text,
        "number": number,
        "whole": whole,
        "flag": pa.bool_(),
        "time": pa.timestamp("us", tz="UTC"),
        "texts": pa.list_(text),
        "numbers": pa.list_(number),
        "wholes": pa.list_(whole),
        "map": pa.map_(text, number),
        "parents": pa.list_(pa.struct([("uri", text), ("revision", text), ("digest", text)])),
    }


@functools.cache
def table_schema(table: str) -> Any:
    """The `pyarrow.Schema` of one of `TABLES` or of `diff`, with its version in the metadata."""
    import pyarrow as pa

    types = _arrow_types()
    metadata = {SCHEMA_VERSION_KEY: str(SCHEMA_VERSION).encode(), TABLE_KEY: table.encode()}
    return pa.schema([(column.name, types[column.kind]) for column in COLUMNS[table]], metadata=metadata)


def schema_markdown() -> str:
    """The columns of every table as Markdown, for the documentation."""
    parts = []
    for table, columns in COLUMNS.items():
        parts += [f"### `{table}`", "", _ABOUT[table], "", "| column | type | meaning | Every Eval Ever |"]
        parts.append("|---|---|---|---|")
        schema = table_schema(table)
        for column in columns:
            eee = f"`{column.eee}`" if column.eee else ""
            parts.append(f"| `{column.name}` | {schema.field(column.name).type} | {column.meaning} | {eee} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"
