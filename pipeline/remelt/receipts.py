"""Receipts: what proves that a unit is done, one small file for each, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from remelt.errors import CheckpointError
from remelt.fingerprints import file_sha256
from remelt.formats.safetensors_header import parse_header, read_head
from remelt.plan import OutputRecord, Unit, UnitReceipt
from remelt.sinks import sync_directory, temporary_name, unwritable

SHARDS, RECEIPTS = "shards", "receipts"


def write_file_durably(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all: temporary name, sync, rename, sync the folder."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def receipt_path(work_dir: Path, unit_id: str) -> Path:
    return work_dir / RECEIPTS / f"{unit_id}.json"


def write_receipt(work_dir: Path, receipt: UnitReceipt) -> None:
    """Put a unit's receipt beside its shards, after they are durable."""
    write_file_durably(receipt_path(work_dir, receipt.unit_id), receipt.to_json().encode())


def find_receipt(
    work_dir: Path, output: Path, unit: Unit, set_number: int, *, recheck: bool = False
) -> UnitReceipt | None:
    """A coefficient set's receipt of a unit, if it can be trusted: its id, and the shard's size and header match.

    With `recheck` the shard's bytes are hashed too.

    The shard is looked for among the work and, since a commit may have been cut off, in the output itself.
    """
    path = receipt_path(work_dir, unit.set_ids[set_number])
    try:
        receipt = UnitReceipt.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    if receipt.unit_id != unit.set_ids[set_number] or len(receipt.outputs) != 1:
        return None
    (record,) = receipt.outputs
    shard = find_shard(work_dir, output, record)
    if shard is None or [t.name for t in record.tensors] != [tensor.stored.name for tensor in unit.tensors]:
        return None
    try:
        found = parse_header(read_head(shard), shard, 0, {})
    except CheckpointError:
        return None
    planned = {tensor.stored.name: (tensor.stored.dtype, tensor.stored.shape) for tensor in unit.tensors}
    if {name: (info.dtype, info.shape) for name, info in found.items()} != planned:
        return None
    if recheck and file_sha256(shard) != record.sha256:
        return None
    return receipt


def find_shard(work_dir: Path, output: Path, record: OutputRecord) -> Path | None:
    """Where a shard lies: among the work, or moved into place already; None if neither has its size."""
    for path in (work_dir / SHARDS / record.file, output / record.file):
        if path.is_file() and path.stat().st_size == record.nbytes:
            return path
    return None
