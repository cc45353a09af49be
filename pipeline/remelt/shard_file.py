"""A file that is written once, from start to end, past the page cache where the filesystem can.

A merge writes each output byte once and does not read it again, and syncs the file before anyone may see it. Through
the page cache, each of those pages would be found, filled and written back, at the price of most of a linear merge.
So the bytes are gathered in aligned buffers that a thread of the file's own digests and writes (O_DIRECT), while the
engine's threads go on. Filesystems that refuse get the same bytes through the page cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

STAGING_BYTES = 1024 * 1024
NUM_STAGING = 3
"""Buffers of a file: one that fills, one that waits, one that is written."""
ALIGNMENT = 4096
"""Of offsets, lengths and addresses in direct writes: what disks with large sectors ask for."""
WRITEBACK_BYTES = 32 * 1024 * 1024
"""Dirty bytes after which the kernel is asked to start writing, where the page cache is in the way."""
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ShardFile:
    """Appends to a new file and digests it; errors of the system come from the next call."""

    def __init__(self, path: Path, total_bytes: int) -> None:
        """Create `path` and reserve its bytes. Raises OSError, a full disk included."""
        self._sha256 = hashlib.sha256()
        self._total = total_bytes
        self._written = self._written_back = 0
        self._failure: BaseException | None = None
        self._fd = _open_direct(path)
        try:
            if hasattr(os, "posix_fallocate") and total_bytes:
                os.posix_fallocate(self._fd, 0, total_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._full: SimpleQueue[tuple[mmap.mmap, int] | None] = SimpleQueue()
        for _ in range(NUM_STAGING):
            self._free.put(mmap.mmap(-1, STAGING_BYTES))
        self._filling: mmap.mmap | None = None
        self._filled = 0
        self._thread = threading.Thread(target=self._write_all, name=f"remelt-{path.name}", daemon=True)
        self._thread.start()

    def append(self, data: memoryview) -> None:
        """Take the next bytes; `data` may be used again as soon as this returns. Raises OSError of earlier bytes."""
        while data:
            if self._failure is not None:
                raise self._failure
            if self._filling is None:
                self._filling, self._filled = self._free.get(), 0
            count = min(len(data), STAGING_BYTES - self._filled)
            self._filling[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == STAGING_BYTES:
                self._full.put((self._filling, self._filled))
                self._filling = None

    def finish(self) -> str:
        """Make the file durable and close it; returns its sha256."""
        try:
            if self._filling is not None:
                self._full.put((self._filling, self._filled))
                self._filling = None
            self._stop()
            if self._failure is not None:
                raise self._failure
            if self._written != self._total:
                raise AssertionError(f"{self._written} of {self._total} bytes written")
            os.ftruncate(self._fd, self._total)
            os.fsync(self._fd)
        finally:
            self.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Let go of the file as it is; nothing where it is closed already."""
        if self._fd >= 0:
            self._stop()
            os.close(self._fd)
            self._fd = -1

    def _stop(self) -> None:
        self._full.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (entry := self._full.get()) is not None:
            buffer, length = entry
            if self._failure is None:
                try:
                    with memoryview(buffer) as view, view[:length] as data:
                        self._sha256.update(data)
                    self._write(buffer, length)
                except BaseException as failure:  # raised in the thread that appends
                    self._failure = failure
            self._free.put(buffer)
        while not self._free.empty():
            self._free.get().close()

    def _write(self, buffer: mmap.mmap, length: int) -> None:
        # Direct writes have whole sectors; what the last one writes too much is cut off at the end.
        padded = -(-length // ALIGNMENT) * ALIGNMENT
        with memoryview(buffer) as view:
            done = 0
            while done < padded:
                with view[done:padded] as rest:
                    done += self._pwrite(rest, self._written + done)
                if done % ALIGNMENT:
                    _leave_direct(self._fd)
        self._written += length
        if not _is_direct(self._fd) and self._written - self._written_back >= WRITEBACK_BYTES:
            if _libc is not None:
                start, size = ctypes.c_int64(self._written_back), ctypes.c_int64(self._written - self._written_back)
                _libc.sync_file_range(self._fd, start, size, _SYNC_FILE_RANGE_WRITE)
            self._written_back = self._written

    def _pwrite(self, data: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(self._fd):
                raise
            # Some filesystems open with O_DIRECT and refuse the write.
            _leave_direct(self._fd)
            return os.pwrite(self._fd, data, offset)


def _open_direct(path: Path) -> int:
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o644)


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _leave_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))
