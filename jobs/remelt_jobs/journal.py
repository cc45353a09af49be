"""An append-only record of what was done, written by one driver at a time and read by any.

Each lease has a segment of its own, `<directory>/journal/<fence>.jsonl`: one JSON object a line, each made durable
before `append` returns. Its first record says how many bytes of each earlier segment its driver had read. Readers
take no more of an earlier segment than that, so whatever a driver wrote after it lost its lease never happened.

A line without its newline was cut off by a crash: it was never acknowledged, and is left out. Since no one appends to
another's segment, that can happen at the end only; a bad line anywhere else is damage, and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from remelt.errors import StudyError
from remelt.sinks import sync_directory
from remelt_jobs.lease import Lease, fence_name

Record: TypeAlias = dict[str, Any]

OPENED = "opened"


class Journal:
    """The journal of a directory, opened for appending under a lease.

    Args:
        directory: The study's or night's directory.
        lease: The lease that this process holds on it.

    Raises:
        StudyError: The lease is lost, the segment exists already, or an earlier segment is damaged.
    """

    def __init__(self, directory: Path, lease: Lease) -> None:
        lease.check()
        self._lease = lease
        earlier, read_bytes = _read_segments(directory)
        self.records: list[Record] = earlier
        """All records, earlier drivers' first; the `opened` records are left out."""
        path = _segment(directory, lease.fence)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        except FileExistsError:
            raise StudyError(f"{path} exists already: a lease has one journal segment, opened once") from None
        self._path = path
        self._write({"type": OPENED, "fence": lease.fence, "read": read_bytes})
        sync_directory(path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and make it durable.

        Raises:
            StudyError: Another driver has taken the lease; nothing was written.
            OSError: The disk is full or failing; the journal takes no further record.
        """
        self._lease.check()
        self._write(record)
        self.records.append(dict(record))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, sort_keys=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if self._descriptor < 0:
            raise StudyError(f"{self._path} is closed")
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(f"{self._path}: wrote {written} of {len(line)} bytes; is the disk full?")
            os.fsync(self._descriptor)
        except OSError:
            self.close()  # a further record would follow a torn line and make it look like damage
            raise


def read_journal(directory: Path) -> list[Record]:
    """All records that count, in order, without the `opened` ones; empty where there is no journal.

    Raises:
        StudyError: A segment is damaged elsewhere than at its end.
    """
    return _read_segments(directory)[0]


def _read_segments(directory: Path) -> tuple[list[Record], dict[str, int]]:
    """Records of every segment, and how many bytes of each were read."""
    folder = directory / "journal"
    # An editor's copies and the like are no segments.
    found = [path for path in folder.glob("*.jsonl") if path.stem.isdecimal()] if folder.is_dir() else []
    paths = sorted(found, key=lambda path: int(path.stem))
    segments = {path.stem: _read_lines(path) for path in paths}
    # The newest driver that got as far as its first record decides; one that did not has read and done nothing.
    opened = [name for name, lines in segments.items() if lines]
    limits: Mapping[str, int] = segments[opened[-1]][0][0]["read"] if opened else {}
    records: list[Record] = []
    read_bytes: dict[str, int] = {}
    for name in opened:
        limit = limits.get(name, 0) if name != opened[-1] else None
        lines = [line for line in segments[name] if limit is None or line[1] <= limit]
        records += [record for record, _ in lines if record.get("type") != OPENED]
        read_bytes[name] = lines[-1][1] if lines else 0
    return records, read_bytes


def _read_lines(path: Path) -> list[tuple[Record, int]]:
    """The whole lines of a segment, each with the byte offset of its end."""
    data = path.read_bytes()
    lines: list[tuple[Record, int]] = []
    start = 0
    while (end := data.find(b"\n", start) + 1) > 0:
        try:
            record = json.loads(data[start:end])
        except ValueError:
            raise StudyError(
                f"{path} is damaged at byte {start}: a line in its middle is no JSON; restore the file from a backup, "
                "or start the study in another directory"
            ) from None
        is_first_sound = start > 0 or (
            isinstance(record, dict) and record.get("type") == OPENED and isinstance(record.get("read"), dict)
        )
        if not isinstance(record, dict) or not is_first_sound:
            raise StudyError(f"{path} is damaged at byte {start}: that is no record of a journal")
        lines.append((record, end))
        start = end
    return lines


def _segment(directory: Path, fence: int) -> Path:
    return directory / "journal" / f"{fence_name(fence)}.jsonl"
