"""Progress of a merge on the terminal: bytes, GB/s and ETA; a plain line now and then where nobody watches."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

from remelt.plan import MergePlan, UnitReceipt

PLAIN_INTERVAL_SECONDS = 10.0
PATIENCE_SECONDS = 3.0
"""Without a byte for so long, a line says why."""
REFRESH_SECONDS = 0.2


def human_bytes(size: float) -> str:
    """1536 -> '1.5 kB', in powers of 1000 as disks and safetensors count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalProgress:
    """Implements `remelt.merge.Progress` on stderr: notes of the plan, then a bar, or where nobody watches a line.

    Nothing is printed of a merge that is finished already, since it never starts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = 0
        self._units = self._units_done = 0
        self._started = self._shown = 0.0
        self._hint: threading.Timer | None = None

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._hint is not None:
            self._hint.cancel()
        if self._bar is not None:
            self._bar.stop()

    def start(self, plan: MergePlan, total_bytes: int, num_units_done: int) -> None:
        self._total, self._units, self._units_done = total_bytes, len(plan.units), num_units_done
        self._started = self._shown = time.monotonic()
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        if num_units_done:
            print(f"resuming: {num_units_done} of {len(plan.units)} shards are done", file=sys.stderr)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("merge", total=total_bytes)
            self._bar.start()
        self._hint = threading.Timer(PATIENCE_SECONDS, self._explain_wait)
        self._hint.daemon = True
        self._hint.start()

    def _explain_wait(self) -> None:
        with self._lock:
            if not self._done:
                print(
                    "note: no bytes yet: the first merge on a machine compiles its kernels (up to a minute, kept for "
                    "the next), and Ray takes some seconds to start",
                    file=sys.stderr,
                )

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            if not self._done:
                # What came before the first bytes says nothing of the pace.
                self._started = self._shown = now
            self._done += num_bytes
            interval = REFRESH_SECONDS if self._bar is not None else PLAIN_INTERVAL_SECONDS
            if now - self._shown < interval:
                return
            self._shown = now
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
                return
            rate = self._done / max(now - self._started, 1e-9)
            eta = (self._total - self._done) / rate if rate else 0.0
            print(
                f"{human_bytes(self._done)} of {human_bytes(self._total)} read and written, {human_bytes(rate)}/s, "
                f"{self._units_done} of {self._units} shards, ETA {human_seconds(eta)}",
                file=sys.stderr,
            )

    def finish_unit(self, receipt: UnitReceipt) -> None:
        with self._lock:
            self._units_done += 1
