"""Where a study or a merge stands, read from its directory alone: it works from any host, when the cluster is gone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from remelt.commit import MANIFEST_FILE, WORK_DIR, read_manifest
from remelt.errors import OutputError, StudyError
from remelt.plan import UnitReceipt
from remelt.receipts import RECEIPTS
from remelt_evals.objectives import OBJECTIVES
from remelt_jobs.journal import read_journal
from remelt_jobs.lease import lease_state
from remelt_jobs.study_result import BEST
from remelt_jobs.study_state import StudyState


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """A study, as its journal and lease tell it."""

    kind: str = "study"
    path: str
    study_id: str
    phase: str
    """`search`, `selection`, `publication` or `done`."""
    driver: str
    """Who holds the lease, and when it last said so."""
    trials: dict[str, int]
    """Number of trials by state."""
    best_label: str | None
    best_score: float | None
    best_values: dict[str, float]
    winner: str | None
    published: str | None
    """Where the winner lies."""
    wall_seconds: float
    evaluator_seconds: float
    failures: tuple[str, ...]
    """Why trials failed, the last three different reasons."""
    last_record_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStatus:
    """A merge, as its receipts or its manifest tell it."""

    kind: str = "merge"
    path: str
    run_id: str
    phase: str
    """`merging`, `committing` or `done`."""
    num_units: int
    num_done: int
    done_bytes: int
    """Of finished shards."""
    bytes_per_second: float | None
    """Over the units finished so far, of all drivers; None before the second."""
    eta_seconds: float | None
    last_unit_at: str | None
    digest: str | None


def status_of(directory: Path) -> StudyStatus | MergeStatus:
    """Look at a directory.

    Raises:
        StudyError: It does not exist, or holds neither a study nor a merge; its journal is damaged.
        OutputError: Its manifest is damaged.
    """
    if (directory / "journal").is_dir():
        return _study(directory)
    if (directory / MANIFEST_FILE).exists() or (directory / WORK_DIR).is_dir():
        return _merge(directory)
    what = "holds neither a study nor a merge of remelt" if directory.is_dir() else "does not exist"
    raise StudyError(f"{directory} {what}; give the --output of a search or of a merge")


def status_to_json(status: StudyStatus | MergeStatus) -> str:
    """For scripts."""
    return json.dumps(asdict(status), indent=1)


def _study(directory: Path) -> StudyStatus:
    records = read_journal(directory)
    if not records:
        raise StudyError(
            f"{directory}: no record yet; driver: {lease_state(directory)}. A search that has a driver is starting; "
            "if nobody drives, run the same search command again"
        )
    identity = records[0]
    if identity["type"] != "study":
        raise StudyError(
            f"{directory} is the output of `remelt select`, which has no status; driver: {lease_state(directory)}. Run "
            "the same command again: it goes on, or shows what came of it"
        )
    objective = OBJECTIVES[identity["canonical"]["objective"]]
    state = StudyState.of(records, objective, identity.get("weights", ()))
    counts = {"RUNNING": len(state.unfinished)}
    for record in state.finished.values():
        counts[record["state"]] = counts.get(record["state"], 0) + 1
    best = state.ranking[0] if state.ranking else None
    reasons = dict.fromkeys(record["failure"] for record in reversed(state.finished.values()) if record["failure"])
    return StudyStatus(
        path=str(directory),
        study_id=identity["study_id"],
        phase=_phase(state),
        driver=lease_state(directory),
        trials={name: count for name, count in counts.items() if count},
        best_label=None if best is None else state.candidates[best].label,
        best_score=None if best is None else state.score(best),
        best_values={} if best is None else dict(state.candidates[best].values),
        winner=None if state.winner is None else state.candidates[state.winner].label,
        published=str(directory / BEST) if state.published is not None else None,
        wall_seconds=round(state.spent().wall_seconds, 1),
        evaluator_seconds=round(state.spent().evaluator_seconds, 1),
        failures=tuple(list(reasons)[:3]),
        last_record_at=str(records[-1]["at"]),
    )


def _phase(state: StudyState) -> str:
    if state.is_done:
        return "done"
    if state.winner is not None:
        return "publication"
    return "selection" if state.scored else "search"


def _merge(directory: Path) -> MergeStatus:
    manifest = read_manifest(directory)
    if manifest is not None and not (directory / WORK_DIR).is_dir():
        sizes = [file["bytes"] for file in manifest["files"]]
        return MergeStatus(
            path=str(directory),
            run_id=manifest["run_id"],
            phase="done",
            num_units=len(sizes),
            num_done=len(sizes),
            done_bytes=sum(sizes),
            bytes_per_second=None,
            eta_seconds=None,
            last_unit_at=None,
            digest=manifest["digest"],
        )
    run = _read_run(directory)
    receipts = sorted((path.stat().st_mtime, path) for path in (directory / WORK_DIR / RECEIPTS).glob("*.json"))
    sizes = [UnitReceipt.from_json(path.read_text()).outputs[0].nbytes for _, path in receipts]
    rate = eta = None
    if len(receipts) > 1 and receipts[-1][0] > receipts[0][0]:
        # The first receipt only starts the clock: when its unit began is not known.
        rate = sum(sizes[1:]) / (receipts[-1][0] - receipts[0][0])
        eta = sum(sizes) / len(sizes) * (run["num_units"] - len(sizes)) / rate
    return MergeStatus(
        path=str(directory),
        run_id=run["run_id"],
        phase="committing" if len(receipts) == run["num_units"] else "merging",
        num_units=run["num_units"],
        num_done=len(receipts),
        done_bytes=sum(sizes),
        bytes_per_second=rate,
        eta_seconds=eta,
        last_unit_at=datetime.fromtimestamp(receipts[-1][0], UTC).isoformat() if receipts else None,
        digest=None,
    )


def _read_run(directory: Path) -> dict[str, Any]:
    path = directory / WORK_DIR / "run.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: cannot be read ({error}); the merge is only just beginning, or was removed"
        ) from error
    return run
