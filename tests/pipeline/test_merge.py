"""Merging from end to end: same bytes however it runs, resumed after any interruption, published last."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import write_file
from killed_runs import kill_rounds
from merge_fixtures import make_recipe, parent_tensors, write_pool
from remelt.commit import MANIFEST_FILE, WORK_DIR
from remelt.errors import BudgetError, NonFiniteError, NumericsError, OutputError
from remelt.executor import LocalExecutor
from remelt.formats import open_checkpoint
from remelt.layout import MB
from remelt.merge import merge_recipe, open_checkpoints, run_plan
from remelt.plan import MergePlan, UnitReceipt
from remelt.planner import Budget, build_plan
from remelt.range_reader import RangeReader
from remelt.verify import verify_merge

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "model_stock")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pool(tmp_path_factory.mktemp("pool"))


def options_for(method: str) -> dict[str, Any]:
    if method in ("ties", "dare_ties", "della", "breadcrumbs"):
        return {"parameters": {"density": 0.5}, "seed": 11}
    return {}


def file_hashes(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.glob("*.safetensors"))}


def read_all(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    index = open_checkpoint(str(path))
    with RangeReader(index) as reader:
        return {name: reader.read(name) for name in index.tensors}


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_for_any_number_of_threads_and_any_budget(
    method: str, pool: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(pool, method, **options_for(method))
    reference = None
    for number, (threads, memory) in enumerate([(1, 900 * MB), (2, 64 * MB), (4, 200 * MB), (3, 64 * MB)]):
        merged = merge_recipe(recipe, tmp_path / str(number), threads=threads, memory_bytes=memory)
        found = (merged.digest, file_hashes(merged.path))
        reference = reference or found
        assert found == reference


def test_a_copy_rule_moves_bytes_and_a_linear_merge_of_one_returns_it(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "ties", rules=[{"match": {"class": ["mlp"]}, "copy": "p2"}])
    merged = read_all(merge_recipe(recipe, tmp_path / "out").path)
    for name, (_, values) in parent_tensors(2).items():
        if ".mlp." in name:
            np.testing.assert_array_equal(merged[name], values)


def test_linear_matches_a_float64_reference(pool: dict[str, Path], tmp_path: Path) -> None:
    merged = read_all(merge_recipe(make_recipe(pool, "linear"), tmp_path / "out").path)
    parents = [parent_tensors(seed) for seed in (1, 2, 3)]
    for name, (dtype, _) in parents[0].items():
        if dtype != "BF16":
            continue
        values = [(tensors[name][1].astype(np.uint32) << 16).view(np.float32).astype(np.float64) for tensors in parents]
        mean = sum(values) / 3
        got = (merged[name].astype(np.uint32) << 16).view(np.float32)
        bound = np.spacing(np.abs(mean).astype(np.float32)).astype(np.float64) * 2**15 + 1e-6
        assert (np.abs(got - mean) <= bound).all(), name


def test_the_output_opens_with_its_companions_and_verifies(pool: dict[str, Path], tmp_path: Path) -> None:
    merged = merge_recipe(make_recipe(pool, "ties", max_shard_size="100kB"), tmp_path / "out")
    names = {path.name for path in merged.path.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "remelt_recipe.yaml", MANIFEST_FILE} <= names
    assert "model.safetensors.index.json" in names and WORK_DIR not in names
    result = verify_merge(merged.path)
    assert result.problems == () and result.digest == merged.digest


def test_verify_names_the_tensor_whose_bytes_changed(pool: dict[str, Path], tmp_path: Path) -> None:
    merged = merge_recipe(make_recipe(pool, "linear"), tmp_path / "out")
    index = open_checkpoint(str(merged.path))
    piece = index.tensors["model.norm.weight"].pieces[0]
    with (merged.path / "model.safetensors").open("r+b") as file:
        file.seek(piece.offset)
        byte = file.read(1)
        file.seek(piece.offset)
        file.write(bytes([byte[0] ^ 1]))
    problems = verify_merge(merged.path).problems
    assert any("model.norm.weight" in problem for problem in problems)
    assert any("sha256" in problem for problem in problems)


def test_the_manifest_holds_true_digests_of_outputs_and_parents(pool: dict[str, Path], tmp_path: Path) -> None:
    from remelt.fingerprints import checkpoint_digest, tensor_digest

    merged = merge_recipe(make_recipe(pool, "task_arithmetic"), tmp_path / "out")
    manifest = json.loads((merged.path / MANIFEST_FILE).read_text())
    assert manifest["files"][0]["sha256"] == file_hashes(merged.path)["model.safetensors"]
    tensors = parent_tensors(1)
    del tensors["model.position_offset"]  # copied from the base, so not read of the parent
    expected = checkpoint_digest(
        {name: (dtype, values.shape, tensor_digest(dtype, values)) for name, (dtype, values) in tensors.items()}
    )
    assert manifest["parents"][1]["digest_of_tensors_read"] == expected


def test_a_finished_output_is_reused_without_reading_tensors(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "ties")
    first = merge_recipe(recipe, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    again = merge_recipe(recipe, tmp_path / "out")
    assert again.is_reused and again.digest == first.digest
    assert {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_another_recipe_on_an_output_is_refused_unless_forced(pool: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    merge_recipe(make_recipe(pool, "ties", max_shard_size="100kB"), output)
    (output / "notes.txt").write_text("mine")
    other = make_recipe(pool, "linear")
    with pytest.raises(OutputError, match=r"another recipe.*--force"):
        merge_recipe(other, output)
    merged = merge_recipe(other, output, force=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert set(file_hashes(output)) == {"model.safetensors"}
    assert verify_merge(merged.path).problems == ()


def test_a_folder_of_somebody_elses_is_refused_and_left_alone(pool: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="not empty and holds no run"):
        merge_recipe(make_recipe(pool, "linear"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


class StopAfter(LocalExecutor):
    """Stops, as if killed, after so many units."""

    def __init__(self, units: int) -> None:
        super().__init__(threads=2, memory_bytes=200 * MB)
        self.units = units

    def run(self, plan: MergePlan, units: Any, work_dirs: Any, on_bytes: Any, on_receipt: Any) -> None:
        super().run(plan, units[: self.units], work_dirs, on_bytes, on_receipt)
        if self.units < len(units):
            raise KeyboardInterrupt


class CountUnits(LocalExecutor):
    def __init__(self) -> None:
        super().__init__(threads=2, memory_bytes=200 * MB)
        self.worked: list[str] = []

    def run(self, plan: MergePlan, units: Any, work_dirs: Any, on_bytes: Any, on_receipt: Any) -> None:
        self.worked = [unit.file for unit in units]
        super().run(plan, units, work_dirs, on_bytes, on_receipt)


def test_a_resumed_merge_works_only_what_is_missing_and_gives_the_same_bytes(
    pool: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(pool, "della", parameters={"density": 0.6}, max_shard_size="100kB")
    whole = merge_recipe(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out", executor=StopAfter(2))
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    counting = CountUnits()
    merged = merge_recipe(recipe, tmp_path / "out", executor=counting)
    assert len(counting.worked) == len(file_hashes(whole.path)) - 2
    assert file_hashes(merged.path) == file_hashes(whole.path)


@pytest.mark.parametrize("damage", ["truncate", "delete", "header", "receipt"])
def test_a_resume_does_not_trust_a_damaged_shard_or_receipt(damage: str, pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "linear", max_shard_size="100kB")
    whole = merge_recipe(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out", executor=StopAfter(2))
    work = tmp_path / "out" / WORK_DIR
    shard = sorted((work / "shards").glob("*.safetensors"))[0]
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 8)
    elif damage == "delete":
        shard.unlink()
    elif damage == "header":
        data = bytearray(shard.read_bytes())
        data[20] ^= 0xFF
        shard.write_bytes(data)
    else:
        for receipt in (work / "receipts").glob("*.json"):
            receipt.write_text(receipt.read_text()[:50])
    merged = merge_recipe(recipe, tmp_path / "out")
    assert file_hashes(merged.path) == file_hashes(whole.path)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def test_recheck_merges_a_shard_again_whose_bytes_changed(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "linear", max_shard_size="100kB")
    whole = merge_recipe(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out", executor=StopAfter(2))
    flip_last_byte(sorted((tmp_path / "out" / WORK_DIR / "shards").glob("*.safetensors"))[0])
    counting = CountUnits()
    merged = merge_recipe(recipe, tmp_path / "out", executor=counting, recheck=True)
    assert len(counting.worked) == len(file_hashes(whole.path)) - 1
    assert file_hashes(merged.path) == file_hashes(whole.path)


def test_recheck_refuses_a_finished_output_whose_bytes_changed(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "linear")
    merged = merge_recipe(recipe, tmp_path / "out")
    assert merge_recipe(recipe, tmp_path / "out", recheck=True).is_reused
    flip_last_byte(next(merged.path.glob("*.safetensors")))
    assert merge_recipe(recipe, tmp_path / "out").is_reused
    with pytest.raises(OutputError, match=r"its bytes are not those that the manifest lists.*--force"):
        merge_recipe(recipe, tmp_path / "out", recheck=True)


@pytest.mark.parametrize(
    "crash_at", ["shard 1", "config.json", "model.safetensors.index.json", MANIFEST_FILE, "rmtree"]
)
def test_a_commit_cut_off_anywhere_is_resumed(
    crash_at: str, pool: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remelt import commit

    recipe = make_recipe(pool, "linear", max_shard_size="100kB")
    whole = merge_recipe(recipe, tmp_path / "whole")
    write, find, remove = commit.write_file_durably, commit.find_shard, commit.shutil.rmtree
    moved: list[str] = []

    def crash_on_write(path: Path, data: bytes) -> None:
        if path.name == crash_at:
            raise KeyboardInterrupt
        write(path, data)

    def crash_on_move(work_dir: Path, output: Path, record: Any) -> Path | None:
        moved.append(record.file)
        if crash_at == "shard 1" and len(moved) == 2:
            raise KeyboardInterrupt
        return find(work_dir, output, record)

    def crash_on_remove(*args: Any, **kwargs: Any) -> None:
        if crash_at == "rmtree":
            raise KeyboardInterrupt
        remove(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_file_durably", crash_on_write)
        patch.setattr(commit, "find_shard", crash_on_move)
        patch.setattr(commit.shutil, "rmtree", crash_on_remove)
        with pytest.raises(KeyboardInterrupt):
            merge_recipe(recipe, tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST_FILE).exists() == (crash_at == "rmtree")
    counting = CountUnits()
    merged = merge_recipe(recipe, tmp_path / "out", executor=counting)
    assert counting.worked == []
    assert file_hashes(merged.path) == file_hashes(whole.path)
    assert verify_merge(merged.path).problems == ()


def test_an_unfinished_run_with_other_numerics_is_refused_in_words(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "linear", max_shard_size="100kB")
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out", executor=StopAfter(1))
    state = tmp_path / "out" / WORK_DIR / "run.json"
    begun = json.loads(state.read_text())
    state.write_text(json.dumps({**begun, "run_id": "0" * 64, "numerics": "cuda-1"}))
    with pytest.raises(NumericsError, match="cuda-1"):
        merge_recipe(recipe, tmp_path / "out")


def test_nonfinite_parents_are_reported_per_tensor_and_nothing_is_published(
    pool: dict[str, Path], tmp_path: Path
) -> None:
    tensors = parent_tensors(1)
    for name, bits in (("model.norm.weight", 0x7FC0), ("lm_head.weight", 0xFF80)):
        tensors[name][1].reshape(-1)[:2] = bits
    bad = tmp_path / "bad"
    bad.mkdir()
    write_file(bad / "model.safetensors", tensors)
    recipe = make_recipe({**pool, "p1": bad}, "ties", parameters={"density": 0.5})
    with pytest.raises(
        NonFiniteError, match=r"(?s)model\.norm\.weight of .*bad \(2 values\).*allow_nonfinite"
    ) as error:
        merge_recipe(recipe, tmp_path / "out")
    assert "lm_head.weight" in str(error.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    merged = merge_recipe(replace(recipe, allow_nonfinite=True), tmp_path / "allowed")
    manifest = json.loads((merged.path / MANIFEST_FILE).read_text())
    assert manifest["parents"][1]["nonfinite"] == {"lm_head.weight": 2, "model.norm.weight": 2}


def test_a_parent_replaced_during_the_merge_stops_it(pool: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    own = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in pool.items()}

    class Replacing(LocalExecutor):
        def run(self, *args: Any) -> None:
            super().run(*args)
            write_file(own["p1"] / "model.safetensors", parent_tensors(2))

    from remelt.errors import CheckpointError

    with pytest.raises(CheckpointError, match="changed during the run"):
        merge_recipe(make_recipe(own, "linear"), tmp_path / "out", executor=Replacing(threads=1))
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_a_full_disk_is_refused_before_anything_is_written(
    pool: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(BudgetError, match=r"not enough disk.*1,000 free"):
        merge_recipe(make_recipe(pool, "linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_cannot_merge_into_one_output(pool: dict[str, Path], tmp_path: Path) -> None:
    from remelt.commit import OutputRun

    recipe = make_recipe(pool, "linear")
    indexes = open_checkpoints(recipe)
    plan = build_plan(recipe, indexes, Budget(memory_bytes=200 * MB))
    holder = OutputRun(plan, tmp_path / "out", indexes[0])
    holder.begin()
    with pytest.raises(OutputError, match="another process"):
        merge_recipe(recipe, tmp_path / "out", threads=1, memory_bytes=200 * MB)
    holder.release()
    merge_recipe(recipe, tmp_path / "out", threads=1, memory_bytes=200 * MB)


def test_several_coefficient_sets_give_the_bytes_of_their_single_merges(pool: dict[str, Path], tmp_path: Path) -> None:
    recipes = [make_recipe(pool, "della", parameters={"density": density}, seed=5) for density in (0.4, 0.7, 1.0)]
    indexes = open_checkpoints(recipes[0])
    executor = LocalExecutor(threads=2, memory_bytes=200 * MB)
    plan = build_plan(recipes, indexes, executor.budget())
    outputs = [tmp_path / f"set{number}" for number in range(3)]
    merged = run_plan(plan, indexes, outputs, executor)
    for recipe, together in zip(recipes, merged, strict=True):
        alone = merge_recipe(recipe, tmp_path / f"alone{together.path.name}", executor=executor)
        assert together.digest == alone.digest
        assert together.candidate_id == alone.candidate_id


def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(pool: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(pool, "della", parameters={"density": 0.5}, max_shard_size="60kB")
    whole = merge_recipe(recipe, tmp_path / "whole")
    (tmp_path / "work").mkdir()
    output = tmp_path / "work" / "out"
    path = tmp_path / "work" / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    killed = kill_rounds(
        "from pathlib import Path; from remelt.recipe_yaml import load_recipe; from remelt.merge import merge_recipe;"
        "import remelt.kernels, numpy",
        "merge_recipe(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), threads=2, memory_bytes=200_000_000)",
        [path, output],
        rounds=4,
        longest=0.5,
        rng=np.random.default_rng(0),
    )
    assert killed, "no process was killed while it ran"
    merged = merge_recipe(recipe, output)
    assert file_hashes(merged.path) == file_hashes(whole.path)
    assert verify_merge(merged.path).problems == ()


def test_receipts_survive_their_json_form() -> None:
    from remelt.plan import OutputRecord, TensorRecord

    record = TensorRecord("a", "BF16", (2, 3), "ff", 0)
    receipt = UnitReceipt("id", (OutputRecord("f", 12, "aa", (record,)),), ((0, record),), 1, 2, 0.5, 3, "cpu-1")
    assert UnitReceipt.from_json(receipt.to_json()) == receipt
