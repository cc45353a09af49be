"""`topk: global`: one threshold over the whole model, exact, and the same however the passes are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import bf16, write_file
from merge_fixtures import make_recipe
from remelt.commit import WORK_DIR
from remelt.errors import RecipeError
from remelt.executor import LocalExecutor
from remelt.formats import open_checkpoint
from remelt.layout import MB
from remelt.merge import SURVEY_FILE, merge_recipe, open_checkpoints, run_plan
from remelt.planner import Budget, build_plan
from remelt.range_reader import RangeReader

Tensors = dict[str, tuple[str, np.ndarray[Any, Any]]]
SHAPES = {
    "model.embed_tokens.weight": (40, 96),
    "model.layers.0.mlp.up_proj.weight": (700, 96),
    "model.layers.0.mlp.down_proj.weight": (96, 700),
    "model.layers.0.input_layernorm.weight": (96,),
    "model.norm.weight": (96,),
}


def widen(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def make_tensors(seed: int, levels: int | None = None) -> Tensors:
    """A parent; with `levels`, task vectors take few distinct magnitudes, so that most elements tie."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    tensors: Tensors = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        values = np.zeros(shape, np.float32) if levels else base.standard_normal(shape).astype(np.float32)
        if seed and levels:
            values = own.integers(-levels, levels + 1, shape).astype(np.float32)
        elif seed:
            # Tensors of different spread, so that a threshold over the model is not the tensors' own.
            values = values + own.standard_normal(shape).astype(np.float32) * 0.05 * (number + 1)
        tensors[name] = bf16(values)
    return tensors


@pytest.fixture(params=[None, 3], ids=["spread", "tied"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    folders = {}
    for seed, name in enumerate(("base", "p1", "p2")):
        (tmp_path / name).mkdir()
        write_file(tmp_path / name / "model.safetensors", make_tensors(seed, request.param))
        folders[name] = tmp_path / name
    return folders


def read_values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    index = open_checkpoint(str(path))
    with RangeReader(index) as reader:
        return {name: widen(reader.read(name)) for name in index.tensors}


def reference(pool: dict[str, Path], density: float, weight: float) -> dict[str, np.ndarray[Any, Any]]:
    """TIES in float64 with one top-k over all tensors: names in sorted order, the lowest flat index wins."""
    base = read_values(pool["base"])
    names = sorted(base)
    kept = []
    for name in ("p1", "p2"):
        model = read_values(pool[name])
        flat = np.concatenate([(model[n] - base[n]).ravel() for n in names])
        rank = max(1, int(density * flat.size))
        order = np.argsort(-np.abs(flat), kind="stable")[:rank]
        masked = np.zeros(flat.size)
        masked[order] = flat[order]
        kept.append(masked * weight)
    votes = kept[0] + kept[1]
    sign = np.where(votes >= 0, 1.0, -1.0)
    agrees = [np.sign(each) == sign for each in kept]
    total = sum(each * agree for each, agree in zip(kept, agrees, strict=True))
    divisor = sum(agree * weight for agree in agrees)
    flat = total / np.where(divisor == 0, 1.0, divisor)
    merged, start = {}, 0
    for name in names:
        size = base[name].size
        merged[name] = base[name] + flat[start : start + size].reshape(base[name].shape)
        start += size
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_global_topk_matches_a_float64_reference(density: float, pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "ties", parameters={"density": density, "topk": "global"})
    merged = read_values(merge_recipe(recipe, tmp_path / "out", threads=2).path)
    expected = reference(pool, density, 0.4)
    for name, values in merged.items():
        bound = np.abs(expected[name]) * 2.0**-8 + 1e-6
        assert (np.abs(values - expected[name]) <= bound).all(), name


def test_same_bytes_for_any_threads_shards_and_budget(pool: dict[str, Path], tmp_path: Path) -> None:
    digests = set()
    for number, (threads, shard) in enumerate([(1, "1GB"), (3, "60kB"), (2, "200kB")]):
        recipe = make_recipe(pool, "ties", parameters={"density": 0.4, "topk": "global"}, max_shard_size=shard)
        digests.add(merge_recipe(recipe, tmp_path / str(number), threads=threads, memory_bytes=200 * MB).digest)
    assert len(digests) == 1


def test_two_sets_give_the_bytes_of_their_single_merges(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = [make_recipe(pool, "ties", parameters={"density": d, "topk": "global"}) for d in (0.3, 0.7)]
    indexes = open_checkpoints(recipes[0])
    executor = LocalExecutor(threads=2, memory_bytes=200 * MB)
    plan = build_plan(recipes, indexes, executor.budget())
    together = run_plan(plan, indexes, [tmp_path / "a", tmp_path / "b"], executor)
    alone = [merge_recipe(recipe, tmp_path / f"alone{n}", executor=executor) for n, recipe in enumerate(recipes)]
    assert [merged.digest for merged in together] == [merged.digest for merged in alone]


def test_a_resumed_run_surveys_once(pool: dict[str, Path], tmp_path: Path) -> None:
    passes: list[int] = []

    class Watched(LocalExecutor):
        stop = True

        def measure(self, plan: Any, request: Any, on_bytes: Any) -> Any:
            passes.append(request.round_)
            return super().measure(plan, request, on_bytes)

        def run(self, plan: Any, units: Any, *args: Any) -> None:
            super().run(plan, units[:1] if self.stop else units, *args)
            if self.stop:
                raise KeyboardInterrupt

    recipe = make_recipe(pool, "ties", parameters={"density": 0.4, "topk": "global"}, max_shard_size="60kB")
    executor = Watched(threads=1, memory_bytes=200 * MB)
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out", executor=executor)
    assert (tmp_path / "out" / WORK_DIR / SURVEY_FILE).exists()
    executor.stop = False
    merged = merge_recipe(recipe, tmp_path / "out", executor=executor)
    assert passes == [0, 1, 2]
    assert merged.digest == merge_recipe(recipe, tmp_path / "whole").digest


def test_unit_ids_depend_on_the_tensors_of_other_units(pool: dict[str, Path]) -> None:
    budget = Budget(memory_bytes=200 * MB)
    options = {"parameters": {"density": 0.4, "topk": "global"}, "max_shard_size": "60kB"}
    whole = make_recipe(pool, "ties", **options)
    part = make_recipe(pool, "ties", **options, rules=[{"match": {"name": "model.norm.weight"}, "copy": "base"}])
    plans = [build_plan(recipe, open_checkpoints(recipe), budget) for recipe in (whole, part)]
    assert not {unit.unit_id for unit in plans[0].units} & {unit.unit_id for unit in plans[1].units}


def test_a_density_that_changes_over_the_model_is_refused(pool: dict[str, Path]) -> None:
    cases = [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]
    recipe = make_recipe(pool, "ties", parameters={"density": cases, "topk": "global"})
    with pytest.raises(RecipeError, match="its density is one number"):
        build_plan(recipe, open_checkpoints(recipe), Budget(memory_bytes=200 * MB))


def test_at_density_one_nothing_is_surveyed_away(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = [make_recipe(pool, "ties", parameters={"density": 1.0, "topk": topk}) for topk in ("global", "tensor")]
    digests = {merge_recipe(recipe, tmp_path / str(n), threads=1).digest for n, recipe in enumerate(recipes)}
    assert len(digests) == 1
