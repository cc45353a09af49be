"""The one range reader: any bytes of any tensor of an indexed checkpoint, into the caller's buffer, from many threads.

It is in the hot path of every merge: a read is a dictionary lookup and a `preadv`, which releases the GIL.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from remelt.checkpoint import RAW, CheckpointIndex, Piece, SourceFile, TensorInfo
from remelt.dtypes import DTYPES
from remelt.errors import CheckpointError
from remelt.kernels.program import geometry_of
from remelt.stored_bits import as_stored

Buffer: TypeAlias = "memoryview | bytearray | NDArray[Any]"
"""Writable and contiguous; filled whole."""

MAX_OPEN_FILES = 32
"""For one reader. Merges read files in sequence, so few are in use at once; twelve parents stay far below 1,024."""
_MADV_POPULATE_READ = 22
"""Linux: fill the page table at once, from the page cache or the disk, instead of by one fault for every few pages."""


class _OpenFile:
    """A descriptor that closes when the last thread lets go of it, so that eviction cannot cut off a read."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # Unset where os.open raised.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _is_same(path: Path, indexed: SourceFile) -> bool:
    """Whether a file of another time has the indexed content: a copy on another node, such as its own Hub cache."""
    from remelt.formats.safetensors_header import read_head

    return read_head(path).fingerprint == indexed.fingerprint


def _is_aligned(piece: Piece, start: int) -> bool:
    """Whether a piece's bytes from `start` on can be taken for elements where they lie in the file."""
    return (piece.offset + start) * 8 % DTYPES[piece.dtype].item_bits == 0


class RangeReader:
    """Reads byte ranges of one checkpoint. Thread-safe; a context manager; opens files when they are first read."""

    def __init__(self, index: CheckpointIndex, *, max_open_files: int = MAX_OPEN_FILES) -> None:
        self.index = index
        self._max_open_files = max_open_files
        self._files: dict[int, _OpenFile] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files; reads under way in other threads end as they would have."""
        with self._lock:
            self._is_closed = True
            self._files.clear()

    def read_into(self, info: TensorInfo, start: int, buffer: Buffer) -> None:
        """Fill `buffer` with bytes [start, start + len(buffer)) of a raw tensor's row-major data.

        Raises:
            CheckpointError: the disk gives an error or fewer bytes, or the file changed since it was indexed.
            ValueError: the tensor is not raw, or the range goes beyond it.
        """
        if info.codec != RAW or len(info.pieces) != 1:
            raise ValueError(f"codec {info.codec} with {len(info.pieces)} pieces is read with read_piece_into")
        self.read_piece_into(info.pieces[0], start, buffer)

    def read_piece_into(self, piece: Piece, start: int, buffer: Buffer) -> None:
        """Fill `buffer` with bytes [start, start + len(buffer)) of one piece; raises as `read_into`."""
        view = memoryview(buffer)  # type: ignore[arg-type]  # NumPy types its buffer from Python 3.12 on
        wanted = view.nbytes
        if not 0 <= start <= start + wanted <= piece.nbytes:
            raise ValueError(f"bytes {start} to {start + wanted} of a piece of {piece.nbytes}")
        if not wanted:
            return
        opened = self._files.get(piece.file) or self._open(piece.file)
        offset = piece.offset + start
        try:
            got = os.preadv(opened.descriptor, (view,), offset)
            if got != wanted:
                self._read_rest(opened, piece, view.cast("B"), offset, got)
        except OSError as error:
            raise self._failed(piece, offset, wanted, error.strerror or str(error)) from error

    def _read_rest(self, opened: _OpenFile, piece: Piece, view: memoryview, offset: int, got: int) -> None:
        # One preadv gives 2 GiB at most, and signals and network filesystems may give less.
        last = got
        while got < view.nbytes:
            if not last:
                raise self._failed(piece, offset, view.nbytes, f"got {got:,} and then the end of the file")
            last = os.preadv(opened.descriptor, (view[got:],), offset + got)
            got += last

    def _failed(self, piece: Piece, offset: int, wanted: int, reason: str) -> CheckpointError:
        path = Path(self.index.root, self.index.files[piece.file].name)
        return CheckpointError(
            f"{path}: reading {wanted:,} bytes at offset {offset:,} failed: {reason}; check the disk and the file, "
            "then resume"
        )

    def _open(self, file: int) -> _OpenFile:
        with self._lock:
            if self._is_closed:
                raise ValueError("the reader is closed")
            opened = self._files.get(file)
            if opened is None:
                opened = self._open_unchanged(file)
                while len(self._files) >= self._max_open_files:
                    del self._files[next(iter(self._files))]
                self._files[file] = opened
            return opened

    def _open_unchanged(self, file: int) -> _OpenFile:
        indexed = self.index.files[file]
        path = Path(self.index.root, indexed.name)
        try:
            opened = _OpenFile(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; it was there when planned") from error
        found = os.fstat(opened.descriptor)
        if (found.st_size, found.st_mtime_ns) != (indexed.size, indexed.mtime_ns) and not _is_same(path, indexed):
            raise CheckpointError(
                f"{path}: changed since it was indexed: {indexed.size:,} bytes then, {found.st_size:,} now, time "
                f"{indexed.mtime_ns} then, {found.st_mtime_ns} now; plan again"
            )
        return opened

    def view(self, info: TensorInfo, start: int, size: int) -> NDArray[np.uint8] | None:
        """Bytes [start, start + size) of a raw tensor where they are in memory already, else None: read them then."""
        return None

    def window(self, info: TensorInfo) -> NDArray[np.uint8] | None:
        """All bytes of a raw tensor, mapped into memory, and read ahead by the system; unmapped with the array.

        For who looks at a tensor more than once: what is in the page cache needs no copy. Its pages count as this
        process's memory while they are mapped. Where a page cannot be read any more (the file was cut short, the disk
        fails, a network mount is gone) the process ends with SIGBUS.

        Returns:
            The bytes, read-only; None where kernels could not take them as they lie.

        Raises:
            CheckpointError: as `read_into`.
            ValueError: the tensor is not raw.
        """
        if info.codec != RAW or len(info.pieces) != 1:
            raise ValueError(f"codec {info.codec} with {len(info.pieces)} pieces has no bytes to look at")
        (piece,) = info.pieces
        if not _is_aligned(piece, 0):
            return None
        if not piece.nbytes:
            return np.empty(0, np.uint8)
        opened = self._files.get(piece.file) or self._open(piece.file)
        if os.fstat(opened.descriptor).st_size < piece.offset + piece.nbytes:
            raise self._failed(piece, piece.offset, piece.nbytes, "the file ends before them")
        first = piece.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = piece.offset - first
        try:
            mapping = mmap.mmap(opened.descriptor, skipped + piece.nbytes, offset=first, access=mmap.ACCESS_READ)
            os.posix_fadvise(opened.descriptor, piece.offset, piece.nbytes, os.POSIX_FADV_WILLNEED)
        except OSError:
            return None  # a file system that maps nothing
        return np.frombuffer(mapping, np.uint8)[skipped:]

    def read_piece(self, piece: Piece) -> NDArray[np.generic]:
        """A whole piece as its stored bits, in its shape."""
        data = np.empty(piece.nbytes, np.uint8)
        self.read_piece_into(piece, 0, data)
        return as_stored(data, piece.dtype).reshape(piece.shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[np.generic]:
        """A tensor as its stored bits, for tests and tools; the codes of a scaled one.

        Args:
            name: of a tensor in the index.
            rows: [start, stop) counted in rows of the last dimension over all leading ones; None for all.

        Returns:
            The tensor in its shape, or (stop - start, row length) where rows are given.
        """
        info = self.index.tensors[name]
        piece = info.pieces[0]
        if rows is None:
            return self.read_piece(piece)
        start, stop = rows
        row_length = geometry_of(name, info.shape).row_length
        row_bytes = row_length * DTYPES[piece.dtype].item_bits // 8
        data = np.empty((stop - start) * row_bytes, np.uint8)
        self.read_piece_into(piece, start * row_bytes, data)
        return as_stored(data, piece.dtype).reshape(stop - start, row_length)


class MappedReader(RangeReader):
    """Also has whole files in its address space, so that what is in the page cache needs no copy.

    For those who read the same files again and again. What is mapped is the system's to drop and read again, but counts
    as this process's memory: map what an allowance covers. A file that is cut short while it is mapped ends the process
    (SIGBUS); one that is replaced, as writers with any care do, stays as it was opened.
    """

    def __init__(self, index: CheckpointIndex, *, max_open_files: int = MAX_OPEN_FILES) -> None:
        super().__init__(index, max_open_files=max_open_files)
        self._mapped: dict[int, NDArray[np.uint8]] = {}
        self._map_lock = threading.Lock()

    def close(self) -> None:
        super().close()
        # Views that are still held keep their mapping alive.
        self._mapped.clear()

    def view(self, info: TensorInfo, start: int, size: int) -> NDArray[np.uint8] | None:
        """Raises as `read_into`; None for bytes that kernels could not take as they lie."""
        if info.codec != RAW or len(info.pieces) != 1:
            raise ValueError(f"codec {info.codec} with {len(info.pieces)} pieces has no bytes to look at")
        (piece,) = info.pieces
        if not 0 <= start <= start + size <= piece.nbytes:
            raise ValueError(f"bytes {start} to {start + size} of a piece of {piece.nbytes}")
        offset = piece.offset + start
        if not _is_aligned(piece, start):
            return None
        mapped = self._mapped.get(piece.file)
        if mapped is None:
            mapped = self._map(piece.file)
        if offset + size > len(mapped):
            raise self._failed(piece, offset, size, f"the file has {len(mapped):,}")
        return mapped[offset : offset + size]

    def _map(self, file: int) -> NDArray[np.uint8]:
        with self._map_lock:
            if file not in self._mapped:
                opened = self._files.get(file) or self._open(file)
                # Private and writable only in name: torch wants no views that it could not write.
                mapping = mmap.mmap(opened.descriptor, 0, access=mmap.ACCESS_COPY)
                with suppress(OSError, ValueError):
                    mapping.madvise(_MADV_POPULATE_READ)
                self._mapped[file] = np.frombuffer(mapping, np.uint8)
            return self._mapped[file]
