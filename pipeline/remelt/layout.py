"""Where output tensors are stored: shards cut along the base's storage order, and their safetensors headers.

The layout depends on the tensors alone, never on workers or memory, so that every executor writes the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from remelt.dtypes import DTYPES

MB = 1_000_000
GB = 1_000_000_000
SINGLE_FILE_BYTES = 1 * GB
"""Below this the output is one `model.safetensors`."""
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 512 * MB, 4 * GB
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Storable(NamedTuple):
    """An output tensor on its way to a place in a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    home: int
    """The base's file that holds it; used by `shard_layout: base`."""


def shard_size(total_bytes: int, max_shard_bytes: int | None = None) -> int:
    """Aimed size of a shard: 1/1024 of the total between 512 MB and 4 GB, or what the recipe says."""
    if max_shard_bytes is not None:
        return max_shard_bytes
    if total_bytes < SINGLE_FILE_BYTES:
        return SINGLE_FILE_BYTES
    return min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, -(-total_bytes // 1024)))


def cut_shards(tensors: Sequence[Storable], *, max_shard_bytes: int | None, keep_base_files: bool) -> list[list[int]]:
    """Group tensors, by their place in `tensors`, into shards: consecutive in storage order.

    A tensor larger than a shard makes a shard of its own.
    """
    if keep_base_files:
        groups: dict[int, list[int]] = {}
        for place, tensor in enumerate(tensors):
            groups.setdefault(tensor.home, []).append(place)
        return list(groups.values())
    limit = shard_size(sum(tensor.nbytes for tensor in tensors), max_shard_bytes)
    shards: list[list[int]] = []
    size = limit + 1
    for place, tensor in enumerate(tensors):
        if size + tensor.nbytes > limit and (not shards or shards[-1]):
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += tensor.nbytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """File names as transformers and vLLM expect them."""
    if num_shards == 1:
        return [SINGLE_FILE]
    return [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]


def order_in_shard(places: Sequence[int], tensors: Sequence[Storable]) -> list[int]:
    """Storage order, wider items first, so that every tensor starts on a multiple of its item size.

    Readers map tensors in place, and a float32 tensor at an odd offset cannot be mapped.
    """
    return sorted(places, key=lambda place: -DTYPES[tensors[place].dtype].item_bits)


def header_bytes(stored: Iterable[tuple[str, str, tuple[int, ...], int, int]]) -> bytes:
    """The safetensors header, length word included, for (name, dtype, shape, offset, bytes) in order.

    Padded with spaces to a multiple of 8; `format: pt` is what transformers asks for. It holds no time, path or host.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape, offset, nbytes in stored:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
