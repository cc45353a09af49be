"""Checkpoints written by hand for tests, damaged ones included: not through the code under test, nor a library's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, tuple[str, NDArray[Any]]]
"""Name -> (safetensors dtype, stored bits)."""


def header_of(tensors: Tensors) -> dict[str, Any]:
    """The header of a file that holds `tensors` in this order."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, array) in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    return header


def write_raw(path: Path, header: object, data: bytes, *, announced: int | None = None) -> Path:
    """Write any header over any data, with any length announced for the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if announced is None else announced
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def write_file(path: Path, tensors: Tensors) -> Path:
    """Write a sound safetensors file, its header padded to eight bytes as the library does."""
    text = json.dumps(header_of(tensors)).encode()
    return write_raw(path, text + b" " * (-len(text) % 8), b"".join(array.tobytes() for _, array in tensors.values()))


def write_sharded(root: Path, shards: Mapping[str, Tensors], **changes: object) -> Path:
    """Write shards and their index; `changes` replaces entries of the weight_map (None takes them out)."""
    weight_map: dict[str, object] = {}
    for file, tensors in shards.items():
        write_file(root / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    weight_map |= changes
    listed = {name: file for name, file in weight_map.items() if file is not None}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return root


def bf16(values: NDArray[np.float32]) -> tuple[str, NDArray[np.uint16]]:
    """Truncated to bfloat16, as stored bits."""
    return "BF16", (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def sample_tensors(seed: int = 0) -> dict[str, tuple[str, NDArray[Any]]]:
    """A tensor of every kind: matrices, a vector, a scalar, an empty one, a 3-D one, integers, booleans."""
    rng = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": bf16(rng.standard_normal((50, 16), np.float32)),
        "model.layers.0.mlp.up_proj.weight": bf16(rng.standard_normal((37, 16), np.float32)),
        "model.layers.0.mlp.experts.down_proj": bf16(rng.standard_normal((3, 5, 7), np.float32)),
        "model.norm.weight": ("F32", rng.standard_normal(16).astype("<f4")),
        "half": ("F16", rng.standard_normal((4, 9)).astype("<f2").view("<u2")),
        "double": ("F64", rng.standard_normal((2, 3)).astype("<f8")),
        "scalar": ("F32", np.array(1.5, "<f4")),
        "empty": ("F32", np.zeros((0, 4), "<f4")),
        "ids": ("I64", np.arange(6, dtype="<i8").view("<u8")),
        "mask": ("BOOL", np.array([1, 0, 1], np.uint8)),
    }
