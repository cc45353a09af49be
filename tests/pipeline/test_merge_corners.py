"""Corners of the engine that once gave wrong bytes, lost work, or overwrote what was not ours."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import bf16, write_file
from merge_fixtures import make_recipe, parent_tensors, write_pool
from remelt.checkpoint import TensorInfo
from remelt.commit import MANIFEST_FILE, WORK_DIR, OutputRun
from remelt.errors import NonFiniteError, OutputError, RecipeError
from remelt.executor import LocalExecutor
from remelt.formats import open_checkpoint
from remelt.layout import MB
from remelt.merge import merge_recipe, open_checkpoints, run_plan
from remelt.planner import Budget, build_plan, plan_sizes
from remelt.range_reader import RangeReader
from remelt.recipe import Recipe
from remelt.verify import verify_merge

Tensors = dict[str, tuple[str, np.ndarray[Any, Any]]]


def write_parents(root: Path, *parents: Tensors) -> dict[str, Path]:
    pool = {}
    for name, tensors in zip(("base", "p1", "p2", "p3"), parents, strict=False):
        (root / name).mkdir(parents=True)
        write_file(root / name / "model.safetensors", tensors)
        pool[name] = root / name
    return pool


def read(path: Path, name: str) -> np.ndarray[Any, Any]:
    with RangeReader(open_checkpoint(str(path))) as reader:
        return reader.read(name)


def widen(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pool(tmp_path_factory.mktemp("pool"))


def test_tensors_of_one_shape_with_different_source_dtypes_are_all_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((2000, 300)).astype(np.float32) for _ in range(4)]
    narrow = {"a.weight": bf16(values[0]), "b.weight": bf16(values[1])}
    mixed = {"a.weight": bf16(values[2]), "b.weight": ("F32", values[3])}
    pool = write_parents(tmp_path, narrow, narrow, mixed)
    output = merge_recipe(make_recipe(pool, "linear", dtype="bfloat16"), tmp_path / "out", threads=2).path
    expected = (widen(narrow["b.weight"][1]).astype(np.float64) + values[3]) / 2
    assert np.abs(widen(read(output, "b.weight")) - expected).max() < 0.02


def test_an_operator_that_takes_whole_tensors_gets_whole_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parents = [{"a.weight": ("F32", rng.standard_normal((2000, 300)).astype(np.float32))} for _ in range(3)]
    pool = write_parents(tmp_path, *parents)
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    recipe = make_recipe(pool, "nuslerp", parameters=options)
    merged = merge_recipe(recipe, tmp_path / "out", threads=2)
    from reference_operators import nuslerp

    expected = nuslerp(
        parents[0]["a.weight"][1],
        [parents[1]["a.weight"][1], parents[2]["a.weight"][1]],
        [0.4, 0.4],
        nuslerp_flatten=False,
        nuslerp_row_wise=True,
    )
    assert np.abs(read(merged.path, "a.weight") - expected).max() < 1e-5


def test_a_scalar_is_merged_also_where_only_its_operator_needs_rounds(tmp_path: Path) -> None:
    scalar = bf16(np.array(2.0, np.float32))
    matrix = bf16(np.ones((4, 29), np.float32))
    pool = write_parents(tmp_path, *[{"scale": scalar, "model.norm.weight": matrix} for _ in range(3)])
    rule = {
        "match": {"name": "scale"},
        "merge_method": "slerp",
        "models": {"p1": {}, "p2": {}},
        "parameters": {"t": 0.5},
    }
    recipe = make_recipe({"p1": pool["p1"], "p2": pool["p2"]}, "linear", rules=[rule])
    merged = merge_recipe(recipe, tmp_path / "out", threads=2)
    assert widen(read(merged.path, "scale")) == 2.0


def test_a_random_stream_enters_every_id(pool: dict[str, Path]) -> None:
    recipe = make_recipe(pool, "dare_linear", parameters={"density": 0.5})
    indexes = open_checkpoints(recipe)
    first = recipe.checkpoints
    other = replace(recipe, checkpoints=(*first[:-1], first[-1]._replace(stream=77)))
    budget = Budget(memory_bytes=200 * MB)
    plans = [build_plan(each, indexes, budget) for each in (recipe, other)]
    assert plans[0].run_id != plans[1].run_id
    assert plans[0].candidate_ids != plans[1].candidate_ids


def test_force_does_not_take_a_directory_from_a_live_run(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "linear")
    indexes = open_checkpoints(recipe)
    plan = build_plan(recipe, indexes, Budget(memory_bytes=200 * MB))
    holder = OutputRun(plan, tmp_path / "out", indexes[0])
    holder.begin()
    marker = tmp_path / "out" / WORK_DIR / "receipts" / "mine.json"
    marker.write_text("{}")
    with pytest.raises(OutputError, match="another process"):
        merge_recipe(make_recipe(pool, "ties"), tmp_path / "out", force=True)
    assert marker.exists()
    holder.release()


def test_force_does_not_take_a_folder_that_is_not_ours(pool: dict[str, Path], tmp_path: Path) -> None:
    precious = tmp_path / "out"
    precious.mkdir()
    (precious / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="holds no run of remelt"):
        merge_recipe(make_recipe(pool, "linear"), precious, force=True)
    assert (precious / "model.safetensors").read_text() == "precious"


class StopBeforeCommit(LocalExecutor):
    def run(self, *args: Any) -> None:
        super().run(*args)
        raise KeyboardInterrupt


def test_a_resume_refuses_nonfinite_parents_that_an_earlier_run_allowed(tmp_path: Path) -> None:
    bad = np.ones((8, 8), np.float32)
    bad[0, 0] = np.nan
    good: Tensors = {"a.weight": ("F32", np.ones((8, 8), np.float32))}
    pool = write_parents(tmp_path, good, good, {"a.weight": ("F32", bad)})
    recipe = make_recipe(pool, "task_arithmetic")
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(replace(recipe, allow_nonfinite=True), tmp_path / "out", executor=StopBeforeCommit(threads=1))
    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        merge_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_an_overflow_of_the_result_is_refused(tmp_path: Path) -> None:
    large: Tensors = {"a.weight": ("F32", np.full((8, 8), 60_000, np.float32))}
    pool = write_parents(tmp_path, large, large, large)
    recipe = make_recipe(pool, "linear", out_dtype="float16", parameters={"normalize": False})
    with pytest.raises(NonFiniteError, match=r"finite parents has NaN or Inf in 1 tensors, such as a\.weight"):
        merge_recipe(replace_weights(recipe, 0.7), tmp_path / "out")


def replace_weights(recipe: Recipe, weight: float) -> Recipe:
    return replace(recipe, entries=tuple(entry._replace(parameters=(("weight", weight),)) for entry in recipe.entries))


def test_sets_that_differ_in_more_than_parameters_are_refused(pool: dict[str, Path]) -> None:
    recipe = make_recipe(pool, "linear")
    budget = Budget(memory_bytes=200 * MB)
    drop = make_recipe(pool, "linear", rules=[{"match": {"class": "norm"}, "drop": True}])
    for other in (make_recipe(pool, "linear", out_dtype="float32"), drop):
        with pytest.raises(RecipeError, match="differ in their parameters alone"):
            build_plan([recipe, other], open_checkpoints(recipe), budget)


def test_a_cut_between_two_outputs_of_one_plan_redoes_nothing(
    pool: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [make_recipe(pool, "ties", parameters={"density": density}) for density in (0.3, 0.6)]
    indexes = open_checkpoints(recipes[0])
    worked: list[int] = []

    class Counting(LocalExecutor):
        def run(self, plan: Any, units: Any, *args: Any) -> None:
            worked.append(len(units))
            super().run(plan, units, *args)

    executor = Counting(threads=1, memory_bytes=200 * MB)
    plan = build_plan(recipes, indexes, executor.budget())
    outputs = [tmp_path / "a", tmp_path / "b"]
    publish, calls = OutputRun.publish, []

    def cut(self: OutputRun, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return publish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OutputRun, "publish", cut)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, indexes, outputs, executor)
    merged = run_plan(plan, indexes, outputs, executor)
    assert sum(worked) == len(plan.units)
    assert all(verify_merge(each.path).problems == () for each in merged)


def test_base_layout_holds_also_where_tensors_are_copied_from_another_model(tmp_path: Path) -> None:
    from checkpoint_files import write_sharded

    tensors: Tensors = {f"model.layers.0.part{n}.weight": bf16(np.full((4, 4), n, np.float32)) for n in range(6)}
    names = list(tensors)
    two = {f"model-{n + 1}.safetensors": {name: tensors[name] for name in names[n::2]} for n in range(2)}
    six = {f"part-{n}.safetensors": {name: tensors[name]} for n, name in enumerate(names)}
    write_sharded(tmp_path / "base", two)
    write_sharded(tmp_path / "p1", six)
    pool = {"base": tmp_path / "base", "p1": tmp_path / "p1"}
    recipe = make_recipe(
        pool, "task_arithmetic", layout="base", rules=[{"match": {"name": "*part[0-3]*"}, "copy": "p1"}]
    )
    plan = build_plan(recipe, open_checkpoints(recipe), Budget(memory_bytes=200 * MB))
    assert len(plan.units) == 2


def test_buffers_of_one_unit_are_gone_when_the_next_is_worked(pool: dict[str, Path], tmp_path: Path) -> None:
    import gc
    import weakref

    from remelt import executor as executor_module
    from remelt.unit_runner import UnitRun, UnitRunner

    alive: list[weakref.ref[UnitRunner]] = []
    most = 0

    class Watched(UnitRun):
        def __init__(self, *args: Any) -> None:
            nonlocal most
            super().__init__(*args)
            assert self._runner is not None
            alive.append(weakref.ref(self._runner))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    original = executor_module.UnitRun
    executor_module.UnitRun = Watched  # type: ignore[misc]
    try:
        merge_recipe(make_recipe(pool, "ties", max_shard_size="60kB"), tmp_path / "out", threads=2)
    finally:
        executor_module.UnitRun = original  # type: ignore[misc]
    assert len(alive) > 2 and most == 1


def test_companions_of_an_unfinished_run_go_when_it_is_replaced(
    pool: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remelt import commit

    own = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in pool.items()}
    (own["base"] / "tokenizer.model").write_text("old")
    write = commit.write_file_durably

    def cut(path: Path, data: bytes) -> None:
        if path.name == MANIFEST_FILE:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_file_durably", cut)
        with pytest.raises(KeyboardInterrupt):
            merge_recipe(make_recipe(own, "ties"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").exists()
    merge_recipe(make_recipe({"p1": own["p1"], "p2": own["p2"]}, "linear"), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_manifest_without_our_keys_is_refused_in_words(pool: dict[str, Path], tmp_path: Path) -> None:
    merged = merge_recipe(make_recipe(pool, "linear"), tmp_path / "out")
    path = merged.path / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({"run_id": manifest["run_id"]}))
    with pytest.raises(OutputError, match="no manifest of ours"):
        merge_recipe(make_recipe(pool, "linear"), tmp_path / "out")
    path.write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(OutputError, match="schema 99"):
        verify_merge(merged.path)


def test_a_forced_merge_that_fails_leaves_the_finished_output_as_it_was(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", 2)
    merged = merge_recipe(make_recipe(pool), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in merged.path.iterdir() if path.is_file()}
    tensors = parent_tensors(1)
    dtype, bits = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = (dtype, np.full_like(bits, 0x7FC0))
    write_file(pool["p1"] / "model.safetensors", tensors)
    with pytest.raises(NonFiniteError):
        merge_recipe(make_recipe(pool), tmp_path / "out", force=True)
    after = {path.name: path.read_bytes() for path in merged.path.iterdir() if path.is_file()}
    assert after == before


class Killed(BaseException):
    """Ends a merge where a SIGKILL would."""


@pytest.mark.parametrize("removals", range(6))
def test_a_replacement_killed_anywhere_in_its_commit_is_resumed_without_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, removals: int
) -> None:
    pool = write_pool(tmp_path / "pool", 2)
    old, new = make_recipe(pool, max_shard_size="20kB"), make_recipe(pool, "task_arithmetic", max_shard_size="20kB")
    whole = merge_recipe(new, tmp_path / "whole")
    merge_recipe(old, tmp_path / "out")
    left = [removals]
    unlink = Path.unlink

    def unlink_or_die(path: Path, missing_ok: bool = False) -> None:
        if path.parent == tmp_path / "out" and path.name.endswith((".safetensors", ".json")):
            if not left[0]:
                raise Killed
            left[0] -= 1
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_or_die)
    with suppress(Killed):
        merge_recipe(new, tmp_path / "out", force=True)
    monkeypatch.undo()
    merged = merge_recipe(new, tmp_path / "out")
    assert merged.digest == whole.digest
    names = {path.name for path in merged.path.iterdir()}
    assert names == {path.name for path in whole.path.iterdir()}
    assert verify_merge(merged.path).problems == ()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Many tensors of one block, and one of three blocks."""
    pool = {}
    for number, name in enumerate(("base", "p1", "p2")):
        rng = np.random.default_rng(number)
        shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (400, 400) for layer in range(24)}
        shapes["model.embed_tokens.weight"] = (1200, 1000)
        tensors = {each: bf16(rng.standard_normal(shape).astype(np.float32)) for each, shape in shapes.items()}
        pool[name] = tmp_path_factory.mktemp("many") / name
        write_file(pool[name] / "model.safetensors", tensors)
    return pool


@pytest.mark.parametrize("threads", [1, 8])
def test_what_is_mapped_at_one_time_stays_within_the_arena(
    many: dict[str, Path], tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(many, "model_stock")
    executor = LocalExecutor(threads=threads, memory_bytes=4000 * MB)
    allowed = plan_sizes(build_plan(recipe, open_checkpoints(recipe), executor.budget())).arena_bytes
    lock, window = threading.Lock(), RangeReader.window
    live = {"now": 0, "most": 0, "calls": 0}

    def forget(size: int) -> None:
        with lock:
            live["now"] -= size

    def counted(self: RangeReader, info: TensorInfo) -> np.ndarray[Any, Any] | None:
        found = window(self, info)
        assert found is not None and found.base is not None
        with lock:
            live["calls"] += 1
            live["now"] += info.nbytes
            live["most"] = max(live["most"], live["now"])
        weakref.finalize(found.base, forget, info.nbytes)
        return found

    monkeypatch.setattr(RangeReader, "window", counted)
    merge_recipe(recipe, tmp_path / "out", executor=executor)
    assert live["calls"] == 25 * 3
    assert 0 < live["most"] <= allowed
    assert live["now"] == 0


def test_what_cannot_be_mapped_is_kept_by_copy_and_gives_the_same_bytes(
    many: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(many, "model_stock")
    mapped = merge_recipe(recipe, tmp_path / "mapped", threads=2)
    window, asked = RangeReader.window, []
    for name in ("nothing", "one parent less"):

        def partly(self: RangeReader, info: TensorInfo, name: str = name) -> np.ndarray[Any, Any] | None:
            asked.append(name)
            return None if name == "nothing" or self.index.root.endswith("p1") else window(self, info)

        with monkeypatch.context() as patch:
            patch.setattr(RangeReader, "window", partly)
            assert merge_recipe(recipe, tmp_path / name, threads=2).digest == mapped.digest
    assert set(asked) == {"nothing", "one parent less"}
