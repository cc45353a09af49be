"""Claim: a shard file has exactly the bytes it was given, past the page cache or not, and tells when a disk refuses."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from remelt import shard_file
from remelt.shard_file import ALIGNMENT, STAGING_BYTES, ShardFile

if TYPE_CHECKING:
    from collections.abc import Buffer

SIZES = (1, ALIGNMENT - 1, ALIGNMENT, STAGING_BYTES - 1, STAGING_BYTES, STAGING_BYTES + 1, 5 * STAGING_BYTES + 12_345)


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()


def write(path: Path, data: bytes, piece: int = 300_001) -> str:
    file = ShardFile(path, len(data))
    for start in range(0, len(data), piece):
        file.append(memoryview(data)[start : start + piece])
    return file.finish()


def refuse_direct_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, data, offset)

    monkeypatch.setattr(shard_file.os, "pwrite", pwrite)


def write_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(
        shard_file.os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 3)], offset)
    )


def open_without_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(shard_file.os, "open", open_)


@pytest.mark.parametrize("fault", [None, open_without_direct, refuse_direct_writes, write_in_parts])
@pytest.mark.parametrize("size", SIZES)
def test_the_file_is_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, fault) -> None:
    if fault is not None:
        fault(monkeypatch)
    data = random_bytes(size)
    assert write(tmp_path / "shard", data) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "shard").read_bytes() == data


def test_a_buffer_may_be_used_again_once_appended(tmp_path: Path) -> None:
    data = random_bytes(4 * STAGING_BYTES)
    buffer = bytearray(STAGING_BYTES // 2)
    file = ShardFile(tmp_path / "shard", len(data))
    for start in range(0, len(data), len(buffer)):
        buffer[:] = data[start : start + len(buffer)]
        file.append(memoryview(buffer))
    file.finish()
    assert (tmp_path / "shard").read_bytes() == data


def test_a_refused_write_is_raised_to_the_one_who_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_file.os, "pwrite", pwrite)
    data = random_bytes(8 * STAGING_BYTES)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "shard", data)


def test_closing_midway_ends_the_thread_and_may_be_repeated(tmp_path: Path) -> None:
    file = ShardFile(tmp_path / "shard", 10 * STAGING_BYTES)
    file.append(memoryview(random_bytes(2 * STAGING_BYTES)))
    file.close()
    file.close()
    assert not file._thread.is_alive()
