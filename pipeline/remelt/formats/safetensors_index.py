"""Safetensors checkpoints: `model.safetensors`, or shards under `model.safetensors.index.json`.

The index is made from headers alone. Fine-tunes of one base have byte-identical headers, so the tensor table is made
once for all checkpoints that share them and are open at the same time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from remelt.checkpoint import CheckpointIndex, SourceFile, TensorInfo
from remelt.companions import linked_companions
from remelt.errors import CheckpointError
from remelt.formats.quantized import Quantization, pair_fp8, read_quantization
from remelt.formats.safetensors_header import FileHead, Layouts, parse_header, read_head
from remelt.hub import leads_outside
from remelt.layout import INDEX_FILE, SINGLE_FILE

MAX_JSON_BYTES = 100_000_000
HEADER_THREADS = 8

_SHARD_NAME = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


class _Shard(NamedTuple):
    name: str
    path: Path
    head: FileHead


class TensorTable(dict[str, TensorInfo]):
    """The tensors of one layout, never changed once made; a dict that weak references can name."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type[dict[str, TensorInfo]], tuple[dict[str, TensorInfo]]]:
        return dict, (dict(self),)


_WEIGHTS_NAME = re.compile(r".*\.safetensors|pytorch_model.*\.bin")

_tables: weakref.WeakValueDictionary[str, TensorTable] = weakref.WeakValueDictionary()


def is_safetensors(names: frozenset[str]) -> bool:
    """Whether a folder with these file names holds a checkpoint of this format."""
    return INDEX_FILE in names or SINGLE_FILE in names


def index_safetensors(source: str, root: Path) -> CheckpointIndex:
    """Index a folder from its JSON files and headers; reads no tensor data but each file's fingerprint blocks.

    Args:
        source: as the user wrote it.
        root: the folder.

    Raises:
        CheckpointError: anything is missing, damaged, hostile or quantised in an unknown way.
    """
    config = read_config(root)
    quantization = read_quantization(config, source)
    index_bytes = _read_bounded(root / INDEX_FILE) if (root / INDEX_FILE).exists() else b""
    weight_map = _weight_map(index_bytes, root / INDEX_FILE) if index_bytes else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    in_folder = frozenset(path.name for path in root.iterdir())
    paths = [_contained_path(root, name) for name in names]
    _check_shards_listed(root, names, in_folder)
    # Six round trips a file: over a network filesystem a hundred shards take a second at once, ten one by one.
    with ThreadPoolExecutor(min(HEADER_THREADS, len(paths))) as pool:
        heads = list(pool.map(read_head, paths))
    shards = [_Shard(*shard) for shard in zip(names, paths, heads, strict=True)]
    table = _shared_table(source, shards, weight_map, index_bytes, quantization)
    return CheckpointIndex(
        source=source,
        root=str(root),
        format="safetensors",
        files=tuple(SourceFile(name, head.size, head.mtime_ns, head.fingerprint) for name, _, head in shards),
        tensors=table,
        config=config,
        quantization=quantization.method,
        notes=(*_notes(in_folder - set(names), table, quantization), *_links_note(root)),
    )


def read_config(root: Path) -> dict[str, Any]:
    """config.json as a mapping, or an empty one where there is none."""
    path = root / "config.json"
    if not path.exists():
        return {}
    if leads_outside(root, path):
        raise CheckpointError(
            f"{path}: is a link outside the folder, to {path.resolve()}, and would be published with a merge; copy the "
            "file there"
        )
    return _read_json_object(_read_bounded(path), path)


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_JSON_BYTES:,} bytes, which no checkpoint needs; check the file")
    return content


def _read_json_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {str(error)[:200]}; download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a mapping; download or save it again")
    return value


def _weight_map(content: bytes, path: Path) -> dict[str, str]:
    weight_map = _read_json_object(content, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files; download or save it again")
    for file in set(map(type, weight_map.values())) - {str}:
        raise CheckpointError(f"{path}: weight_map names a file by {file.__name__}, not a string; the index is damaged")
    return weight_map


def _contained_path(root: Path, name: str) -> Path:
    """The path of a file that an index names, which is attacker-controlled, or a refusal."""

    def refuse(found: str) -> CheckpointError:
        return CheckpointError(
            f"{root / INDEX_FILE}: names the file {name!r}, which is {found}; only files inside the checkpoint's "
            "folder are read: correct the index, or copy the files there"
        )

    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise refuse("an absolute path")
    if PureWindowsPath(name).drive or "\\" in name:
        raise refuse("a Windows path")
    if ".." in PurePosixPath(name).parts:
        raise refuse("outside the folder ('..')")
    if not name.endswith(".safetensors") or not name.isprintable():
        raise refuse("no name of a .safetensors file")
    path = root / name
    try:
        if not path.is_file():
            raise CheckpointError(f"{root / INDEX_FILE}: names the missing file {name}; download or copy it again")
    except OSError as error:
        raise refuse(f"no usable name: {error.strerror}") from error
    if leads_outside(root, path):
        raise refuse(f"a link outside the folder, to {path.resolve()}")
    return path


def _check_shards_listed(root: Path, names: Sequence[str], in_folder: frozenset[str]) -> None:
    """Refuse an index that leaves out a shard of its own set, as a half-written or hand-edited one does."""
    sets = {(match[1], match[3]) for name in names if (match := _SHARD_NAME.fullmatch(name))}
    for name in sorted(in_folder.difference(names)):
        match = _SHARD_NAME.fullmatch(name)
        if match and (match[1], match[3]) in sets:
            raise CheckpointError(
                f"{root / INDEX_FILE}: shard not listed: {name} lies in the folder and belongs to the same set of "
                f"{int(match[3])} shards, but the index names no tensor of it; make the index again, or remove the file"
            )


def _shared_table(
    source: str,
    shards: Sequence[_Shard],
    weight_map: dict[str, str] | None,
    index_bytes: bytes,
    quantization: Quantization,
) -> TensorTable:
    """The table of these headers: one that another open checkpoint has already, or a new one.

    sha256 rather than a quick hash, since a crafted collision would have one file read by another's offsets.
    """
    key = hashlib.sha256(repr((quantization, [(name, head.size) for name, _, head in shards])).encode())
    for content in (index_bytes, *(shard.head.header for shard in shards)):
        key.update(hashlib.sha256(content).digest())
    table = _tables.get(key.hexdigest())
    if table is None:
        with paused_garbage_collection():
            table = _build_table(source, shards, weight_map, quantization)
        _tables[key.hexdigest()] = table
    return table


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Hold the collector back while a million small tuples, none of them in a cycle, are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _build_table(
    source: str,
    shards: Sequence[_Shard],
    weight_map: dict[str, str] | None,
    quantization: Quantization,
) -> TensorTable:
    layouts: Layouts = {}
    table = TensorTable()
    where: dict[str, str] = {}
    for file, (name, path, head) in enumerate(shards):
        tensors = parse_header(head, path, file, layouts)
        twice = table.keys() & tensors.keys()
        if twice:
            tensor = min(twice)
            raise CheckpointError(
                f"{source}: tensor {tensor} is present in two files, {where[tensor]} and {name}; save the checkpoint "
                "again, with each tensor once"
            )
        table.update(tensors)
        where.update(dict.fromkeys(tensors, name))
    if weight_map is not None and where != weight_map:
        _refuse_weight_map(source, weight_map, where)
    if not table:
        raise CheckpointError(f"{source}: holds no tensors; check that this is a model's checkpoint")
    pair_fp8(table, quantization.block, source)
    return table


def _refuse_weight_map(source: str, weight_map: dict[str, str], where: dict[str, str]) -> None:
    again = f"make {INDEX_FILE} again, or download the files again"
    for tensor, file in weight_map.items():
        if tensor not in where:
            raise CheckpointError(
                f"{source}: the index lists tensor {tensor} in {file}, but it is absent there; {again}"
            )
        if where[tensor] != file:
            raise CheckpointError(
                f"{source}: the index lists tensor {tensor} in {file}, but it is in {where[tensor]}; {again}"
            )
    for tensor in where.keys() - weight_map.keys():
        raise CheckpointError(
            f"{source}: {where[tensor]} holds tensor {tensor}, which the index does not list; {again}"
        )


def _links_note(root: Path) -> tuple[str, ...]:
    links = linked_companions(root)
    return (f"not carried over, being links outside the folder: {', '.join(links)}",) if links else ()


def _notes(unlisted: frozenset[str], table: TensorTable, quantization: Quantization) -> tuple[str, ...]:
    unread = sorted(name for name in unlisted if _WEIGHTS_NAME.fullmatch(name))
    notes = []
    if unread:
        shown = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
        notes.append(f"not read, since nothing refers to them: {shown}")
    if quantization.method and not any(info.codec != "raw" for info in table.values()):
        notes.append(f"config.json declares quant_method {quantization.method}, but no tensor is quantised")
    return tuple(notes)
