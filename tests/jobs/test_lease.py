"""A lease has one holder, who notices when it is no longer he."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from remelt.errors import StudyError
from remelt_jobs.lease import Holder, Lease, host_name, newest_fence, process_namespace, process_start, take_lease


def backdate(lease: Lease, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lease.path, (then, then))


def elsewhere() -> Holder:
    """A holder of whose process this host can know nothing."""
    return Holder("another-host", os.getpid(), "", "")


def test_fences_count_up_from_one(tmp_path: Path) -> None:
    for fence in (1, 2, 3):
        lease = take_lease(tmp_path)
        assert lease.fence == newest_fence(tmp_path) == fence
        lease.release()


def test_a_held_lease_is_refused_by_name(tmp_path: Path) -> None:
    take_lease(tmp_path)
    with pytest.raises(StudyError, match=rf"process {os.getpid()} on {host_name()}.*--takeover"):
        take_lease(tmp_path)
    assert newest_fence(tmp_path) == 1


def test_a_released_lease_is_free_at_once(tmp_path: Path) -> None:
    with take_lease(tmp_path).kept_alive():
        pass
    assert take_lease(tmp_path).fence == 2


def test_a_lease_is_released_when_its_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), take_lease(tmp_path).kept_alive():
        _ = 1 / 0
    assert take_lease(tmp_path).fence == 2


def test_a_dead_process_of_this_host_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from remelt_jobs.lease import take_lease; take_lease(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert take_lease(tmp_path).fence == 2


def test_a_process_id_used_again_does_not_keep_a_lease(tmp_path: Path) -> None:
    take_lease(tmp_path, holder=Holder(host_name(), os.getpid(), "an earlier boot/1", process_namespace()))
    assert take_lease(tmp_path).fence == 2


def test_a_process_of_another_container_is_not_taken_for_dead(tmp_path: Path) -> None:
    take_lease(tmp_path, holder=Holder(host_name(), os.getpid(), "an earlier boot/1", "pid:[1]"))
    with pytest.raises(StudyError):
        take_lease(tmp_path)


def test_a_live_process_is_known_by_its_start() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid()) != ""
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert process_start(child.pid) not in ("", process_start(os.getpid()))
    deadline = time.monotonic() + 30
    while process_start(child.pid) is not None and time.monotonic() < deadline:  # ends as a zombie until waited for
        time.sleep(0.01)
    assert process_start(child.pid) is None
    child.wait()


def test_another_hosts_lease_is_free_only_when_its_heartbeat_is_old(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, holder=elsewhere())
    backdate(lease, 50)
    with pytest.raises(StudyError, match=r"heartbeat 5\d s ago"):
        take_lease(tmp_path, stale_after_seconds=100)
    assert take_lease(tmp_path, stale_after_seconds=40).fence == 2


def test_a_lease_whose_holder_line_is_torn_counts_by_its_heartbeat(tmp_path: Path) -> None:
    lease = take_lease(tmp_path)
    lease.path.write_bytes(lease.path.read_bytes()[:10])
    with pytest.raises(StudyError, match="only begun"):
        take_lease(tmp_path)
    backdate(lease, 1000)
    assert take_lease(tmp_path).fence == 2


def test_a_heartbeat_renews(tmp_path: Path) -> None:
    lease = take_lease(tmp_path, holder=elsewhere())
    backdate(lease, 1000)
    with lease.kept_alive(every_seconds=0.01):
        deadline = time.monotonic() + 30
        while time.time() - lease.path.stat().st_mtime > 500 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(StudyError):
            take_lease(tmp_path)


def test_takeover_takes_a_held_lease_and_the_old_holder_notices(tmp_path: Path) -> None:
    old = take_lease(tmp_path)
    old.check()
    new = take_lease(tmp_path, takeover=True)
    new.check()
    with pytest.raises(StudyError, match=rf"lease 1, but process {os.getpid()} on .* lease 2"):
        old.check()


def test_of_many_who_want_a_free_lease_one_gets_it(tmp_path: Path) -> None:
    take_lease(tmp_path).release()
    taken: list[int] = []
    refused: list[StudyError] = []
    start = threading.Barrier(8)

    def want() -> None:
        start.wait()
        try:
            taken.append(take_lease(tmp_path).fence)
        except StudyError as error:
            refused.append(error)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (taken, len(refused)) == ([2], 7)
