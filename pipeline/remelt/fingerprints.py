"""What identifies bytes: fingerprints of input files, digests of tensors and of whole checkpoints.

A *fingerprint* is cheap: size, header hash and three blocks of 64 KiB, because fine-tunes of one base have identical
headers and sizes. Training changes all of a file, so that it is noticed; a change of a few bytes elsewhere is not. It
holds no path and no time. A *digest* has seen every byte. A checkpoint's digest does not depend
on shards, file names or config.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from remelt.checkpoint import CheckpointIndex
from remelt.errors import CheckpointError

BLOCK_BYTES = 64 * 1024


def file_fingerprint(descriptor: int, size: int, header: bytes) -> str:
    """Fingerprint an open file of `size` bytes whose metadata is `header`; reads three blocks of 64 KiB at most."""
    first = os.pread(descriptor, BLOCK_BYTES, min(size, len(header)))
    middle = os.pread(descriptor, BLOCK_BYTES, max(0, (size - BLOCK_BYTES) // 2))
    last = os.pread(descriptor, BLOCK_BYTES, max(0, size - BLOCK_BYTES))
    parts = (xxhash.xxh3_128_hexdigest(part) for part in (header, first, middle, last))
    return xxhash.xxh3_128_hexdigest(" ".join((str(size), *parts)).encode())


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(index: CheckpointIndex) -> None:
    """Compare each file's size and time of change with what was indexed.

    Raises:
        CheckpointError: a file is gone, or was replaced or rewritten since the index was made.
    """
    for file in index.files:
        path = Path(index.root, file.name)
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{path}: was there when {index.source} was planned, now {error.strerror}; plan again"
            ) from error
        if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
            raise CheckpointError(
                f"{path}: changed during the run: planned with {file.size:,} bytes and time {file.mtime_ns}, found "
                f"{found.st_size:,} bytes and time {found.st_mtime_ns}; plan again from files that stay as they are"
            )


class TensorDigest:
    """xxh3-128 over a tensor's dtype, shape and raw little-endian bytes, taken as they stream by, in order."""

    __slots__ = ("_hash",)

    def __init__(self, dtype: str, shape: Iterable[int]) -> None:
        """`dtype` is safetensors' name of it."""
        self._hash = xxhash.xxh3_128(f"{dtype} {shape_text(shape)}\n".encode())

    def update(self, buffer: memoryview | bytes | NDArray[np.generic]) -> None:
        """Take the next bytes; `buffer` is contiguous. The GIL is released while large buffers are hashed."""
        if isinstance(buffer, np.ndarray):
            buffer = np.ascontiguousarray(buffer).data
        self._hash.update(buffer)

    def hexdigest(self) -> str:
        """The digest of what was taken so far: 32 hexadecimal digits."""
        return self._hash.hexdigest()


def shape_text(shape: Iterable[int]) -> str:
    """A shape as digests write it: `[4096,128]`, and `[]` for a scalar."""
    return "[" + ",".join(str(dim) for dim in shape) + "]"


def tensor_digest(dtype: str, array: NDArray[np.generic]) -> str:
    """Digest a whole tensor, given as its stored bits; `dtype` is safetensors' name, which NumPy may lack."""
    digest = TensorDigest(dtype, array.shape)
    digest.update(array)
    return digest.hexdigest()


def checkpoint_digest(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """sha256 over the sorted lines `name dtype shape tensor-digest`.

    Args:
        tensors: stored name -> (dtype, shape, tensor digest). Codes and scales of an fp8 pair are two entries.
    """
    return digest_of_lines(digest_line(name, *tensor) for name, tensor in tensors.items())


def digest_line(name: str, dtype: str, shape: Iterable[int], digest: str) -> bytes:
    """A tensor's line of the checkpoint digest."""
    return f"{name} {dtype} {shape_text(shape)} {digest}\n".encode()


def digest_of_lines(lines: Iterable[bytes]) -> str:
    """The checkpoint digest over the lines of all tensors, in any order."""
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()
