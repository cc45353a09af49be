"""One read, many candidates: a generation has the bytes and manifests of single merges, and is resumed like them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import write_file
from killed_runs import kill_rounds
from merge_fixtures import make_recipe, parent_tensors, write_pool
from remelt.commit import MANIFEST_FILE, WORK_DIR
from remelt.errors import BudgetError, NonFiniteError, OutputError, RecipeError
from remelt.executor import LocalExecutor
from remelt.layout import MB
from remelt.merge import merge_recipe, merge_recipes, open_checkpoints
from remelt.planner import Budget, build_plan
from remelt.recipe import Recipe
from remelt.verify import verify_merge

METHODS = ("linear", "ties", "dare_ties", "della", "model_stock", "breadcrumbs")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pool(tmp_path_factory.mktemp("pool"))


def generation(pool: dict[str, Path], method: str = "linear", count: int = 3, **changes: Any) -> list[Recipe]:
    """Recipes that differ in their weights, or where an operator has none in its rule's option."""
    recipes = []
    for number in range(count):
        weights = [0.2 + 0.1 * number, 0.5, 0.9 - 0.2 * number]
        parameters: dict[str, Any] = {}
        if method in ("ties", "dare_ties", "della", "breadcrumbs"):
            parameters["density"] = 0.4 + 0.07 * number
        models = [
            {"model": str(path), "name": name, "parameters": {} if method == "model_stock" else {"weight": weight}}
            for (name, path), weight in zip(list(pool.items())[1:], weights, strict=False)
        ]
        recipes.append(make_recipe(pool, method, models=models, parameters=parameters, seed=4, **changes))
    return recipes


def outputs_in(folder: Path, count: int) -> list[Path]:
    return [folder / f"set-{number}" for number in range(count)]


def all_bytes(output: Path) -> dict[str, str]:
    """Every file's hash; of the manifest what does not say when and how fast."""
    found = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == MANIFEST_FILE:
            manifest = json.loads(data)
            del manifest["execution"]
            data = json.dumps(manifest, sort_keys=True).encode()
        found[str(path.relative_to(output))] = hashlib.sha256(data).hexdigest()
    return found


class Counting(LocalExecutor):
    """Remembers what it was given, and stops, as if killed, after so many units."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(threads=2, memory_bytes=200 * MB)
        self.stop_after = stop_after
        self.worked: list[tuple[int, int]] = []
        """(coefficient sets, units) of each call."""

    def run(self, plan: Any, units: Any, work_dirs: Any, on_bytes: Any, on_receipt: Any) -> None:
        self.worked.append((plan.settings.num_sets, len(units)))
        super().run(plan, units[: self.stop_after], work_dirs, on_bytes, on_receipt)
        if self.stop_after is not None:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_every_file_is_that_of_a_merge_alone(method: str, pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = generation(pool, method, max_shard_size="100kB")
    together = merge_recipes(recipes, outputs_in(tmp_path, 3), threads=2, memory_bytes=200 * MB)
    for number, (recipe, merged) in enumerate(zip(recipes, together, strict=True)):
        alone = merge_recipe(recipe, tmp_path / f"alone-{number}", threads=1, memory_bytes=200 * MB)
        assert all_bytes(merged.path) == all_bytes(alone.path)
        assert (merged.digest, merged.run_id, merged.candidate_id) == (alone.digest, alone.run_id, alone.candidate_id)
        assert verify_merge(merged.path).problems == ()
    expected = 1 if method == "model_stock" else 3
    assert len({merged.digest for merged in together}) == expected


def test_global_thresholds_are_those_of_each_candidate_alone(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = [make_recipe(pool, "ties", parameters={"density": d, "topk": "global"}) for d in (0.3, 0.6, 0.9)]
    together = merge_recipes(recipes, outputs_in(tmp_path, 3), threads=2)
    for number, recipe in enumerate(recipes):
        alone = merge_recipe(recipe, tmp_path / f"alone-{number}", threads=2)
        assert all_bytes(together[number].path) == all_bytes(alone.path)


def test_the_parents_are_read_once_for_all(pool: dict[str, Path], tmp_path: Path) -> None:
    def bytes_read(output: Path) -> int:
        return int(json.loads((output / MANIFEST_FILE).read_text())["execution"]["bytes_read"])

    recipes = generation(pool, "ties", 8)
    merge_recipe(recipes[0], tmp_path / "alone", threads=2, memory_bytes=400 * MB)
    together = merge_recipes(recipes, outputs_in(tmp_path, 8), threads=2, memory_bytes=400 * MB)
    assert {bytes_read(merged.path) for merged in together} == {bytes_read(tmp_path / "alone")}


def test_a_candidate_of_a_generation_is_found_finished_alone_and_in_other_company(
    pool: dict[str, Path], tmp_path: Path
) -> None:
    recipes = generation(pool, "ties", 4)
    outputs = outputs_in(tmp_path, 4)
    merge_recipes(recipes[:2], outputs[:2], threads=1)
    assert merge_recipe(recipes[1], outputs[1]).is_reused
    executor = Counting()
    again = merge_recipes([recipes[1], recipes[2], recipes[3]], outputs[1:], executor=executor)
    assert [merged.is_reused for merged in again] == [True, False, False]
    assert executor.worked == [(2, 1)]
    nothing = Counting()
    assert all(merged.is_reused for merged in merge_recipes(recipes, outputs, executor=nothing))
    assert nothing.worked == []


def test_a_generation_resumes_where_it_was_cut(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = generation(pool, "della", max_shard_size="100kB")
    whole = merge_recipes(recipes, outputs_in(tmp_path / "whole", 3), threads=2)
    outputs = outputs_in(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        merge_recipes(recipes, outputs, executor=Counting(stop_after=2))
    assert not any((output / MANIFEST_FILE).exists() for output in outputs)
    executor = Counting()
    resumed = merge_recipes(recipes, outputs, executor=executor)
    num_units = len(list(whole[0].path.glob("*.safetensors")))
    assert executor.worked == [(3, num_units - 2)]
    assert [all_bytes(each.path) for each in resumed] == [all_bytes(each.path) for each in whole]
    assert not any((output / WORK_DIR).exists() for output in outputs)


def test_candidates_begun_apart_are_brought_level_and_finished_together(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = generation(pool, "ties", 2, max_shard_size="100kB")
    outputs = outputs_in(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipes[1], outputs[1], executor=Counting(stop_after=3))
    executor = Counting()
    merged = merge_recipes(recipes, outputs, executor=executor)
    num_units = len(list(outputs[0].glob("*.safetensors")))
    assert sorted(executor.worked) == [(1, 3), (2, num_units - 3)]
    for number, recipe in enumerate(recipes):
        alone = merge_recipe(recipe, tmp_path / f"alone-{number}")
        assert all_bytes(merged[number].path) == all_bytes(alone.path)


def test_a_surveyed_generation_resumes_for_those_that_are_left(pool: dict[str, Path], tmp_path: Path) -> None:
    densities = (0.3, 0.6)
    recipes = [
        make_recipe(pool, "ties", parameters={"density": d, "topk": "global"}, max_shard_size="100kB")
        for d in densities
    ]
    outputs = outputs_in(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipes[1], outputs[1], executor=Counting(stop_after=2))
    merged = merge_recipes(recipes, outputs, executor=Counting())
    for number, recipe in enumerate(recipes):
        assert merged[number].digest == merge_recipe(recipe, tmp_path / f"alone-{number}").digest


def test_killed_at_random_moments_a_generation_ends_with_the_same_bytes(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = generation(pool, "della", 3, max_shard_size="60kB")
    whole = merge_recipes(recipes, outputs_in(tmp_path / "whole", 3))
    outputs = outputs_in(tmp_path / "work", 3)
    (tmp_path / "work").mkdir()
    paths = []
    for number, recipe in enumerate(recipes):
        paths.append(tmp_path / f"recipe-{number}.yaml")
        paths[-1].write_text(recipe.to_yaml())
    num_killed = kill_rounds(
        "from pathlib import Path; from remelt.recipe_yaml import load_recipe; from remelt.merge import merge_recipes;"
        "import remelt.kernels, numpy",
        "paths = [Path(word) for word in sys.argv[1:]]; count = len(paths) // 2;"
        "recipes = [load_recipe(path) for path in paths[:count]];"
        "merge_recipes(recipes, paths[count:], threads=2, memory_bytes=300_000_000)",
        [*paths, *outputs],
        rounds=3,
        longest=0.4,
        rng=np.random.default_rng(1),
    )
    assert num_killed, "no process was killed while it ran"
    merged = merge_recipes(recipes, outputs)
    assert [all_bytes(each.path) for each in merged] == [all_bytes(each.path) for each in whole]


def test_refusals_are_those_of_a_single_merge(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = generation(pool, "linear", 2)
    outputs = outputs_in(tmp_path, 2)
    with pytest.raises(OutputError, match="asked for twice"):
        merge_recipes(recipes, [outputs[0], outputs[0]])
    with pytest.raises(OutputError, match="2 recipes and 1 outputs"):
        merge_recipes(recipes, outputs[:1])
    with pytest.raises(RecipeError, match="differ in their parameters alone"):
        merge_recipes([recipes[0], make_recipe(pool, "ties")], outputs)
    with pytest.raises(BudgetError, match="smallest plan needs"):
        merge_recipes(recipes, outputs, memory_bytes=10 * MB)
    outputs[1].mkdir()
    (outputs[1] / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds no run of remelt"):
        merge_recipes(recipes, outputs)
    assert not outputs[0].exists()
    (outputs[1] / "mine.txt").unlink()
    merge_recipe(make_recipe(pool, "ties"), outputs[1])
    with pytest.raises(OutputError, match="another recipe"):
        merge_recipes(recipes, outputs)
    merged = merge_recipes(recipes, outputs, force=True)
    assert [verify_merge(each.path).problems for each in merged] == [(), ()]


def test_a_nan_in_a_parent_publishes_none_of_them(pool: dict[str, Path], tmp_path: Path) -> None:
    tensors = parent_tensors(1)
    tensors["model.norm.weight"][1].reshape(-1)[:2] = 0x7FC0
    bad = tmp_path / "bad"
    bad.mkdir()
    write_file(bad / "model.safetensors", tensors)
    outputs = outputs_in(tmp_path, 3)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        merge_recipes(generation({**pool, "p1": bad}), outputs)
    assert not any((output / MANIFEST_FILE).exists() for output in outputs)


def test_projected_memory_grows_with_the_outputs_and_not_with_what_is_read(pool: dict[str, Path]) -> None:
    recipes = generation(pool, "linear", 8)
    indexes = open_checkpoints(recipes[0])
    budget = Budget(memory_bytes=900 * MB, threads=2)
    one, eight = (build_plan(recipes[:count], indexes, budget) for count in (1, 8))
    terms = [dict(plan.projection.terms) for plan in (one, eight)]
    name = "source blocks of 2 threads"
    assert terms[0][name] == terms[1][name]
    assert one.projection.total_bytes < eight.projection.total_bytes < 900 * MB
    assert eight.read_bytes == one.read_bytes and eight.write_bytes == 8 * one.write_bytes
