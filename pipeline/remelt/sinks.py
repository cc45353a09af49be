"""Where merged tensors go: the sink protocol, and the one that writes safetensors shards.

A sink takes the rows of each tensor in order, tensors in the order of their unit. Shard files are one kind; a resident
model's parameters are another. Digests are taken while the bytes pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remelt.errors import OutputError
from remelt.fingerprints import TensorDigest
from remelt.layout import header_bytes
from remelt.plan import OutputRecord, PlannedTensor, StoredTensor, TensorRecord
from remelt.shard_file import ShardFile


class Sink(Protocol):
    """What a unit's output of one coefficient set is handed to."""

    def target(self, stored: StoredTensor, start_byte: int, nbytes: int) -> NDArray[np.uint8] | None:
        """Memory where bytes [start_byte, start_byte + nbytes) may be made at once, by any thread and in any order, or
        None. They are handed to `write` as all others are, which then finds them in their place."""
        ...

    def write(self, stored: StoredTensor, start_byte: int, bits: NDArray[np.uint8], num_nonfinite: int) -> None:
        """Take bytes [start_byte, start_byte + len(bits)) of a tensor; called in order, from one thread at a time."""
        ...

    def finish(self) -> OutputRecord:
        """Make the output durable and say what it is."""
        ...

    def abort(self) -> None:
        """Forget what was written."""
        ...


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer has: containers on two hosts often share process ids."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to raise where the system refuses to write: a full disk, a quota, a device that fails."""
    return OutputError(
        f"{path}: cannot be written: {error.strerror or error}; make room or choose another disk, then merge again to "
        "resume"
    )


class ShardSink:
    """Writes one safetensors shard: a temporary file, synced, then renamed to its name in `directory`."""

    def __init__(self, directory: Path, file: str, tensors: Sequence[PlannedTensor]) -> None:
        self._path = directory / file
        self._temporary = temporary_name(self._path)
        header = header_bytes(tensor.stored for tensor in tensors)
        self._data_start = len(header)
        self._end = len(header)
        self._records: list[TensorRecord] = []
        self._digest: TensorDigest | None = None
        self._num_nonfinite = 0
        self._total_bytes = len(header) + sum(tensor.stored.nbytes for tensor in tensors)
        self._shard: ShardFile | None = None
        try:
            self._shard = ShardFile(self._temporary, self._total_bytes)
            self._shard.append(memoryview(header))
        except OSError as error:
            self.abort()
            raise unwritable(self._path, error) from error

    def target(self, stored: StoredTensor, start_byte: int, nbytes: int) -> NDArray[np.uint8] | None:
        return None

    def write(self, stored: StoredTensor, start_byte: int, bits: NDArray[np.uint8], num_nonfinite: int) -> None:
        position = self._data_start + stored.offset + start_byte
        assert position == self._end, f"{stored.name}: written at {position}, the shard ends at {self._end}"
        if self._digest is None:
            self._digest = TensorDigest(stored.dtype, stored.shape)
        self._digest.update(bits.data)
        self._num_nonfinite += num_nonfinite
        assert self._shard is not None
        try:
            self._shard.append(bits.data)
        except OSError as error:
            raise unwritable(self._path, error) from error
        self._end += bits.nbytes
        if start_byte + bits.nbytes == stored.nbytes:
            self._records.append(
                TensorRecord(stored.name, stored.dtype, stored.shape, self._digest.hexdigest(), self._num_nonfinite)
            )
            self._digest, self._num_nonfinite = None, 0

    def finish(self) -> OutputRecord:
        if self._end != self._total_bytes:
            raise AssertionError(f"{self._path.name}: {self._end} of {self._total_bytes} bytes written")
        assert self._shard is not None
        try:
            sha256 = self._shard.finish()
            self._temporary.rename(self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            self.abort()
            raise unwritable(self._path, error) from error
        return OutputRecord(self._path.name, self._total_bytes, sha256, tuple(self._records))

    def abort(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._temporary.unlink(missing_ok=True)
