"""The byte table: what a checkpoint holds and where each byte of it lies.

Every format reduces to a `CheckpointIndex`: logical tensor -> (file, offset, length, dtype, shape, box in the global
tensor) plus a codec. It is built from metadata alone; no tensor data is read. One range reader serves all formats.

The records are named tuples rather than dataclasses because a plan over 16 checkpoints of 92,000 tensors holds three
million of them, and a tuple is the smallest and quickest frozen value that Python has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from remelt.dtypes import DTYPES

RAW = "raw"
FP8_BLOCK = "fp8_block"
"""float8_e4m3 codes with one float32 scale for each block; pieces are (codes, scales): one logical tensor."""


class Piece(NamedTuple):
    """A run of bytes in one file that holds a dense, row-major box of a tensor.

    `box` gives (start, stop) for each dimension of the logical tensor; None means that the piece is the whole of it
    (or, for a scaled codec, one of its parts, named by `part`).
    """

    file: int
    """Index into `CheckpointIndex.files`."""
    offset: int
    """Bytes from the beginning of the file."""
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    part: str = ""
    """The stored name of a part that is not the tensor's own, such as `...weight_scale_inv`; empty for the tensor."""
    box: tuple[tuple[int, int], ...] | None = None


class TensorInfo(NamedTuple):
    """One logical tensor of a checkpoint: dtype and shape as a reader delivers it, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    codec: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk, all parts counted."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def num_elements(self) -> int:
        num = 1
        for dim in self.shape:
            num *= dim
        return num

    @property
    def is_mergeable(self) -> bool:
        """Whether operators may compute on it: raw floating data of 16 bits or more."""
        return self.codec == RAW and DTYPES[self.dtype].is_mergeable


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a checkpoint, with what identifies its content cheaply.

    `fingerprint` covers size, header hash and two 64 KiB blocks (middle, last); it holds no path and no time.
    `size` and `mtime_ns` are kept beside it to notice a replacement during a run.
    """

    name: str
    """Path relative to the checkpoint's folder, with forward slashes."""
    size: int
    mtime_ns: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """What a checkpoint holds, from its metadata alone."""

    source: str
    """As the user wrote it: a path or a Hub id with its revision."""
    root: str
    """The local folder that holds `files`."""
    format: str
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, TensorInfo]
    """In storage order: by file, then by offset."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json, or empty where there is none."""
    quantization: str | None = None
    """The `quant_method` that config.json declares, where it declares one."""
    notes: tuple[str, ...] = ()
    """What a user would want to know, such as files in the folder that nothing refers to."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, all parts counted."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements over all logical tensors (scales are not counted)."""
        return sum(info.num_elements for info in self.tensors.values())
