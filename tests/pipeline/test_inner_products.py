"""Inner products with a pool: exact against float64, the same bits however they are taken, in one reading."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import measured_products
from checkpoint_files import bf16, write_file
from remelt import inner_products
from remelt.errors import BudgetError, MismatchError, NonFiniteError, NumericsError
from remelt.executor import LocalExecutor
from remelt.formats import open_checkpoint
from remelt.inner_products import ProductPlan, collect, measure_products, plan_products
from remelt.oracle import TensorProducts
from remelt.planner import Budget
from remelt.range_reader import RangeReader

SHAPES = {
    "model.embed_tokens.weight": (37, 96),
    "model.layers.0.mlp.up_proj.weight": (900, 96),
    "model.layers.0.mlp.down_proj.weight": (96, 900),
    "model.layers.0.input_layernorm.weight": (96,),
    "model.norm.weight": (96,),
}
MEMORY = 200_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes in bfloat16, one of them in float32, and a gradient that lacks one tensor."""
    root = tmp_path_factory.mktemp("pool")
    base = {name: np.random.default_rng(0).standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    for number, name in enumerate(("base", "p1", "p2", "p3", "gradient")):
        rng = np.random.default_rng(number)
        tensors: dict[str, Any] = {}
        for tensor, values in base.items():
            own = values + 0.01 * rng.standard_normal(values.shape, np.float32) if number else values
            tensors[tensor] = ("F32", own) if name in ("p3", "gradient") else bf16(own)
        if name == "gradient":
            del tensors["model.norm.weight"]
        write_file(root / name / "model.safetensors", tensors)
    return root


def index(folder: Path, name: str) -> Any:
    return open_checkpoint(str(folder / name))


def make_plan(folder: Path, *, base: bool = True, **budget: Any) -> ProductPlan:
    pool = [index(folder, name) for name in ("p1", "p2", "p3", "base")]
    return plan_products(
        index(folder, "gradient"),
        pool,
        base=index(folder, "base") if base else None,
        with_squares=True,
        budget=Budget(memory_bytes=MEMORY, **budget),
    )


def run(plan: ProductPlan) -> TensorProducts:
    executor = LocalExecutor(threads=1)
    return collect(plan, list(executor.gather(measure_products, plan.settings, plan.units, 0)))


def values(folder: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    found = index(folder, name)
    with RangeReader(found) as reader:
        stored = {tensor: reader.read(tensor) for tensor in found.tensors}
    return {
        tensor: bits if bits.dtype == np.float32 else (bits.astype(np.uint32) << 16).view(np.float32)
        for tensor, bits in stored.items()
    }


@pytest.mark.parametrize("base", [True, False])
def test_products_match_a_float64_reference(folder: Path, base: bool) -> None:
    found = run(make_plan(folder, base=base, threads=2))
    gradient, origin = values(folder, "gradient"), values(folder, "base")
    assert found.names_T == tuple(gradient)
    for place, vertex in enumerate(("p1", "p2", "p3", "base")):
        weights = values(folder, vertex)
        for row, name in enumerate(found.names_T):
            delta = (weights[name] - origin[name] if base else weights[name]).astype(np.float64).ravel()
            g = gradient[name].astype(np.float64).ravel()
            scale = float(np.abs(g * delta).sum()) + 1e-300
            assert abs(found.products_TV[row, place] - g @ delta) <= 1e-13 * scale
            assert found.squares_TV[row, place] == pytest.approx(delta @ delta, rel=1e-13)
            assert found.gradient_squares_T[row] == pytest.approx(g @ g, rel=1e-13)


def test_threads_blocks_and_units_change_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make_plan(folder))
    for threads, block_elements, unit_bytes in ((1, 16_384, 1 << 30), (4, 32_768, 400_000), (3, 65_536, 1)):
        monkeypatch.setattr(inner_products, "BLOCK_ELEMENTS", (block_elements,))
        monkeypatch.setattr(inner_products, "UNIT_BYTES", (unit_bytes, unit_bytes))
        plan = make_plan(folder, threads=threads)
        assert len(plan.units) == {1 << 30: 1, 400_000: 2, 1: 4}[unit_bytes]
        found = run(plan)
        assert found.names_T == expected.names_T
        for one, two in zip(found[1:], expected[1:], strict=True):
            assert one.tobytes() == two.tobytes()


def test_every_tensor_is_read_once_and_the_base_not_again_as_a_vertex(folder: Path) -> None:
    plan = make_plan(folder)
    (unit,) = plan.units
    elements = sum(int(np.prod(shape)) for name, shape in SHAPES.items() if name != "model.norm.weight")
    # Gradient and p3 in float32; p1, p2 and the base, as origin, in bfloat16.
    assert plan.read_bytes == elements * (4 + 4 + 3 * 2)
    assert measure_products(plan.settings, unit).read_bytes == plan.read_bytes


def test_memory_does_not_grow_with_the_pool(folder: Path) -> None:
    gradient, member = index(folder, "gradient"), index(folder, "p1")
    few, many = (
        dict(plan_products(gradient, [member] * count, budget=Budget(memory_bytes=MEMORY)).projection.terms)
        for count in (2, 64)
    )
    assert many["blocks of 1 threads"] == few["blocks of 1 threads"]
    # What is left is metadata and sums: kilobytes for each tensor and checkpoint.
    assert sum(many.values()) - sum(few.values()) < 1_000_000


@pytest.mark.slow
def test_measured_memory_is_below_the_projected_and_that_of_a_small_pool(tmp_path: Path) -> None:
    shape = (6000, 4096)
    bits = np.random.default_rng(0).integers(0x3C00, 0x3F80, shape, np.uint16)
    for name in ("base", "member"):
        write_file(tmp_path / name / "model.safetensors", {"model.embed_tokens.weight": ("BF16", bits)})
    gradient = {"model.embed_tokens.weight": ("F32", bits.astype(np.float32))}
    write_file(tmp_path / "gradient" / "model.safetensors", gradient)
    folders = [tmp_path / name for name in ("gradient", "base", "member")]
    command = [sys.executable, measured_products.__file__, 2, 60_000_000, *folders, 2, 16]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    few, many = map(json.loads, done.stdout.splitlines())
    # The gradient alone is 98 MB.
    assert many["measured"] <= many["projected"] <= 60_000_000
    assert many["measured"] - few["measured"] < 2_000_000


def test_a_budget_that_is_too_small_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"stay within 10 MiB.*need \d+ MiB"):
        plan_products(index(folder, "gradient"), [index(folder, "p1")], budget=Budget(memory_bytes=10 << 20))


def test_a_pool_that_disagrees_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {name: bf16(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()}
    tensors["model.embed_tokens.weight"] = bf16(np.zeros((38, 96), np.float32))
    write_file(tmp_path / "wide" / "model.safetensors", tensors)
    with pytest.raises(MismatchError, match=r"\[38, 96\].*wide.*\[37, 96\]"):
        plan_products(index(folder, "gradient"), [index(tmp_path, "wide")])
    del tensors["model.embed_tokens.weight"]
    write_file(tmp_path / "short" / "model.safetensors", tensors)
    with pytest.raises(MismatchError, match=r"lacks 'model\.embed_tokens\.weight'"):
        plan_products(index(folder, "gradient"), [index(tmp_path, "short")])
    # Unless the tensor is left out.
    plan = plan_products(
        index(folder, "gradient"), [index(tmp_path, "short")], names={"model.layers.0.mlp.up_proj.weight"}
    )
    assert plan.names == ("model.layers.0.mlp.up_proj.weight",)


def test_nan_in_a_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    broken = values(folder, "p1")
    broken["model.layers.0.mlp.up_proj.weight"][5, 5] = np.nan
    write_file(tmp_path / "broken" / "model.safetensors", {name: ("F32", each) for name, each in broken.items()})
    plan = plan_products(
        index(folder, "gradient"), [index(folder, "p2"), index(tmp_path, "broken")], budget=Budget(memory_bytes=MEMORY)
    )
    with pytest.raises(NonFiniteError, match=r"up_proj\.weight of .*broken"):
        run(plan)


def test_a_worker_with_other_kernels_is_refused(folder: Path) -> None:
    plan = make_plan(folder)
    with pytest.raises(NumericsError, match="numerics cpu-other"):
        measure_products(replace(plan.settings, numerics="cpu-other"), plan.units[0])
