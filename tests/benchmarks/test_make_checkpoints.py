"""The benchmarks' checkpoints are what they claim to be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_checkpoints.py"


@pytest.fixture(scope="module")
def generators() -> ModuleType:
    # By path: benchmarks are scripts, not a package.
    spec = importlib.util.spec_from_file_location("make_checkpoints", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_deepseek_layout_has_the_released_number_of_tensors_and_bytes(generators: ModuleType) -> None:
    entries = list(generators.DeepSeekShape().entries())
    assert len(entries) == 91_991
    assert len({entry.name for entry in entries}) == len(entries)
    # The released index says 688,586,727,753 bytes.
    assert sum(entry.nbytes for entry in entries) == pytest.approx(688.587e9, rel=1e-4)


def test_llama_shape_has_424m_parameters(generators: ModuleType) -> None:
    count = sum(torch.Size(shape).numel() for shape in generators.LlamaShape().shapes().values())
    assert count == pytest.approx(424e6, rel=5e-3)


def test_sparse_checkpoint_opens_takes_little_disk_and_differs_from_its_sibling(
    generators: ModuleType, tmp_path: Path
) -> None:
    shape = generators.DeepSeekShape(num_layers=4, num_experts=8)
    first, second = generators.write_sparse_deepseek(tmp_path, shape, count=2, num_shards=5)
    index = json.loads((first / "model.safetensors.index.json").read_text())
    files = sorted(first.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    names = set()
    for path in files:
        with safe_open(path, "pt") as opened:
            names |= set(opened.keys())
        assert path.stat().st_blocks * 512 < 0.01 * path.stat().st_size
        with path.open("rb") as mine, (second / path.name).open("rb") as other:
            for offset in (path.stat().st_size // 2, path.stat().st_size - 16):
                mine.seek(offset)
                other.seek(offset)
                assert mine.read(16) != other.read(16)
    assert names == set(index["weight_map"]) == {entry.name for entry in shape.entries()}


def test_miniature_scales_restore_the_weights_to_fp8_precision(generators: ModuleType) -> None:
    weight = torch.randn(160, 288, generator=torch.Generator().manual_seed(0))
    codes, scales = generators.quantise_fp8(weight)
    assert scales.shape == (2, 3)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:160, :288]
    # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, and 2^-10 scales below the normal range.
    assert ((codes.float() * spread - weight).abs() <= weight.abs() / 16 + spread * 2**-10).all()


def test_miniature_holds_every_class_of_the_released_layout(generators: ModuleType, tmp_path: Path) -> None:
    (folder,) = generators.write_miniature_deepseek(tmp_path, count=1, num_shards=2)
    names = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    assert names == {entry.name for entry in generators.MINIATURE.entries()}
    suffixes = {name.partition(".mlp.")[2].rpartition("experts.0.")[2] for name in names if ".experts.0." in name}
    assert suffixes == {
        f"{kind}_proj.{part}" for kind in ("gate", "up", "down") for part in ("weight", "weight_scale_inv")
    }


def test_same_seed_writes_the_same_bytes_and_another_seed_does_not(generators: ModuleType, tmp_path: Path) -> None:
    shape = generators.LlamaShape(num_layers=1, hidden=32, intermediate=48, vocab=64, num_heads=2)
    runs = [generators.write_llama(tmp_path / str(n), shape, num_fine_tunes=1, seed=n // 2) for n in range(3)]
    contents = [[(folder / "model.safetensors").read_bytes() for folder in folders] for folders in runs]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    assert contents[0][0] != contents[0][1]
