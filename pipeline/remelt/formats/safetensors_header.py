"""One safetensors file: its header, read and checked byte for byte, without touching tensor data.

Format: 8 bytes, the header's length N as little-endian u64; N bytes of JSON, {name: {dtype, shape, data_offsets}} and
an optional `__metadata__` of strings; then the data, without holes or overlaps, to the end of the file
(https://huggingface.co/docs/safetensors/index#format). Headers come from strangers: everything is checked.

The loop over tensors runs 1.5 million times for sixteen checkpoints of the largest kind. It does the common case only
and hands anything odd to slower functions that find the words for it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from remelt.checkpoint import RAW, Piece, TensorInfo
from remelt.dtypes import DTYPES, tensor_bytes
from remelt.errors import CheckpointError
from remelt.fingerprints import file_fingerprint

MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""
MAX_DIM_PRODUCT = 2**63 - 1
LENGTH_BYTES = 8

AGAIN = "download or save it again"

Layout = tuple[int, str, tuple[int, ...]]
"""Bytes, dtype and shape of a tensor, the latter two shared by all tensors that have them."""
Layouts = dict[tuple[str, tuple[int, ...]], Layout]


class FileHead(NamedTuple):
    """What one read of a file's beginning gives, before anything in it is believed."""

    header: bytes
    size: int
    mtime_ns: int
    fingerprint: str


def read_head(path: Path) -> FileHead:
    """Read a file's header bytes and its fingerprint: the header and 128 KiB, whatever the file's size.

    Raises:
        CheckpointError: the file is missing or unreadable, or its header cannot be where its length says.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; {AGAIN}") from error
    try:
        status = os.fstat(descriptor)
        header = _read_header_bytes(descriptor, status.st_size, path)
        fingerprint = file_fingerprint(descriptor, status.st_size, header)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from error
    finally:
        os.close(descriptor)
    return FileHead(header, status.st_size, status.st_mtime_ns, fingerprint)


def _read_header_bytes(descriptor: int, size: int, path: Path) -> bytes:
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{path}: truncated file: found {size} bytes, a header alone takes more; {AGAIN}")
    length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: header larger than the file: it announces {length:,} bytes, the file has {size:,}; it is "
            f"truncated or no safetensors file: {AGAIN}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header of {length:,} bytes, where the format allows {MAX_HEADER_BYTES:,}; save it in more shards"
        )
    header = os.pread(descriptor, length, LENGTH_BYTES)
    if len(header) != length:
        raise CheckpointError(f"{path}: short read: wanted {length:,} header bytes, got {len(header):,}; try again")
    return header


def parse_header(head: FileHead, path: Path, file: int, layouts: Layouts) -> dict[str, TensorInfo]:
    """Index the tensors of one file, in storage order.

    Args:
        head: from `read_head`.
        path: for messages.
        file: the file's place in the checkpoint's `files`.
        layouts: dtypes and shapes seen so far, shared between the files of a checkpoint.

    Raises:
        CheckpointError: with the tensor's name, what was found, and what to do.
    """
    entries = _decode(head.header, path)
    try:
        items = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    except (TypeError, KeyError):
        _refuse_first_bad_entry(entries, path)
    table: dict[str, TensorInfo] = {}
    data_start = LENGTH_BYTES + len(head.header)
    position = 0
    new, intern = tuple.__new__, sys.intern
    for name, entry in items:
        try:
            begin, end = entry["data_offsets"]
            layout = layouts.get((entry["dtype"], tuple(entry["shape"])))
        except (TypeError, KeyError, ValueError):
            layout = None
        if layout is None:
            layout = _check_entry(name, entry, path)
            layouts[layout[1], layout[2]] = layout
        nbytes, dtype, shape = layout
        if begin != position or end - begin != nbytes or not name.isprintable():
            _refuse_placement(name, entry, position, path)
        # tuple.__new__ skips the keyword handling of a NamedTuple's own: a third of the time of this loop.
        piece = new(Piece, (file, data_start + position, nbytes, dtype, shape, "", None))
        table[intern(name)] = new(TensorInfo, (dtype, shape, RAW, (piece,)))
        position += nbytes
    _check_length(data_start + position, head.size, path)
    return table


def _decode(header: bytes, path: Path) -> dict[str, Any]:
    def refuse_number(text: str) -> NoReturn:
        raise ValueError(f"the number {text[:20]}, where only whole ones belong")

    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        entries = json.loads(header.decode(), parse_float=refuse_number, parse_constant=refuse_number)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise CheckpointError(f"{path}: header is not valid JSON: {reason}; {AGAIN}") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header's __metadata__ is no mapping of strings; {AGAIN}")
    return entries  # type: ignore[no-any-return]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIM_PRODUCT


def _check_entry(name: str, entry: object, path: Path) -> Layout:
    """Check all that can be said of one tensor without its neighbours."""

    def refuse(found: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {name!r}: {found}; the header is damaged or hostile: {AGAIN}")

    if not isinstance(entry, dict):
        refuse(f"its entry is {type(entry).__name__}, not a mapping")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            refuse(f"its entry has no {key}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"dtype {dtype!r} is not known (known: {', '.join(DTYPES)})")
    if not isinstance(shape, list) or not all(_is_count(dim) for dim in shape):
        refuse(f"shape {str(shape)[:80]} is not a list of counts")
    product = 1
    for dim in shape:
        product *= max(dim, 1)
    if product * DTYPES[dtype].item_bits > MAX_DIM_PRODUCT:
        refuse(f"shape {str(shape)[:80]} overflows 64 bits")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        refuse(f"data_offsets {str(offsets)[:80]} are not two counts")
    begin, end = offsets
    nbytes = tensor_bytes(dtype, tuple(shape))
    if end - begin != nbytes:
        refuse(f"size against shape: data_offsets span {end - begin:,} bytes, {dtype} {shape} takes {nbytes:,}")
    return nbytes, sys.intern(dtype), tuple(shape)


def _refuse_first_bad_entry(entries: dict[str, Any], path: Path) -> NoReturn:
    for name, entry in entries.items():
        _check_entry(name, entry, path)
    raise CheckpointError(f"{path}: header entries cannot be put in order; {AGAIN}")


def _refuse_placement(name: str, entry: object, position: int, path: Path) -> NoReturn:
    _check_entry(name, entry, path)
    assert isinstance(entry, dict)
    begin = entry["data_offsets"][0]
    if not name.isprintable():
        found = "its name holds control characters"
    elif begin < position:
        found = f"overlapping offsets: it begins at byte {begin:,}, the tensor before it ends at {position:,}"
    else:
        found = f"hole in the data: it begins at byte {begin:,}, the tensor before it ends at {position:,}"
    raise CheckpointError(f"{path}: tensor {name!r}: {found}; the header is damaged or hostile: {AGAIN}")


def _check_length(expected: int, found: int, path: Path) -> None:
    if found < expected:
        raise CheckpointError(
            f"{path}: truncated file: its header needs {expected:,} bytes, found {found:,} "
            f"({expected - found:,} missing); {AGAIN}"
        )
    if found > expected:
        raise CheckpointError(
            f"{path}: {found - expected:,} bytes follow the last tensor: its header needs {expected:,} bytes, found "
            f"{found:,}; {AGAIN}"
        )
