"""Distances between checkpoints against plain float64 NumPy, and what inspect says of one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import remelt.diff
from checkpoint_files import bf16, sample_tensors, write_file
from remelt.decode import E4M3_VALUES, decode
from remelt.diff import diff
from remelt.formats import open_checkpoint
from remelt.inspection import inspect

NAME = "model.layers.0.mlp.up_proj.weight"


def indexed(root: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Any:
    write_file(root / "model.safetensors", tensors)
    (root / "config.json").write_text(json.dumps(config or {}))
    return open_checkpoint(str(root))


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
def test_distances_match_float64_numpy_for_any_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(remelt.diff, "BLOCK_ELEMENTS", block)
    one, two = sample_tensors(1), sample_tensors(2)
    report = diff(indexed(tmp_path / "a", one), indexed(tmp_path / "b", two), threads=2)
    assert [tensor.name for tensor in report.tensors] == list(one)
    for tensor in report.tensors:
        dtype = one[tensor.name][0]
        x, y = (decode(t[tensor.name][1], dtype).astype(np.float64).reshape(-1) for t in (one, two))
        found = tensor.distance
        assert found.num_elements == x.size
        assert found.num_changed == np.count_nonzero(x != y)
        assert found.absolute == pytest.approx(np.linalg.norm(x - y), rel=1e-12)
        if not x.size:
            assert (found.rms, found.relative, found.cosine) == (None, None, None)
            continue
        assert found.rms == pytest.approx(math.sqrt(np.mean((x - y) ** 2)), rel=1e-12)
        assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
        assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


def test_a_checkpoint_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    index = indexed(tmp_path, sample_tensors())
    report = diff(index, index)
    assert (report.total.absolute, report.total.num_changed) == (0.0, 0)
    assert report.total.cosine == pytest.approx(1.0)
    assert not (report.only_in_a or report.only_in_b or report.shape_differences or report.dtype_differences)


def test_classes_add_up_their_tensors_and_total_adds_up_classes(tmp_path: Path) -> None:
    report = diff(indexed(tmp_path / "a", sample_tensors(1)), indexed(tmp_path / "b", sample_tensors(2)))
    mlp = [tensor.distance for tensor in report.tensors if tensor.kind == "mlp"]
    assert report.classes["mlp"].absolute == pytest.approx(math.hypot(*(one.absolute for one in mlp)))
    assert report.total.absolute == pytest.approx(math.hypot(*(tensor.distance.absolute for tensor in report.tensors)))
    levels = [row["level"] for row in report.to_table()]
    assert levels == ["tensor"] * len(report.tensors) + ["class"] * len(report.classes) + ["total"]
    assert len({tuple(row) for row in report.to_table()}) == 1
    json.dumps(report.to_table(), allow_nan=False)


def test_what_cannot_be_compared_is_listed_and_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0]], np.float32)
    a = indexed(tmp_path / "a", {"x": bf16(values), "only_a": bf16(values), "s": bf16(values)})
    b = indexed(tmp_path / "b", {"x": ("F32", values), "s": bf16(values.T), "only_b": bf16(values)})
    report = diff(a, b)
    assert (report.only_in_a, report.only_in_b) == (("only_a",), ("only_b",))
    assert report.shape_differences == (("s", (1, 2), (2, 1)),)
    assert report.dtype_differences == (("x", "BF16", "F32"),)
    assert [(tensor.name, tensor.distance.num_changed) for tensor in report.tensors] == [("x", 0)]


def test_nan_in_a_parent_ends_as_missing_numbers(tmp_path: Path) -> None:
    a = indexed(tmp_path / "a", {"x": ("F32", np.array([1, np.nan], "<f4"))})
    b = indexed(tmp_path / "b", {"x": ("F32", np.array([1, 2], "<f4"))})
    row = diff(a, b).to_table()[0]
    assert [row[key] for key in ("absolute", "rms", "relative", "cosine", "num_changed")] == [None, None, None, None, 1]


@pytest.mark.parametrize("block", [50, 1 << 16])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_fp8_pairs_are_measured_by_their_dequantised_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, leading: tuple[int, ...]
) -> None:
    monkeypatch.setattr(remelt.diff, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 126, (*leading, 20, 70)).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (*leading, 3, 5)).astype("<f4")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 16]}}
    a = indexed(tmp_path / "a", {"x": ("F8_E4M3", codes), "x_scale_inv": ("F32", scales)}, config)
    spread = scales.repeat(8, -2).repeat(16, -1)[..., :20, :70]
    b = indexed(tmp_path / "b", {"x": ("F32", E4M3_VALUES[codes] * spread)})
    distance = diff(a, b).tensors[0].distance
    assert (distance.num_changed, distance.num_elements) == (0, codes.size)


def test_decoding_agrees_with_torch_on_every_code() -> None:
    torch = pytest.importorskip("torch")
    codes = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16}
    names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    for dtype, bits in codes.items():
        stored = np.arange(2**bits, dtype=np.uint32).astype(f"<u{bits // 8}")
        torch_dtype = getattr(torch, names.get(dtype, {"BF16": "bfloat16", "F16": "float16"}.get(dtype, "")))
        theirs = torch.from_numpy(stored).view(torch_dtype).to(torch.float32).numpy()
        np.testing.assert_array_equal(decode(stored, dtype).astype(np.float32), theirs)
    assert decode(np.array([2**64 - 1], "<u8"), "I64").tolist() == [-1.0]
    assert decode(np.array([255], "u1"), "U8").tolist() == [255.0]


def test_inspect_counts_every_tensor_once(tmp_path: Path) -> None:
    tensors = sample_tensors()
    index = indexed(tmp_path, tensors, {"model_type": "llama", "num_hidden_layers": 1})
    found = inspect(index)
    json.dumps(found)
    assert found["tensors"] == len(tensors)
    assert found["bytes"] == index.nbytes == sum(array.nbytes for _, array in tensors.values())
    assert found["parameters"] == index.num_parameters
    for counts in (found["dtypes"], *found["classes"].values()):
        assert all(count["tensors"] > 0 for count in counts.values())
    for key in ("tensors", "parameters", "bytes"):
        by_class = sum(count[key] for counts in found["classes"].values() for count in counts.values())
        assert by_class == found[key]
    assert (found["layers"], found["experts"], found["quantization"], found["tied_head"]) == (1, None, None, True)


def test_inspect_tells_experts_quantisation_and_an_untied_head(tmp_path: Path) -> None:
    expert = {f"model.layers.2.mlp.experts.{n}.up_proj.weight": ("F8_E4M3", np.zeros((4, 4), "u1")) for n in range(3)}
    scales = {f"{name}_scale_inv": ("F32", np.ones((1, 1), "<f4")) for name in expert}
    ends = {name: bf16(np.ones((4, 4), np.float32)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    found = inspect(indexed(tmp_path, expert | scales | ends, config))
    assert (found["layers"], found["experts"], found["quantization"], found["tied_head"]) == (3, 3, "fp8", False)
    assert found["classes"]["routed_experts"] == {"F8_E4M3 (fp8_block)": {"tensors": 3, "parameters": 48, "bytes": 60}}
