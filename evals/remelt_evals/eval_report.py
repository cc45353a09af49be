"""What goes into an evaluation and what comes out: frozen, picklable, canonical as JSON.

    EvalRequest --Evaluator.evaluate--> EvalReport(TaskReport(SampleScore...)...) --objective--> float

A score that does not exist is None, never NaN: JSON has no NaN, and a search must not rank by one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from remelt.errors import EvaluationError

Role: TypeAlias = Literal["search", "selection", "report"]
"""What a set of items is for; the three never share an item, so that the reported number was never optimised."""

ROLES: tuple[Role, ...] = ("search", "selection", "report")

IN_MEMORY = "memory:"
"""What stands before a candidate id in the place of a checkpoint's folder."""

Status: TypeAlias = Literal["ok", "failed"]

Aggregation: TypeAlias = Literal["mean", "weighted_mean", "exp_weighted_mean", "other"]
"""How a task's value comes from its sample scores s with weights v: mean s; sum v s / sum v; exp of that; or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """One checkpoint to be scored on the items of one role of a suite."""

    checkpoint: str
    """Folder that the backend loads, or a `HeldCandidate`'s name."""
    digest: str
    """Checkpoint digest or candidate id: what identifies the weights, wherever they lie."""
    suite: str
    """Path of the suite's YAML file."""
    role: Role
    limit: int | None = None
    """At most this many items of each eval task, the first ones; None is all that the suite says."""
    suite_digest: str | None = None
    """Where given, a suite with another digest is refused: its files were changed under the study."""
    entries: tuple[int, ...] | None = None
    """Places in the suite's list of tasks, to score these alone; None is all of them."""

    @property
    def fidelity(self) -> str:
        """`full`, or `first-N`."""
        return "full" if self.limit is None else f"first-{self.limit}"


class HeldCandidate(NamedTuple):
    """A candidate that an evaluator has in its memory."""

    checkpoint: str
    """For requests, in the place of a folder; good until the evaluator holds other candidates or loads a folder."""
    digest: str
    """As a merge to disk has it."""
    candidate_id: str
    seconds: float
    """For the merge of all that were merged with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """One item of one eval task, scored by the suite's metric."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    score: float | None
    """In the metric's unit; for rates per byte or word, that of this item alone. None where a metric has no per-item
    value."""
    weight: float
    """Bytes or words of the item for `weighted_mean`, else 1."""
    correct: bool | None
    """For metrics that are 0 or 1."""
    target: str
    response: str
    """What the model said; the choice it preferred; empty for rolling likelihoods."""
    loglik: tuple[float | None, ...]
    """Log-likelihoods in nats of the requests (one for each choice), None for minus infinity; empty for generation."""
    doc_json: str
    arguments_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """One eval task's value."""

    ability: str
    task: str
    """lm-eval's name."""
    task_version: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    """Standard error of `value`: closed form for means, a seeded bootstrap over items for the others."""
    n: int
    """Items scored."""
    n_total: int
    """Items that the eval task holds."""
    higher_is_better: bool
    weight: float
    """In the objective."""
    num_fewshot: int
    aggregation: Aggregation
    samples: tuple[SampleScore, ...] = ()

    @property
    def oriented_value(self) -> float:
        """The value, negated where lower is better."""
        return self.value if self.higher_is_better else -self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """All that one evaluation found. With status `failed` there may be no tasks, and `error` says why."""

    evaluation_id: str
    checkpoint: str
    digest: str
    suite: str
    """The suite's name."""
    suite_digest: str
    role: Role
    fidelity: str
    backend: str
    device: str
    """`cpu`, or the accelerator's name."""
    dtype: str
    """What the model computed in."""
    versions: Mapping[str, str] = field(default_factory=dict)
    status: Status = "ok"
    error: str | None = None
    tasks: tuple[TaskReport, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know, such as items shared between roles."""
    started_at: str
    """ISO 8601, UTC."""
    seconds: float

    @property
    def is_ok(self) -> bool:
        return self.status == "ok"


def objective(report: EvalReport) -> float:
    """The number that a search maximises: sum of w v over sum of w, over the suite's entries.

    v is an entry's value, negated where lower is better (bits per byte, perplexity); w is its `weight`. With one entry
    for each ability and equal weights this is the macro average over abilities.

    Raises:
        EvaluationError: the evaluation failed, so that there is no number.
    """
    if not report.is_ok:
        raise EvaluationError(f"evaluation {report.evaluation_id[:12]} failed and has no objective: {report.error}")
    total = sum(task.weight for task in report.tasks)
    return sum(task.weight * task.oriented_value for task in report.tasks) / total


def macro_standard_error(report: EvalReport) -> float | None:
    """Of the objective, its entries taken as independent: sqrt(sum (w s)^2) / sum w; None where one has none."""
    terms = [task.weight * task.stderr for task in report.tasks if task.stderr is not None]
    if not terms or len(terms) < len(report.tasks):
        return None
    return math.hypot(*terms) / sum(task.weight for task in report.tasks)


class _Entry(Protocol):
    @property
    def ability(self) -> str: ...

    @property
    def metric(self) -> str: ...


def entry_names(entries: Sequence[_Entry]) -> list[str]:
    """A name for each entry of a suite: its ability, with its metric where an ability has several."""
    names = [entry.ability for entry in entries]
    return [
        entry.ability if names.count(entry.ability) == 1 else f"{entry.ability} {entry.metric}" for entry in entries
    ]


def evaluation_id(request: EvalRequest, suite_digest: str, backend: Mapping[str, Any]) -> str:
    """sha256 of what decides the numbers: weights, items, fidelity, backend with its options and versions.

    Args:
        backend: `Backend.identity()`: name, options and versions.
    """
    content: dict[str, Any] = {
        "digest": request.digest,
        "suite": suite_digest,
        "role": request.role,
        "fidelity": request.fidelity,
        "backend": dict(backend),
    }
    if request.entries is not None:
        content["entries"] = list(request.entries)
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def join_reports(parts: Mapping[tuple[int, ...], EvalReport]) -> EvalReport:
    """One report of evaluations of the same weights on different entries of a suite, each by the entries it scored.

    Its id is made of theirs: batches were others than in one evaluation of all, so that last bits may differ.

    Raises:
        EvaluationError: they are not of the same weights, suite, role and fidelity.
    """
    first = next(iter(parts.values()))
    for report in parts.values():
        if _subject(report) != _subject(first):
            raise EvaluationError(f"evaluations of {_subject(first)} and {_subject(report)} cannot be joined")
    ids = [report.evaluation_id for _, report in sorted(parts.items())]
    failed = [report for report in parts.values() if not report.is_ok]
    tasks = {
        place: task
        for entries, report in parts.items()
        if not failed
        for place, task in zip(entries, report.tasks, strict=True)
    }
    return replace(
        first,
        evaluation_id=hashlib.sha256(canonical_json(ids).encode()).hexdigest(),
        status=failed[0].status if failed else "ok",
        error=failed[0].error if failed else None,
        tasks=tuple(task for _, task in sorted(tasks.items())),
        notes=tuple(dict.fromkeys(note for report in parts.values() for note in report.notes)),
        started_at=min(report.started_at for report in parts.values()),
        seconds=sum(report.seconds for report in parts.values()),
    )


def _subject(report: EvalReport) -> tuple[str, ...]:
    return (report.digest, report.suite_digest, report.role, report.fidelity, report.backend)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, and no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def request_to_json(request: EvalRequest) -> str:
    return canonical_json(asdict(request))


def request_from_json(text: str) -> EvalRequest:
    raw = json.loads(text)
    entries = raw.pop("entries")
    return EvalRequest(**raw, entries=None if entries is None else tuple(entries))


def report_to_json(report: EvalReport) -> str:
    """The whole report, samples included, canonical."""
    return canonical_json(asdict(report))


def report_from_json(text: str) -> EvalReport:
    """The inverse of `report_to_json`."""
    raw = json.loads(text)
    tasks = tuple(_task_from(task) for task in raw.pop("tasks"))
    return EvalReport(**raw | {"tasks": tasks, "notes": tuple(raw["notes"])})


def _task_from(raw: dict[str, Any]) -> TaskReport:
    samples = tuple(SampleScore(**sample | {"loglik": tuple(sample["loglik"])}) for sample in raw.pop("samples"))
    return TaskReport(**raw, samples=samples)


def number_or_none(value: Any) -> float | None:
    """A finite float, or None for what is missing, not a number, or written as "N/A"."""
    if isinstance(value, bool | str) or value is None:
        return float(value) if isinstance(value, bool) else None
    number = float(value)
    return number if math.isfinite(number) else None
