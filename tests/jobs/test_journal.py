"""A journal keeps what it acknowledged, loses what was torn, and ignores who lost the lease."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remelt.errors import StudyError
from remelt_jobs.journal import Journal, read_journal
from remelt_jobs.lease import take_lease

RECORDS: list[dict[str, Any]] = [
    {"type": "asked", "trial": 0, "point": {"w": 0.1 + 0.2}},
    {"type": "finished", "trial": 0, "score": -1e-300, "reason": "zwölf\nBoxkämpfer"},
]


def write(directory: Path, records: list[dict[str, Any]]) -> Path:
    """A driver's life: lease, records, release. Returns its segment."""
    lease = take_lease(directory)
    with lease.kept_alive(), Journal(directory, lease) as journal:
        for record in records:
            journal.append(record)
    return segment(directory, lease.fence)


def segment(directory: Path, fence: int) -> Path:
    return directory / "journal" / f"{fence:08d}.jsonl"


def test_records_come_back_exactly_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, RECORDS)
    write(tmp_path, [{"type": "more"}])
    assert read_journal(tmp_path) == [*RECORDS, {"type": "more"}]


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []


def test_a_journal_opened_again_holds_what_came_before(tmp_path: Path) -> None:
    write(tmp_path, RECORDS)
    with Journal(tmp_path, take_lease(tmp_path)) as journal:
        assert journal.records == RECORDS


def test_torn_at_any_byte_of_the_last_record_only_that_record_is_lost(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert read_journal(tmp_path) == RECORDS[:1], end
    path.write_bytes(whole)
    assert read_journal(tmp_path) == RECORDS


def test_torn_at_any_byte_the_next_driver_goes_on_and_keeps_its_own(tmp_path: Path) -> None:
    first = write(tmp_path, RECORDS[:1])
    whole = first.read_bytes()
    for end in range(len(whole) + 1):
        directory = tmp_path / str(end)
        directory.mkdir()
        write(directory, RECORDS[:1])
        segment(directory, 1).write_bytes(whole[:end])
        write(directory, RECORDS[1:])
        assert read_journal(directory) == (RECORDS if end == len(whole) else RECORDS[1:]), end


def test_zeros_left_by_a_crash_count_as_torn(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)
    with path.open("ab") as file:
        file.write(bytes(100))
    assert read_journal(tmp_path) == RECORDS


def test_damage_before_the_end_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)
    whole = path.read_bytes()
    second = whole.find(b"\n") + 1
    path.write_bytes(whole[:second] + b"x" + whole[second + 1 :])
    with pytest.raises(StudyError, match=f"00000001.jsonl is damaged at byte {second}"):
        read_journal(tmp_path)


def test_a_segment_whose_first_record_is_no_opening_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)
    for first in (b'{"type": "opened"}', b"[]", b'{"type": "asked"}'):
        path.write_bytes(first + b"\n" + path.read_bytes().partition(b"\n")[2])
        with pytest.raises(StudyError, match=r"00000001.jsonl is damaged at byte 0"):
            read_journal(tmp_path)


def test_files_that_are_no_segments_are_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)
    (path.parent / "00000001 (copy).jsonl").write_bytes(b"x")
    assert read_journal(tmp_path) == RECORDS


def test_a_driver_whose_lease_was_taken_stops_before_it_writes(tmp_path: Path) -> None:
    with Journal(tmp_path, take_lease(tmp_path)) as old:
        old.append(RECORDS[0])
        with Journal(tmp_path, take_lease(tmp_path, takeover=True)) as new:
            assert new.records == RECORDS[:1]
            with pytest.raises(StudyError, match="has taken"):
                old.append({"type": "too late"})
            new.append(RECORDS[1])
    assert read_journal(tmp_path) == RECORDS


def test_what_a_segment_gained_after_it_was_read_never_happened(tmp_path: Path) -> None:
    with Journal(tmp_path, take_lease(tmp_path)) as old:
        old.append(RECORDS[0])
        with Journal(tmp_path, take_lease(tmp_path, takeover=True)) as new:
            old._write({"type": "paused between its look and its act"})
            new.append(RECORDS[1])
    assert read_journal(tmp_path) == RECORDS
    with Journal(tmp_path, take_lease(tmp_path, takeover=True)) as third:
        third.append({"type": "third"})
    assert read_journal(tmp_path) == [*RECORDS, {"type": "third"}]


def test_a_driver_that_died_before_its_first_record_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, RECORDS)
    lease = take_lease(tmp_path)
    segment(tmp_path, lease.fence).write_bytes(b'{"fence":2,"re')
    lease.release()
    assert read_journal(tmp_path) == RECORDS
    write(tmp_path, [{"type": "third"}])
    assert read_journal(tmp_path) == [*RECORDS, {"type": "third"}]


def test_a_lease_opens_its_segment_once(tmp_path: Path) -> None:
    lease = take_lease(tmp_path)
    Journal(tmp_path, lease).close()
    with pytest.raises(StudyError, match="opened once"):
        Journal(tmp_path, lease)


def test_a_number_that_json_does_not_have_is_a_programmers_error(tmp_path: Path) -> None:
    with Journal(tmp_path, take_lease(tmp_path)) as journal:
        with pytest.raises(ValueError, match="JSON"):
            journal.append({"score": float("nan")})
        journal.append(RECORDS[0])
    assert read_journal(tmp_path) == RECORDS[:1]


def test_after_a_failed_write_no_record_follows_the_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, take_lease(tmp_path))
    journal.append(RECORDS[0])
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._descriptor)
    os.close(full)
    with pytest.raises(OSError, match="No space"):
        journal.append(RECORDS[1])
    with pytest.raises(StudyError, match="closed"):
        journal.append(RECORDS[1])
    assert read_journal(tmp_path) == RECORDS[:1]


def test_an_acknowledged_record_survives_a_killed_driver(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from remelt_jobs.lease import take_lease; from remelt_jobs.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), take_lease(Path(sys.argv[1])))\n"
        "journal.append({'type': 'asked', 'trial': 7})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with Journal(tmp_path, take_lease(tmp_path)) as journal:
        assert journal.records == [{"type": "asked", "trial": 7}]
