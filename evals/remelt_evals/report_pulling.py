"""Bring reports here from where a cluster left them: a shared folder, or a bucket.

A file comes whole or not at all: to a temporary name, its footer read, then renamed. What is here already is not
fetched again unless there is something newer under its name (the trials of a running study). `runs` and `trials` come
last, so that whoever reads meanwhile finds the metrics and samples of every run that is listed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from remelt.errors import EvaluationError
from remelt_evals.report_schemas import TABLE_KEY

_ORDER = ("samples", "metrics", "runs", "trials")
_PART = re.compile(
    r"(?P<table>samples|metrics|runs|trials)/study=(?P<study>[^/]+)/date=(?P<date>\d{4}-\d\d-\d\d)/part-[^/]+\.parquet"
)
_COPY_BYTES = 8 << 20


class Part(NamedTuple):
    """A file of a table."""

    path: str
    """Under the reports folder."""
    table: str
    study: str
    date: date
    num_bytes: int
    modified_at: float
    """Seconds since 1970; 0 where the file system does not say."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What came."""

    folder: Path
    parts: tuple[Part, ...]
    num_present: int
    """Files of the same dates that were here already."""
    damaged: tuple[str, ...]
    """Files that did not read as Parquet of their table and were left out, each with the reason."""

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def pull_reports(source: str, since: date, folder: str | Path) -> Pulled:
    """Copy the report files of partitions since a date, and the trials of every study that has one.

    Args:
        source: a folder, or a URI that Arrow reads: `file:///...`, `s3://bucket/path` (credentials as AWS tools find
            them; `?endpoint_override=host:port&scheme=http` for other services), `gs://...`.
        since: the first date, in UTC, as the partitions are named.
        folder: where reports are to be; made if it is not there.

    Raises:
        EvaluationError: the URI cannot be opened, or there are no reports.
    """
    filesystem, root = open_source(source)
    parts = _parts(filesystem, root, source)
    chosen = _chosen(parts, since)
    target = Path(folder)
    came: list[Part] = []
    damaged: list[str] = []
    num_present = 0
    for part in sorted(chosen, key=lambda part: (_ORDER.index(part.table), part.path)):
        path = target / part.path
        if _is_here(path, part):
            num_present += 1
        elif problem := _fetch(filesystem, f"{root}/{part.path}", part, path):
            damaged.append(f"{part.path}: {problem}")
        else:
            came.append(part)
    return Pulled(target, tuple(came), num_present, tuple(damaged))


def open_source(source: str) -> tuple[Any, str]:
    """The `pyarrow.fs` file system of a path or URI, and the path in it.

    Raises:
        EvaluationError: the URI is not one that Arrow reads, or there is no such folder.
    """
    import pyarrow as pa
    from pyarrow import fs

    what = source if "://" in source else str(Path(source).expanduser().absolute())
    try:
        filesystem, root = fs.FileSystem.from_uri(what)
        info = filesystem.get_file_info(root)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EvaluationError(
            f"--from {source} cannot be opened: {_one_line(error)}; give a folder, file://, s3:// or gs://"
        ) from error
    if info.type != fs.FileType.Directory:
        found = "there is nothing" if info.type == fs.FileType.NotFound else "that is a file"
        raise EvaluationError(f"--from {source}: {found}; give the folder that `--reports` named")
    return filesystem, root.rstrip("/")


def _parts(filesystem: Any, root: str, source: str) -> list[Part]:
    import pyarrow as pa
    from pyarrow import fs

    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"--from {source} cannot be listed: {_one_line(error)}") from error
    parts = []
    for info in infos:
        path = str(PurePosixPath(info.path).relative_to(PurePosixPath(root)))
        found = _PART.fullmatch(path)
        if info.type == fs.FileType.File and found and ".." not in found["study"]:
            when = date.fromisoformat(found["date"])
            parts.append(Part(path, found["table"], found["study"], when, info.size, (info.mtime_ns or 0) / 1e9))
    if not parts:
        raise EvaluationError(f"--from {source} holds no reports; give the folder that `--reports` named")
    return parts


def _chosen(parts: Iterable[Part], since: date) -> list[Part]:
    """Partitions since the date; a study's trials lie under the date that it began."""
    parts = list(parts)
    studies = {part.study for part in parts if part.date >= since}
    return [part for part in parts if part.date >= since or (part.table == "trials" and part.study in studies)]


def _is_here(path: Path, part: Part) -> bool:
    """Whether the file is here, and not older than the one there: a pulled file has the time of its source."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    # Object stores tell the time in seconds.
    age = part.modified_at - found.st_mtime
    return age < 0 if found.st_size != part.num_bytes else age < 1


def _fetch(filesystem: Any, source: str, part: Part, path: Path) -> str | None:
    """Copy one file; returns what is wrong with it, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with filesystem.open_input_stream(source) as stream, temporary.open("wb") as file:
            while block := stream.read(_COPY_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        metadata = pq.read_metadata(temporary)
        found = (metadata.metadata or {}).get(TABLE_KEY, b"").decode()
        if found != part.table:
            return f"is no file of table {part.table}"
        if part.modified_at:
            os.utime(temporary, (part.modified_at, part.modified_at))
        temporary.replace(path)
    except pa.ArrowInvalid as error:
        return f"does not read as Parquet ({_one_line(error)})"
    except FileNotFoundError:
        return "was removed meanwhile"
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
