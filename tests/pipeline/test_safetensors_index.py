"""The safetensors index: what it finds, and every refusal with its words."""

from __future__ import annotations

import gc
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import bf16, header_of, sample_tensors, write_file, write_raw, write_sharded
from remelt.checkpoint import FP8_BLOCK, RAW
from remelt.errors import CheckpointError
from remelt.fingerprints import check_unchanged
from remelt.formats import open_checkpoint
from remelt.formats.safetensors_index import paused_garbage_collection

ONE = {"a": ("F32", np.arange(6, dtype="<f4").reshape(2, 3))}
TWO = {"b": ("F32", np.zeros(4, "<f4"))}


def refused(root: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(root))
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_index_lists_tensors_in_storage_order_with_their_places(tmp_path: Path) -> None:
    tensors = sample_tensors()
    path = write_file(tmp_path / "model.safetensors", tensors)
    index = open_checkpoint(str(tmp_path))
    assert list(index.tensors) == list(tensors)
    content = path.read_bytes()
    for name, (dtype, array) in tensors.items():
        info = index.tensors[name]
        piece = info.pieces[0]
        assert (info.dtype, info.shape, info.codec) == (dtype, array.shape, RAW)
        assert content[piece.offset : piece.offset + piece.nbytes] == array.tobytes()
    assert index.nbytes == sum(array.nbytes for _, array in tensors.values())


def test_tensors_out_of_order_in_the_header_are_listed_by_offset(tmp_path: Path) -> None:
    header = header_of(ONE | TWO)
    write_raw(
        tmp_path / "model.safetensors", {"b": header["b"], "__metadata__": {"x": "y"}, "a": header["a"]}, bytes(40)
    )
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["a", "b"]


def test_files_written_by_the_safetensors_library_are_read_identically(tmp_path: Path) -> None:
    numpy_safetensors = pytest.importorskip("safetensors.numpy")
    safetensors = pytest.importorskip("safetensors")
    rng = np.random.default_rng(3)
    arrays = {f"t{n}": rng.standard_normal((n, 3)).astype(d) for n, d in enumerate(["f4", "f8", "f2", "i4", "u1"])}
    numpy_safetensors.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = open_checkpoint(str(tmp_path))
    content = (tmp_path / "model.safetensors").read_bytes()
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as theirs:
        assert set(theirs.keys()) == set(index.tensors)
        for name, info in index.tensors.items():
            piece = info.pieces[0]
            assert content[piece.offset : piece.offset + piece.nbytes] == theirs.get_tensor(name).tobytes()
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert info.dtype == theirs.get_slice(name).get_dtype()


def test_sharded_checkpoint_and_single_file_hold_the_same(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-00001-of-00002.safetensors": ONE, "model-00002-of-00002.safetensors": TWO})
    index = open_checkpoint(str(tmp_path))
    assert {name: index.files[info.pieces[0].file].name for name, info in index.tensors.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


def test_index_is_preferred_and_files_that_nothing_refers_to_are_noted(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"model-00001-of-00001.safetensors": ONE})
    write_file(tmp_path / "model.safetensors", TWO)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    index = open_checkpoint(str(tmp_path))
    assert list(index.tensors) == ["a"]
    assert "model.safetensors" in index.notes[0]
    assert "pytorch_model.bin" in index.notes[0]


def test_checkpoints_with_the_same_headers_share_one_table_until_both_are_gone(tmp_path: Path) -> None:
    for name in "xy":
        write_file(tmp_path / name / "model.safetensors", sample_tensors(ord(name)))
    x, y = open_checkpoint(str(tmp_path / "x")), open_checkpoint(str(tmp_path / "y"))
    assert x.tensors is y.tensors
    assert x.files[0].fingerprint != y.files[0].fingerprint
    copied = pickle.loads(pickle.dumps(x))
    assert copied == x
    assert type(copied.tensors) is dict


def test_garbage_collector_is_left_as_it_was() -> None:
    with paused_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_fingerprint_sees_the_last_bytes_and_neither_path_nor_time(tmp_path: Path) -> None:
    data = {"a": ("U8", np.zeros(300_000, np.uint8))}
    prints = []
    for name in "xyz":
        path = write_file(tmp_path / name / "model.safetensors", data)
        os.utime(path, (1, ord(name)))
        if name == "z":
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        prints.append(open_checkpoint(str(path.parent)).files[0].fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_file_replaced_since_it_was_indexed_is_noticed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.safetensors", ONE)
    index = open_checkpoint(str(tmp_path))
    check_unchanged(index)
    os.utime(path, (5, 5))
    with pytest.raises(CheckpointError, match="changed during the run"):
        check_unchanged(index)
    path.unlink()
    with pytest.raises(CheckpointError, match="plan again"):
        check_unchanged(index)


@pytest.mark.parametrize("cut", [1, 20, 24, 30, 90])
def test_truncated_file_is_refused_with_both_sizes(tmp_path: Path, cut: int) -> None:
    path = write_file(tmp_path / "model.safetensors", ONE)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - cut] if cut < size else b"")
    refused(tmp_path, "model.safetensors", "header larger than the file" if 24 < cut < size else "truncated file")


def test_truncation_names_expected_and_found_sizes(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.safetensors", ONE)
    size = path.stat().st_size
    os.truncate(path, size - 5)
    refused(tmp_path, "truncated file", f"{size:,}", f"{size - 5:,}", "5 missing", "download")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", header_of(ONE), bytes(25))
    refused(tmp_path, "1 bytes follow the last tensor")


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED_HEADERS: list[tuple[object, str]] = [
    (b"not json", "not valid JSON"),
    (b"[]", "not valid JSON"),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 24]}}', "whole ones"),
    ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__"),
    ({"a": 3}, "not a mapping"),
    ({"a": {"dtype": "F32", "shape": [6]}}, "no data_offsets"),
    ({"a": entry("F33")}, "dtype 'F33' is not known"),
    ({"a": entry(["F32"])}, "is not known"),
    ({"a": entry(shape=[2, -3])}, "not a list of counts"),
    ({"a": entry(shape=[[2], 3])}, "not a list of counts"),
    ({"a": entry(shape="23")}, "not a list of counts"),
    ({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, "overflows"),
    ({"a": entry(shape=[2, 4])}, "size against shape"),
    ({"a": entry(offsets=[0, 20])}, "size against shape"),
    ({"a": entry(offsets=[24, 0])}, "size against shape"),
    ({"a": entry(offsets=[-24, 0])}, "not two counts"),
    ({"a": entry(offsets=["0", 24])}, "not two counts"),
    ({"a": entry(offsets=[0, 24, 48])}, "not two counts"),
    ({"a": entry(), "b": entry(offsets=[12, 36])}, "overlapping offsets"),
    ({"a": entry(), "b": entry(offsets=[0, 24])}, "overlapping offsets"),
    ({"a": entry(), "b": entry(offsets=[28, 52])}, "hole in the data"),
    ({"a": entry(offsets=[8, 32])}, "hole in the data"),
    ({"a": entry(), "b": entry(offsets=[None, 52])}, "not two counts"),
    ({"a\nb": entry()}, "control characters"),
    ({}, "holds no tensors"),
]


@pytest.mark.parametrize(("header", "words"), DAMAGED_HEADERS, ids=[words for _, words in DAMAGED_HEADERS])
def test_damaged_header_is_refused(tmp_path: Path, header: object, words: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(24) if header else b"")
    refused(tmp_path, words)


@pytest.mark.parametrize("announced", [10_000, 2**63, 2**64 - 1])
def test_header_larger_than_the_file_is_refused(tmp_path: Path, announced: int) -> None:
    write_raw(tmp_path / "model.safetensors", header_of(ONE), bytes(24), announced=announced)
    refused(tmp_path, "header larger than the file", f"{announced:,}")


def test_header_above_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {}, b"", announced=100_000_001)
    os.truncate(path, 200_000_000)
    refused(tmp_path, "header of 100,000,001 bytes", "allows 100,000,000")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (7, "not a string"),
        ({"x": 1}, "not a string"),
        ("/etc/model.safetensors", "an absolute path"),
        ("C:\\model.safetensors", "an absolute path"),
        ("C:model.safetensors", "a Windows path"),
        ("sub\\model.safetensors", "a Windows path"),
        ("../model.safetensors", "outside the folder"),
        ("sub/../../model.safetensors", "outside the folder"),
        ("model.bin", "no name of a .safetensors file"),
        ("x" * 300 + ".safetensors", "no usable name: File name too long"),
        ("folder.safetensors", "missing file folder.safetensors"),
        ("gone.safetensors", "missing file gone.safetensors"),
        ("nul\x00.safetensors", "no name of a .safetensors file"),
    ],
)
def test_hostile_or_wrong_file_name_in_the_index_is_refused(tmp_path: Path, file: object, words: str) -> None:
    write_file(tmp_path / "model.safetensors", TWO)
    (tmp_path / "root" / "folder.safetensors").mkdir(parents=True)
    root = write_sharded(tmp_path / "root", {"x.safetensors": ONE}, b=file)
    refused(root, words, "model.safetensors.index.json")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_index_file_that_is_no_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "model.safetensors.index.json")


def test_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    target = write_file(tmp_path / "elsewhere" / "model.safetensors", ONE)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "model.safetensors").symlink_to(target)
    refused(tmp_path / "root", "a link outside the folder", str(target))


def test_index_and_shards_must_agree_on_every_tensor(tmp_path: Path) -> None:
    shards = {"x.safetensors": ONE, "y.safetensors": TWO}
    refused(write_sharded(tmp_path / "1", shards, c="x.safetensors"), "lists tensor c in x.safetensors", "absent")
    both = {"x.safetensors": ONE | {"c": ONE["a"]}, "y.safetensors": TWO}
    refused(write_sharded(tmp_path / "2", both, a="y.safetensors"), "tensor a in y.safetensors", "in x.safetensors")
    shards = {"x.safetensors": both["x.safetensors"], "y.safetensors": TWO | ONE}
    refused(write_sharded(tmp_path / "3", shards), "tensor a is present in two files", "x.safetensors", "y.safetensors")
    shards = {"x.safetensors": ONE | TWO}
    refused(write_sharded(tmp_path / "4", shards, b=None), "tensor b", "does not list")


def test_shard_of_the_set_that_the_index_leaves_out_is_refused(tmp_path: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": ONE, "model-00002-of-00002.safetensors": TWO}
    refused(write_sharded(tmp_path, shards, b=None), "shard not listed", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_config_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    write_file(tmp_path / "model.safetensors", ONE)
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "config.json")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], ".bin checkpoint"),
        (["pytorch_model.bin.index.json"], ".bin checkpoint"),
        (["model.pt"], ".pt or .ckpt"),
        (["epoch=3.ckpt"], ".pt or .ckpt"),
        (["consolidated.00.pth"], ".pt or .ckpt"),
        ([".metadata", "__0_0.distcp"], "DCP"),
        (["latest", "global_step100"], "DeepSpeed ZeRO"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "DeepSpeed ZeRO"),
    ],
)
def test_pickle_files_are_recognised_and_refused(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path, words, "pickle files are not read yet", "safetensors")


def test_folder_without_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, "no model.safetensors", "notes.txt")


def write_config(root: Path, quantization: object) -> None:
    (root / "config.json").write_text(json.dumps({"quantization_config": quantization}))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def fp8_tensors(rows: int = 200, columns: int = 130, scales: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    return {
        "x.weight": ("F8_E4M3", np.arange(rows * columns, dtype=np.uint32).astype(np.uint8).reshape(rows, columns)),
        "x.weight_scale_inv": ("F32", np.ones(scales, "<f4")),
        "norm.weight": bf16(np.ones(4, np.float32)),
    }


def test_fp8_weight_and_scales_are_one_logical_tensor(tmp_path: Path) -> None:
    tensors = fp8_tensors()
    scales = {"x.weight_scale_inv": tensors.pop("x.weight_scale_inv")}
    write_sharded(tmp_path, {"1.safetensors": tensors, "2.safetensors": scales})
    write_config(tmp_path, FP8)
    index = open_checkpoint(str(tmp_path))
    info = index.tensors["x.weight"]
    assert list(index.tensors) == ["x.weight", "norm.weight"]
    assert (info.codec, info.dtype, info.shape, info.is_mergeable) == (FP8_BLOCK, "F8_E4M3", (200, 130), False)
    assert [(piece.file, piece.part) for piece in info.pieces] == [(0, ""), (1, "x.weight_scale_inv")]
    assert info.nbytes == 200 * 130 + 16
    assert index.quantization == "fp8"
    assert index.num_parameters == 200 * 130 + 4


def test_fp8_scales_must_fit_the_block_size(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", fp8_tensors(scales=(2, 3)))
    write_config(tmp_path, FP8)
    refused(tmp_path, "x.weight_scale_inv", "[2, 3]", "128 x 128", "[2, 2]")
    write_config(tmp_path, FP8 | {"weight_block_size": [128, 64]})
    assert open_checkpoint(str(tmp_path)).tensors["x.weight"].codec == FP8_BLOCK


def test_fp8_weight_without_scale_and_scale_without_weight_are_refused(tmp_path: Path) -> None:
    tensors = fp8_tensors()
    alone = {name: tensors[name] for name in ("x.weight", "norm.weight")}
    write_file(tmp_path / "1" / "model.safetensors", alone)
    refused(tmp_path / "1", "quantised checkpoint of unknown kind", "x.weight in F8_E4M3 without x.weight_scale_inv")
    write_file(tmp_path / "2" / "model.safetensors", {"y_scale_inv": tensors["x.weight_scale_inv"]})
    refused(tmp_path / "2", "y_scale_inv has no fp8 weight")
    integers = ("I32", np.ones((2, 2), "<u4"))
    write_file(tmp_path / "3" / "model.safetensors", alone | {"x.weight_scale_inv": integers})
    refused(tmp_path / "3", "quantised checkpoint of unknown kind", "x.weight_scale_inv in I32")


@pytest.mark.parametrize(
    "declared",
    [
        *({"quant_method": method} for method in ("gptq", "awq", "compressed-tensors", "bitsandbytes", "mxfp4", 5)),
        {"bits": 4},
        ["fp8"],
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
    ],
)
def test_quantised_checkpoint_of_unknown_kind_is_refused(tmp_path: Path, declared: object) -> None:
    write_file(tmp_path / "model.safetensors", ONE)
    write_config(tmp_path, declared)
    refused(tmp_path, "quantised checkpoint of unknown kind: found quant_method", "dequantise first")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": declared}}))
    refused(tmp_path, "quantised checkpoint of unknown kind")


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("m.layers.0.q_proj.qweight", "I32", "gptq or awq"),
        ("m.layers.0.q_proj.qzeros", "I32", "gptq or awq"),
        ("m.layers.0.q_proj.weight_packed", "I32", "compressed-tensors"),
        ("m.experts.gate_up_proj_blocks", "U8", "mxfp4"),
        ("m.layers.0.q_proj.weight.absmax", "U8", "bitsandbytes"),
        ("m.layers.0.q_proj.weight", "I8", "integer"),
        ("m.layers.0.q_proj.weight", "F8_E5M2", "without a known scale"),
    ],
)
def test_quantised_tensors_are_recognised_without_a_config(tmp_path: Path, name: str, dtype: str, kind: str) -> None:
    item = {"I32": "<u4"}.get(dtype, "u1")
    write_file(tmp_path / "model.safetensors", {name: (dtype, np.zeros((4, 4), item))})
    refused(tmp_path, "quantised checkpoint of unknown kind", name, kind)
