"""What every checkpoint format must do: a new entry in FORMATS adds a maker here and gets these tests for free."""

from __future__ import annotations

import os
import pickle
import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_files import Tensors, sample_tensors, write_file, write_sharded
from remelt.checkpoint import CheckpointIndex
from remelt.dtypes import tensor_bytes
from remelt.errors import CheckpointError
from remelt.formats import FORMATS, open_checkpoint
from remelt.kernels.program import geometry_of
from remelt.range_reader import RangeReader


def _single(root: Path, tensors: Tensors) -> None:
    write_file(root / "model.safetensors", tensors)


def _sharded(root: Path, tensors: Tensors) -> None:
    names = list(tensors)
    cuts = [names[start : start + 3] for start in range(0, len(names), 3)]
    files = [f"model-{n + 1:05d}-of-{len(cuts):05d}.safetensors" for n in range(len(cuts))]
    write_sharded(root, {file: {name: tensors[name] for name in cut} for file, cut in zip(files, cuts, strict=True)})


Maker = Callable[[Path, Tensors], None]
MAKERS: dict[str, dict[str, Maker]] = {"safetensors": {"single": _single, "sharded": _sharded}}

every_format = pytest.mark.parametrize(
    ("name", "maker"),
    [pytest.param(name, maker, id=f"{name}-{kind}") for name, kinds in MAKERS.items() for kind, maker in kinds.items()],
)


def test_every_format_in_the_table_has_a_maker() -> None:
    assert set(MAKERS) == set(FORMATS)
    assert all(name == entry.name for name, entry in FORMATS.items())


def check_sound(index: CheckpointIndex) -> None:
    """Every byte of every tensor lies in its file, in no other tensor, and there are as many as the shape needs."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for info in index.tensors.values():
        for piece in info.pieces:
            assert 0 <= piece.offset <= piece.offset + piece.nbytes <= index.files[piece.file].size
            assert piece.nbytes == tensor_bytes(piece.dtype, piece.shape)
            taken.setdefault(piece.file, []).append((piece.offset, piece.offset + piece.nbytes))
    for spans in taken.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


@every_format
def test_index_tells_names_dtypes_shapes_and_sound_places(tmp_path: Path, name: str, maker: Maker) -> None:
    tensors = sample_tensors()
    maker(tmp_path, tensors)
    index = open_checkpoint(str(tmp_path))
    assert index.format == name
    assert {key: (info.dtype, info.shape) for key, info in index.tensors.items()} == {
        key: (dtype, array.shape) for key, (dtype, array) in tensors.items()
    }
    check_sound(index)
    assert pickle.loads(pickle.dumps(index)) == index == open_checkpoint(str(tmp_path))


@every_format
def test_index_reads_metadata_only(tmp_path: Path, name: str, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    maker(tmp_path, {f"t{n}": ("F32", np.zeros((256, 1024), "<f4")) for n in range(8)})
    read = 0
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal read
        content = pread(descriptor, length, offset)
        read += len(content)
        return content

    def refused(*_: object) -> None:
        raise AssertionError("the index read tensor data")

    monkeypatch.setattr(os, "pread", counted)
    for other in ("read", "preadv", "readv"):
        monkeypatch.setattr(os, other, refused)
    index = open_checkpoint(str(tmp_path))
    assert index.nbytes == 8 << 20
    assert 0 < read <= len(index.files) * (3 * 65_536 + 4_096)


@every_format
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_rows_equal_the_same_rows_of_a_full_read(
    tmp_path_factory: pytest.TempPathFactory, name: str, maker: Maker, data: st.DataObject
) -> None:
    root, tensors = tmp_path_factory.mktemp("rows"), sample_tensors()
    maker(root, tensors)
    tensor = data.draw(st.sampled_from(sorted(tensors)))
    array = tensors[tensor][1]
    geometry = geometry_of(tensor, array.shape)
    start = data.draw(st.integers(0, geometry.num_rows))
    stop = data.draw(st.integers(start, geometry.num_rows))
    with RangeReader(open_checkpoint(str(root))) as reader:
        assert reader.read(tensor).tobytes() == array.tobytes()
        rows = reader.read(tensor, (start, stop))
    assert np.array_equal(rows, array.reshape(geometry.num_rows, geometry.row_length)[start:stop])


@every_format
def test_reading_by_ranges_holds_no_more_than_its_buffer(tmp_path: Path, name: str, maker: Maker) -> None:
    maker(tmp_path, {"big": ("F32", np.zeros((4096, 1024), "<f4"))})
    index = open_checkpoint(str(tmp_path))
    info, buffer = index.tensors["big"], np.empty(1 << 18, np.uint8)
    with RangeReader(index) as reader:
        tracemalloc.start()
        for start in range(0, info.nbytes, buffer.nbytes):
            reader.read_into(info, start, buffer)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100_000


@every_format
def test_every_truncation_is_refused(tmp_path: Path, name: str, maker: Maker) -> None:
    maker(tmp_path, sample_tensors())
    for file in open_checkpoint(str(tmp_path)).files:
        path = tmp_path / file.name
        content = path.read_bytes()
        for length in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=r"truncated|header larger than the file"):
                open_checkpoint(str(tmp_path))
        path.write_bytes(content)
    open_checkpoint(str(tmp_path))


@every_format
def test_missing_file_is_refused_by_name(tmp_path: Path, name: str, maker: Maker) -> None:
    maker(tmp_path, sample_tensors())
    file = open_checkpoint(str(tmp_path)).files[-1].name
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=file if file != "model.safetensors" else "found nothing"):
        open_checkpoint(str(tmp_path))


@every_format
def test_damaged_metadata_is_refused_or_still_sound(tmp_path: Path, name: str, maker: Maker) -> None:
    maker(tmp_path, sample_tensors())
    rng = random.Random(5)
    originals: dict[Path, tuple[bytes, int]] = {}
    for file in open_checkpoint(str(tmp_path)).files:
        content = (tmp_path / file.name).read_bytes()
        originals[tmp_path / file.name] = content, 8 + int.from_bytes(content[:8], "little")
    for path in tmp_path.glob("*.json"):
        originals[path] = path.read_bytes(), path.stat().st_size
    num_refused = 0
    for _ in range(300):
        path, (content, metadata_bytes) = rng.choice(list(originals.items()))
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(metadata_bytes)] = rng.choice(b'\x00\xff0123456789-.,:"[]{}eE ')
        path.write_bytes(damaged)
        try:
            check_sound(open_checkpoint(str(tmp_path)))
        except CheckpointError:
            num_refused += 1
        path.write_bytes(content)
    assert num_refused > 150


@every_format
def test_fingerprints_do_not_depend_on_place_or_time(tmp_path: Path, name: str, maker: Maker) -> None:
    found: list[Any] = []
    for place in ("x", "y"):
        maker(tmp_path / place, sample_tensors())
        for path in (tmp_path / place).iterdir():
            os.utime(path, (1, len(found)))
        found.append([file.fingerprint for file in open_checkpoint(str(tmp_path / place)).files])
    assert found[0] == found[1]
