"""Measured memory stays below what was projected, and that below what was allowed, however large the merge is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import measured_merge
from checkpoint_files import write_file
from merge_fixtures import make_recipe, write_pool

MB = 1_000_000
METHODS = ("linear", "ties", "della", "model_stock")
NUM_FILES = 4
"""Checkpoints that differ; further parents are hard links to them."""
NUM_PARENTS = 12

pytestmark = pytest.mark.slow


def write_parents(folder: Path, tensors: dict[str, tuple[int, int]]) -> dict[str, Path]:
    """A base and 12 parents whose tensors of these shapes are a little away from the base's."""
    size = max(rows * columns for rows, columns in tensors.values())
    base = np.random.default_rng(0).integers(0x3C00, 0x3F80, size, np.uint16)
    pool = {"base": folder / "base", **{f"p{number}": folder / f"p{number}" for number in range(1, NUM_PARENTS + 1)}}
    for number, path in enumerate(pool.values()):
        if number >= NUM_FILES:
            path.mkdir()
            os.link(folder / f"p{1 + number % (NUM_FILES - 1)}" / "model.safetensors", path / "model.safetensors")
            continue
        bits = base + np.random.default_rng(number).integers(0, 8 * min(number, 1) + 1, size, np.uint16)
        write_file(
            path / "model.safetensors",
            {name: ("BF16", bits[: shape[0] * shape[1]].reshape(shape)) for name, shape in tensors.items()},
        )
    return pool


def recipe_file(path: Path, pool: dict[str, Path], method: str, num_parents: int, **changes: Any) -> Path:
    """A recipe over the first so many parents."""
    if method in ("ties", "della"):
        changes["parameters"] = {"density": 0.5}
    path.write_text(make_recipe(dict(list(pool.items())[: num_parents + 1]), method, **changes).to_yaml())
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is merged before anything is measured."""
    return write_pool(tmp_path_factory.mktemp("small"))


def measure(folder: Path, warm: Path, runs: list[tuple[int, Path]]) -> list[dict[str, Any]]:
    """Measure merges with two threads, one after the other in one process."""
    arguments = [str(word) for run in runs for word in run]
    command = [sys.executable, measured_merge.__file__, "2", str(warm), str(folder), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of 40 MB each: one tensor of 24 MB, more of it over all parents than a small budget holds, and others."""
    shapes = {"model.embed_tokens.weight": (12_000, 1000), "model.layers.0.mlp.down_proj.weight": (500, 6_000)}
    shapes |= {f"model.layers.{number}.mlp.up_proj.weight": (1_000, 1000) for number in range(5)}
    return write_parents(tmp_path_factory.mktemp("parents"), shapes)


@pytest.mark.parametrize("method", METHODS)
def test_measured_memory_is_below_projected_is_below_allowed(
    method: str, parents: dict[str, Path], small: dict[str, Path], tmp_path: Path
) -> None:
    warm = recipe_file(tmp_path / "warm.yaml", small, method, 3)
    four = recipe_file(tmp_path / "four.yaml", parents, method, 4)
    twelve = recipe_file(tmp_path / "twelve.yaml", parents, method, NUM_PARENTS)
    runs = [(64 * MB, four), (128 * MB, four), (512 * MB, four), (128 * MB, twelve), (512 * MB, twelve)]
    rows = measure(tmp_path, warm, runs)
    for row, (memory, recipe) in zip(rows, runs, strict=True):
        assert row["measured"] <= row["projected"] <= row["allowed"] == memory, (recipe.stem, row)
        # What is kept between rounds is really there: a measurement that missed it would be none.
        assert row["measured"] > row["terms"].get("tensors kept between rounds", 0) // 2, (recipe.stem, row)
    assert len({row["digest"] for row in rows}) == 2


@pytest.mark.parametrize("shard_size", ["100kB", "1GB"])
def test_many_small_tensors_are_projected_too(
    shard_size: str, small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In one unit and in many, plan, records and manifest outweigh the tensors themselves."""
    folder = tmp_path_factory.mktemp("many")
    names = {f"model.layers.{n // 500}.mlp.experts.{n % 500}.up_proj.weight": (4, 8) for n in range(10_000)}
    recipe = recipe_file(folder / "r.yaml", write_parents(folder, names), "linear", 8, max_shard_size=shard_size)
    (row,) = measure(folder, recipe_file(folder / "warm.yaml", small, "linear", 3), [(256 * MB, recipe)])
    assert row["measured"] <= row["projected"] <= row["allowed"], row
