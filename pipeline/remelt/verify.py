"""Verify a published merge against its manifest: names, shapes, dtypes, every byte, and that values are finite."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remelt.commit import MANIFEST_FILE, WORK_DIR, read_manifest
from remelt.dtypes import DTYPES
from remelt.errors import CheckpointError, OutputError
from remelt.fingerprints import TensorDigest, checkpoint_digest
from remelt.formats import open_checkpoint
from remelt.formats.safetensors_header import parse_header, read_head
from remelt.kernels import count_nonfinite
from remelt.stored_bits import as_stored

BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found."""

    path: Path
    digest: str
    """Digest of the tensors as they are on disk now."""
    num_tensors: int
    num_bytes: int
    problems: tuple[str, ...]
    """One sentence each; empty where all is well."""


def verify_merge(output: Path, *, threads: int = 2, on_bytes: Callable[[int], None] = lambda _: None) -> Verification:
    """Re-hash every file and tensor of a merge and compare with its manifest.

    Non-finite values are a problem unless the recipe allows them. Raises OutputError where there is no manifest,
    CheckpointError where the output cannot be opened as a checkpoint.
    """
    manifest = read_manifest(output)
    if manifest is None:
        hint = (
            "it is unfinished: merge again to resume" if (output / WORK_DIR).is_dir() else "it is no output of remelt"
        )
        raise OutputError(f"{output} has no {MANIFEST_FILE}: {hint}")
    problems: list[str] = []
    try:
        index = open_checkpoint(str(output.absolute()))
    except CheckpointError as error:
        return Verification(output, "", 0, 0, (str(error),))
    listed = {file["name"]: file for file in manifest["files"]}
    found_files = {file.name for file in index.files}
    problems += [f"{name}: in the manifest, not in the checkpoint" for name in sorted(listed.keys() - found_files)]
    problems += [f"{name}: in the checkpoint, not in the manifest" for name in sorted(found_files - listed.keys())]
    checked: dict[str, tuple[str, tuple[int, ...], str]] = {}
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda file: _check_file(output / file.name, on_bytes), index.files)
        for file, (sha256, size, tensors) in zip(index.files, results, strict=True):
            expected = listed.get(file.name)
            if expected is not None and (sha256, size) != (expected["sha256"], expected["bytes"]):
                problems.append(
                    f"{file.name}: {size:,} bytes with sha256 {sha256[:12]}, the manifest says {expected['bytes']:,} "
                    f"bytes with {expected['sha256'][:12]}"
                )
            for name, (dtype, shape, digest, num_nonfinite) in tensors.items():
                checked[name] = (dtype, shape, digest)
                problems += _compare(name, dtype, shape, digest, num_nonfinite, manifest)
    problems += [f"{name}: in the manifest, not stored" for name in sorted(manifest["tensors"].keys() - checked.keys())]
    digest = checkpoint_digest(checked)
    if digest != manifest["digest"] and not problems:
        problems.append(f"digest {digest[:12]}, the manifest says {manifest['digest'][:12]}")
    return Verification(output, digest, len(checked), sum(file.size for file in index.files), tuple(problems))


def _compare(
    name: str, dtype: str, shape: tuple[int, ...], digest: str, num_nonfinite: int, manifest: dict[str, Any]
) -> list[str]:
    expected = manifest["tensors"].get(name)
    if expected is None:
        return [f"{name}: stored, not in the manifest"]
    problems = []
    if (dtype, list(shape)) != (expected["dtype"], expected["shape"]):
        problems.append(f"{name}: {dtype} {list(shape)}, the manifest says {expected['dtype']} {expected['shape']}")
    elif digest != expected["digest"]:
        problems.append(f"{name}: its bytes differ from the manifest's digest")
    if num_nonfinite and not manifest["recipe"].get("allow_nonfinite"):
        problems.append(f"{name}: {num_nonfinite} values are NaN or Inf")
    return problems


def _check_file(
    path: Path, on_bytes: Callable[[int], None]
) -> tuple[str, int, dict[str, tuple[str, tuple[int, ...], str, int]]]:
    """One pass over a shard: its sha256 and size, and (dtype, shape, digest, non-finite values) of each tensor."""
    head = read_head(path)
    table = parse_header(head, path, 0, {})
    buffer = np.empty(BLOCK_BYTES, np.uint8)
    tensors = {}
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = 8 + len(head.header)
        sha256 = hashlib.sha256(file.read(start))
        for name, info in table.items():
            digest, num_nonfinite, left = TensorDigest(info.dtype, info.shape), 0, info.nbytes
            while left:
                view = buffer[: min(left, BLOCK_BYTES)]
                count = file.readinto(view.data)
                if count != len(view):
                    raise CheckpointError(f"{path}: short read in {name}: wanted {len(view)} bytes, got {count}")
                sha256.update(view.data)
                digest.update(view.data)
                if DTYPES[info.dtype].is_mergeable:
                    num_nonfinite += count_nonfinite(as_stored(view, info.dtype), info.dtype)
                left -= count
                on_bytes(count)
            tensors[name] = (info.dtype, info.shape, digest.hexdigest(), num_nonfinite)
    return sha256.hexdigest(), head.size, tensors
