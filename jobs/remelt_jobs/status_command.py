"""The command `remelt status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from remelt_jobs.status import MergeStatus, StudyStatus


def status(
    directory: Annotated[Path, typer.Argument(help="The --output of a search or of a merge.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Say where a search or a merge stands. Reads its directory alone, and disturbs nothing."""
    from remelt_jobs.status import MergeStatus, status_of, status_to_json

    found = status_of(directory)
    if as_json:
        print(status_to_json(found))
        return
    lines = _merge_lines(found) if isinstance(found, MergeStatus) else _study_lines(found)
    for name, text in lines:
        print(f"{name:<10} {text}")


def _study_lines(found: StudyStatus) -> list[tuple[str, str]]:
    from remelt_jobs.progress import human_seconds

    trials = ", ".join(f"{count} {state.lower()}" for state, count in found.trials.items())
    lines = [
        ("study", f"{found.study_id[:12]} in {found.path}: {found.phase}"),
        ("driver", found.driver),
        ("trials", trials or "none yet"),
    ]
    if found.best_score is not None:
        values = ", ".join(f"{name} {value:.3f}" for name, value in found.best_values.items())
        lines.append(("best", f"{found.best_score:.4f} by {found.best_label}" + (f" ({values})" if values else "")))
    if found.winner is not None:
        lines.append(("winner", found.winner + (f", published in {found.published}" if found.published else "")))
    spent = f"{human_seconds(found.wall_seconds)} at work, {human_seconds(found.evaluator_seconds)} of evaluators"
    lines.append(("spent", f"{spent}; last record {found.last_record_at}"))
    return lines + [("failure", reason) for reason in found.failures]


def _merge_lines(found: MergeStatus) -> list[tuple[str, str]]:
    from remelt_jobs.progress import human_bytes, human_seconds

    pace = "" if found.bytes_per_second is None else f", {human_bytes(found.bytes_per_second)}/s"
    eta = "" if found.eta_seconds is None or found.phase == "done" else f", ETA {human_seconds(found.eta_seconds)}"
    lines = [
        ("merge", f"{found.run_id[:12]} in {found.path}: {found.phase}"),
        ("shards", f"{found.num_done} of {found.num_units}, {human_bytes(found.done_bytes)}{pace}{eta}"),
    ]
    if found.last_unit_at is not None:
        lines.append(("last", f"shard finished {found.last_unit_at}"))
    if found.digest is not None:
        lines.append(("digest", found.digest))
    return lines
