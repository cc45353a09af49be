"""Who may drive: a lease that is a file, numbered by a fence that only grows.

`<directory>/lease/<fence>` is taken by exclusive create, so of two drivers that want the same fence one gets it. The
newest fence is the holder's. A driver that was paused and wakes after its lease was taken sees a newer fence, and must
look before it acts: `Lease.check` does, and the journal calls it before every record. What such a driver writes between
its look and its act goes to a segment of its own, of which nobody reads more than the new holder had read.

A lease file holds one JSON line about its holder, and a second one once it was released; its modification time is the
holder's heartbeat. Lease files are never removed: they are the count.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from remelt.errors import StudyError
from remelt.sinks import sync_directory

FENCE_DIGITS = 8
STALE_AFTER_SECONDS = 300.0
HEARTBEAT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A driver process: host, process id, when the process started (ids are used again), and its id namespace."""

    host: str
    pid: int
    started: str
    namespace: str

    @classmethod
    def of_this_process(cls) -> Holder:
        return cls(host_name(), os.getpid(), process_start(os.getpid()) or "", process_namespace())

    def is_dead(self) -> bool:
        """Whether it ran on this host and is gone; of another host's or container's process nothing is known."""
        is_here = (self.host, self.namespace) == (host_name(), process_namespace())
        return is_here and process_start(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Lease:
    """A fence that this process took. Valid for as long as no newer one exists."""

    directory: Path
    fence: int

    @property
    def path(self) -> Path:
        return _lease_dir(self.directory) / fence_name(self.fence)

    def check(self) -> None:
        """Raise StudyError if another driver has taken the lease since."""
        newest = newest_fence(self.directory)
        if newest != self.fence:
            taker = _read_holder(self.directory, newest)[0] if newest else None
            raise StudyError(
                f"{self.directory}: this driver held lease {self.fence}, but {taker or 'another driver'} has taken "
                f"lease {newest} since; stopping without a further record"
            )

    def renew(self) -> None:
        """Heartbeat: set the lease file's time to now, by the clock of its filesystem."""
        os.utime(self.path)

    def release(self) -> None:
        """Say that the work is over, so that the next driver need not wait for the lease to grow stale."""
        with self.path.open("a") as file:
            file.write(json.dumps({"released": True}) + "\n")

    @contextmanager
    def kept_alive(self, every_seconds: float = HEARTBEAT_SECONDS) -> Iterator[Lease]:
        """Renew in the background, and release at the end, however it comes.

        The thread proves only that the process runs, which is what a lease asks; a stuck evaluation has time-outs.
        """
        over = threading.Event()

        def beat() -> None:
            while not over.wait(every_seconds):
                # A filesystem that fails for a moment must not cost us the lease.
                with suppress(OSError):
                    if newest_fence(self.directory) != self.fence:
                        return
                    self.renew()

        thread = threading.Thread(target=beat, name="lease heartbeat", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
            self.release()


def take_lease(
    directory: Path,
    *,
    takeover: bool = False,
    stale_after_seconds: float = STALE_AFTER_SECONDS,
    holder: Holder | None = None,
) -> Lease:
    """Take the next fence of `directory`, if the newest is free.

    It is free if it was released, if its holder ran on this host and is dead, or if its heartbeat is older than
    `stale_after_seconds`. With `takeover` it is taken in any case; the old holder then stops at its next record.

    Raises:
        StudyError: Another driver holds the lease, or was quicker to take it.
    """
    _lease_dir(directory).mkdir(parents=True, exist_ok=True)
    newest = newest_fence(directory)
    if newest and not takeover:
        _refuse_if_held(directory, newest, stale_after_seconds)
    lease = Lease(directory, newest + 1)
    try:
        descriptor = os.open(lease.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise StudyError(f"{directory}: another driver took lease {lease.fence} at this very moment") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(holder or Holder.of_this_process())) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(lease.path.parent)
    return lease


def newest_fence(directory: Path) -> int:
    """The highest fence taken in `directory`; 0 if none was."""
    try:
        names = os.listdir(_lease_dir(directory))  # noqa: PTH208 - a plain listing, once for every record
    except FileNotFoundError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def lease_state(directory: Path) -> str:
    """Who drives, in words, for those who only look; takes the heartbeat's age by this host's clock."""
    fence = newest_fence(directory)
    if not fence:
        return "nobody yet"
    holder, is_released = _read_holder(directory, fence)
    if is_released:
        return f"nobody: lease {fence} was released"
    if holder is not None and holder.is_dead():
        return f"nobody: {holder} is dead (lease {fence}); run the same command again to go on"
    age = max(0.0, time.time() - (_lease_dir(directory) / fence_name(fence)).stat().st_mtime)
    return f"{holder or 'a driver that has only begun'} (lease {fence}, heartbeat {age:.0f} s ago)"


def fence_name(fence: int) -> str:
    """A fence as a file name; padded, so that listings sort."""
    return f"{fence:0{FENCE_DIGITS}d}"


def host_name() -> str:
    return socket.gethostname()


def process_start(pid: int) -> str | None:
    """When a process of this host started, as boot id and clock ticks since boot; None if there is none, or a zombie.

    Linux only; elsewhere an empty string for a live process, so that its id alone counts.
    """
    try:
        # proc(5): field 22 is the start time; the name in field 2 may hold blanks, so count from its closing bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None if Path("/proc/self/stat").exists() or not _is_alive(pid) else ""
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def process_namespace() -> str:
    """Where process ids have their meaning: machine and namespace, since containers and hosts may share a name."""
    machine = namespace = ""
    with suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip()
    with suppress(OSError):
        # The first namespace of every Linux host has the same label.
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path, a label such as pid:[4026531836]
    return f"{machine} {namespace}".strip()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lease_dir(directory: Path) -> Path:
    return directory / "lease"


def _refuse_if_held(directory: Path, fence: int, stale_after_seconds: float) -> None:
    holder, is_released = _read_holder(directory, fence)
    if is_released or (holder is not None and holder.is_dead()):
        return
    age = _now(directory) - (_lease_dir(directory) / fence_name(fence)).stat().st_mtime
    if age > stale_after_seconds:
        return
    raise StudyError(
        f"{directory} is driven by {holder or 'a driver that has only begun'} (lease {fence}, heartbeat "
        f"{max(age, 0):.0f} s ago); wait until it ends, or take over with --takeover "
        f"(it counts as gone after {stale_after_seconds:.0f} s)"
    )


def _read_holder(directory: Path, fence: int) -> tuple[Holder | None, bool]:
    """Holder and whether it released; no holder where its line is not whole (it was killed, or is just writing it)."""
    holder, is_released = None, False
    for line in (_lease_dir(directory) / fence_name(fence)).read_text(errors="replace").splitlines(keepends=True):
        try:
            fields = json.loads(line) if line.endswith("\n") else {}
        except json.JSONDecodeError:
            continue
        if "pid" in fields:
            holder = Holder(**fields)
        is_released = is_released or "released" in fields
    return holder, is_released


def _now(directory: Path) -> float:
    """The time by the clock that sets the heartbeats, which on a network filesystem is not this host's."""
    probe = _lease_dir(directory) / f".clock-{host_name()}-{os.urandom(6).hex()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
