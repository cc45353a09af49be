"""Run a command and say how long it took and how much memory its processes held; write the dated reports.

Linux only: it reads /proc.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
POLLS_PER_TREE = 12  # walking all of /proc costs milliseconds, which a benchmark on two cores would feel
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
REPORTS_DIR = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished command."""

    seconds: float
    peak_bytes: int
    """The kernel's high-water mark of the root process, or the polled sum over the process tree where that is more.

    From /proc, not from wait4: there a child starts with the high-water mark of the process that spawned it.
    """
    cpu_seconds: float
    """User and system time of the root process and of the children that it waited for."""
    status: int
    output: str
    """Standard output and standard error together."""

    def check(self) -> Measured:
        """Return self, or raise RuntimeError with the end of the output where the command failed."""
        if self.status:
            raise RuntimeError(f"exit status {self.status}\n{self.output[-4000:]}")
        return self


def _tree_rss_bytes(root: int) -> int:
    """Resident memory of a process and its descendants, pages that they share counted for each."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has ended in the meantime.
        parents[int(folder.name)] = int(fields[1])
        resident[int(folder.name)] = int(fields[21]) * PAGE_BYTES
    total = 0
    for process, resident_bytes in resident.items():
        ancestor = process
        while ancestor not in (root, 0, 1):
            ancestor = parents.get(ancestor, 0)
        total += resident_bytes if ancestor == root else 0
    return total


def _high_water_bytes(process: int) -> int:
    """The most that a process has held since it became what it is (its last exec); 0 where it has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run_measured(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    cores: Collection[int] | None = None,
    poll_tree: bool = True,
) -> Measured:
    """Run a command to its end, on the given cores where any are named.

    Without `poll_tree` nothing watches the process, and its memory is reported as 0.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        if cores is None:
            prefix: list[str] = []
        else:
            prefix = ["taskset", "--cpu-list", ",".join(map(str, sorted(cores)))]
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*prefix, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        peak_bytes = 0
        ended = threading.Event()

        def poll() -> None:
            nonlocal peak_bytes
            polls = 0
            while not ended.wait(POLL_SECONDS):
                peak_bytes = max(peak_bytes, _high_water_bytes(process.pid))
                if polls % POLLS_PER_TREE == 0:
                    peak_bytes = max(peak_bytes, _tree_rss_bytes(process.pid))
                polls += 1

        poller = threading.Thread(target=poll, daemon=True)
        if poll_tree:
            poller.start()
        # wait4 rather than wait: it alone gives the resources of this one child.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        if poll_tree:
            poller.join()
        output.seek(0)
        text = output.read()
    return Measured(seconds, peak_bytes, usage.ru_utime + usage.ru_stime, process.returncode, text)


class Others:
    """What other processes of the machine take of its cores meanwhile: a context manager."""

    def __enter__(self) -> Others:
        self._busy, self._own, self._begun = _busy_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        busy, own = _busy_seconds() - self._busy, time.process_time() - self._own
        self.cores = max(0.0, busy - own) / (time.perf_counter() - self._begun)
        """How many cores they kept busy; the kernel's own work for this process counts in part."""


def wait_for_quiet(limit_seconds: float, cores: float = 0.2) -> None:
    """Wait until other processes leave the machine alone, for so long at most."""
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        with Others() as others:
            time.sleep(0.5)
        if others.cores < cores:
            return


def _busy_seconds() -> float:
    """CPU seconds that the machine has worked since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle = fields[3] + fields[4]
    # The first eight; guests are counted among the users already.
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def idle_torch_bytes(python: str | Path = sys.executable) -> int:
    """Peak resident memory of a process that imports torch and does nothing; the median of three."""
    peaks = [run_measured([python, "-c", "import torch"]).check().peak_bytes for _ in range(3)]
    return int(statistics.median(peaks))


def warm_page_cache(paths: Iterable[Path]) -> int:
    """Read every file under the paths once, so that the next reader finds them in memory; returns the bytes read."""
    total = 0
    buffer = bytearray(1 << 24)
    for path in paths:
        for file_path in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file_path.is_file():
                continue
            with file_path.open("rb", buffering=0) as file:
                while num := file.readinto(buffer):
                    total += num
    return total


def remelt_command() -> Path:
    """The console script of the running environment."""
    path = Path(sys.executable).parent / "remelt"
    if not path.exists():
        raise FileNotFoundError(f"no `remelt` beside {sys.executable}: install the project into this environment")
    return path


@contextmanager
def scratch_folder(path: Path | None) -> Iterator[Path]:
    """The given folder, kept; or a temporary one, removed at the end."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="remelt-bench-") as folder:
        yield Path(folder)


def hardware() -> str:
    """The machine in words."""
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    flags = torch_cpu_capability()
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {cpu} ({flags}), {memory_bytes / 2**30:.0f} GiB memory, Linux {platform.release()}"


def torch_cpu_capability() -> str:
    """The instruction set that torch picks here."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def versions(python: str | Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages in an environment, by its interpreter; "Python" is among them."""
    code = (
        "import json, platform, sys; from importlib.metadata import version\n"
        "print(json.dumps({'Python': platform.python_version(), **{n: version(n) for n in sys.argv[1:]}}))"
    )
    output = subprocess.run([str(python), "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return {str(name): str(number) for name, number in json.loads(output).items()}


def shown_command() -> str:
    """The command that is running, without this machine's paths."""
    words = []
    for word in sys.argv[1:]:
        flag, is_pair, value = word.partition("=")
        kept = value if is_pair else flag
        shown = "..." if "/" in kept else kept
        words.append(f"{flag}={shown}" if is_pair else shown)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write_report(name: str, title: str, sections: Sequence[str], data: Mapping[str, Any], *, folder: Path) -> None:
    """Write `<name>.md` and `<name>.json`: title, date, hardware and command first, then the sections."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = f"# {title}\n\n{date}. {hardware()}. Command: `{shown_command()}`."
    (folder / f"{name}.md").write_text("\n\n".join([head, *sections]) + "\n", "utf-8")
    record = {"date": date, "hardware": hardware(), "command": shown_command(), **data}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"\nwrote {name}.md and {name}.json in {folder}")


def megabytes(num_bytes: float) -> str:
    """A size in MB (10^6), whole."""
    return f"{num_bytes / 1e6:,.0f}"
