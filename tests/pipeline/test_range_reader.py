"""The range reader: the bytes that were asked for, from many threads, or an error that names the place."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import sample_tensors, write_file, write_sharded
from remelt.checkpoint import RAW, CheckpointIndex, Piece, SourceFile, TensorInfo
from remelt.dtypes import DTYPES
from remelt.errors import CheckpointError
from remelt.formats import open_checkpoint
from remelt.range_reader import RangeReader


def one_tensor(root: Path, num: int = 4096) -> tuple[CheckpointIndex, TensorInfo, np.ndarray[Any, Any]]:
    array = np.arange(num, dtype="<u4")
    write_file(root / "model.safetensors", {"a": ("U32", array)})
    index = open_checkpoint(str(root))
    return index, index.tensors["a"], array


def test_read_gives_the_stored_bits_of_every_kind_of_tensor(tmp_path: Path) -> None:
    tensors = sample_tensors()
    write_file(tmp_path / "model.safetensors", tensors)
    with RangeReader(open_checkpoint(str(tmp_path))) as reader:
        for name, (_, array) in tensors.items():
            got = reader.read(name)
            assert (got.shape, got.dtype, got.tobytes()) == (array.shape, array.dtype, array.tobytes())


def test_rows_count_over_all_leading_dimensions(tmp_path: Path) -> None:
    tensors = sample_tensors()
    write_file(tmp_path / "model.safetensors", tensors)
    name = "model.layers.0.mlp.experts.down_proj"
    with RangeReader(open_checkpoint(str(tmp_path))) as reader:
        assert np.array_equal(reader.read(name, (4, 9)), tensors[name][1].reshape(15, 7)[4:9])
        assert reader.read(name, (15, 15)).shape == (0, 7)


@pytest.mark.parametrize("kind", ["numpy", "memoryview", "bytearray", "numpy uint32"])
def test_read_into_fills_any_contiguous_buffer(tmp_path: Path, kind: str) -> None:
    index, info, array = one_tensor(tmp_path)
    made: dict[str, Any] = {
        "numpy": np.empty(40, np.uint8),
        "memoryview": memoryview(bytearray(40)),
        "bytearray": bytearray(40),
        "numpy uint32": np.empty(10, np.uint32),
    }
    with RangeReader(index) as reader:
        reader.read_into(info, 100, made[kind])
        reader.read_into(info, info.nbytes, bytearray(0))
    assert bytes(memoryview(made[kind])) == array.tobytes()[100:140]


def test_range_beyond_the_tensor_is_a_programmers_error(tmp_path: Path) -> None:
    index, info, _ = one_tensor(tmp_path)
    with RangeReader(index) as reader:
        for start in (-1, info.nbytes - 9, 2**70):
            with pytest.raises(ValueError, match="of a piece of"):
                reader.read_into(info, start, bytearray(10))
        with pytest.raises(ValueError, match="read_piece_into"):
            reader.read_into(info._replace(codec="fp8_block"), 0, bytearray(10))


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, info, array = one_tensor(tmp_path)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [memoryview(views[0]).cast("B")[:97]], at))
    buffer = np.empty(info.nbytes, np.uint8)
    with RangeReader(index) as reader:
        reader.read_into(info, 0, buffer)
    assert buffer.tobytes() == array.tobytes()


def test_file_that_ends_early_is_an_error_and_never_data(tmp_path: Path) -> None:
    index, info, _ = one_tensor(tmp_path)
    with RangeReader(index) as reader:
        reader.read_into(info, 0, bytearray(4))
        os.truncate(tmp_path / "model.safetensors", info.pieces[0].offset + 1000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: reading 2,000 bytes at offset .* got 200 and"):
            reader.read_into(info, 800, bytearray(2000))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads unmapped memory through /proc for a true EIO")
def test_error_of_the_disk_names_file_offset_and_reason() -> None:
    status = Path("/proc/self/mem").stat()
    piece = Piece(0, 0, 4096, "U8", (4096,))
    info = TensorInfo("U8", (4096,), RAW, (piece,))
    file = SourceFile("mem", status.st_size, status.st_mtime_ns, "")
    with (
        RangeReader(CheckpointIndex("memory", "/proc/self", "", (file,), {"a": info})) as reader,
        pytest.raises(CheckpointError, match=r"/proc/self/mem: reading 4,096 bytes at offset 0 failed: Input/output"),
    ):
        reader.read_into(info, 0, bytearray(4096))


def test_file_replaced_or_gone_since_indexing_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    index, info, _ = one_tensor(tmp_path)
    path = tmp_path / "model.safetensors"
    os.utime(path, (7, 7))
    with RangeReader(index) as reader:
        reader.read_into(info, 0, bytearray(4))  # a copy of another time: the fingerprint is the same
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with RangeReader(index) as reader, pytest.raises(CheckpointError, match="changed since it was indexed"):
        reader.read_into(info, 0, bytearray(4))
    (tmp_path / "model.safetensors").unlink()
    with RangeReader(index) as reader, pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        reader.read_into(info, 0, bytearray(4))


def test_threads_read_right_bytes_while_files_are_evicted(tmp_path: Path) -> None:
    shards = {f"{n}.safetensors": {f"t{n}": ("U32", np.arange(n, n + 5000, dtype="<u4"))} for n in range(6)}
    index = open_checkpoint(str(write_sharded(tmp_path, shards)))
    before = len(list(Path("/proc/self/fd").iterdir())) if sys.platform.startswith("linux") else 0
    peak = 0

    def work(seed: int) -> bool:
        nonlocal peak
        rng = np.random.default_rng(seed)
        for _ in range(300):
            n, start = int(rng.integers(6)), int(rng.integers(4000))
            buffer = np.empty(1000, "<u4")
            reader.read_into(index.tensors[f"t{n}"], start * 4, buffer)
            if not np.array_equal(buffer, np.arange(n + start, n + start + 1000)):
                return False
            peak = max(peak, len(reader._files))
        return True

    with RangeReader(index, max_open_files=2) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert peak <= 2
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
    with pytest.raises(ValueError, match="closed"):
        reader.read_into(index.tensors["t0"], 0, bytearray(4))


def test_closing_does_not_cut_off_reads_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, info, array = one_tensor(tmp_path)
    inside, go_on, whole = threading.Event(), threading.Event(), os.preadv

    def slow(fd: int, views: Any, at: int) -> int:
        inside.set()
        assert go_on.wait(10)
        return whole(fd, views, at)

    monkeypatch.setattr(os, "preadv", slow)
    reader, buffer = RangeReader(index), np.empty(4096, "<u4")
    thread = threading.Thread(target=reader.read_into, args=(info, 0, buffer))
    thread.start()
    assert inside.wait(10)
    reader.close()
    go_on.set()
    thread.join()
    assert np.array_equal(buffer, array)


def test_a_window_is_the_tensors_bytes_and_gone_with_the_array(tmp_path: Path) -> None:
    tensors = sample_tensors()
    path = write_file(tmp_path / "model.safetensors", tensors)
    index = open_checkpoint(str(tmp_path))

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    with RangeReader(index) as reader:
        for name, (dtype, array) in tensors.items():
            window = reader.window(index.tensors[name])
            piece = index.tensors[name].pieces[0]
            if piece.offset * 8 % DTYPES[dtype].item_bits:
                assert window is None
                continue
            assert window is not None and window.tobytes() == array.tobytes()
            assert not window.flags.writeable
            assert is_mapped() == bool(window.size)
            del window
            assert not is_mapped()


def test_a_window_beyond_the_end_of_a_file_is_refused_and_one_that_kernels_cannot_take_is_none(tmp_path: Path) -> None:
    index, info, _ = one_tensor(tmp_path)
    piece = info.pieces[0]
    with RangeReader(index) as reader:
        assert reader.window(info._replace(pieces=(piece._replace(offset=piece.offset + 1, nbytes=8),))) is None
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*ends before them"):
            reader.window(info._replace(pieces=(piece._replace(offset=piece.offset + 8),)))
