"""The plan: complete, refused where parents disagree, sized within the budget, identified by what decides bytes."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_files import bf16, write_file
from merge_fixtures import CONFIG, make_recipe, parent_tensors, write_pool
from remelt.errors import BudgetError, MismatchError, RecipeError
from remelt.formats import open_checkpoint
from remelt.layout import GB, MB, Storable, cut_shards, shard_size
from remelt.merge import open_checkpoints
from remelt.plan import MergePlan
from remelt.planner import Budget, build_plan, plan_summary
from remelt.recipe import Recipe
from remelt.treatment import Apply, Copy

BUDGET = Budget(memory_bytes=256 * MB, threads=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pool(tmp_path_factory.mktemp("pool"))


def plan_of(recipe: Recipe, budget: Budget = BUDGET) -> MergePlan:
    return build_plan(recipe, open_checkpoints(recipe), budget)


def changed_parent(root: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    root.mkdir()
    write_file(root / "model.safetensors", tensors)
    (root / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return root


def test_every_tensor_is_planned_once_and_offsets_leave_no_hole(pool: dict[str, Path]) -> None:
    recipe = make_recipe(pool, "ties", max_shard_size="100kB")
    plan = plan_of(recipe)
    names = [tensor.stored.name for unit in plan.units for tensor in unit.tensors]
    assert sorted(names) == sorted(parent_tensors(0))
    assert len(plan.units) > 2
    for unit in plan.units:
        position = 0
        for tensor in unit.tensors:
            assert tensor.stored.offset == position
            position += tensor.stored.nbytes
        assert position == unit.write_bytes


def test_integer_tensors_are_copied_from_the_base(pool: dict[str, Path]) -> None:
    plan = plan_of(make_recipe(pool, "task_arithmetic"))
    treatments = {tensor.name: tensor.treatments[0] for unit in plan.units for tensor in unit.tensors}
    assert treatments.pop("model.position_offset") == Copy(0)
    assert all(isinstance(treatment, Apply) for treatment in treatments.values())
    assert any("integer" in note for note in plan.notes)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=40),
    limit=st.integers(1, 1000),
)
def test_shards_keep_storage_order_hold_everything_once_and_respect_their_limit(sizes: list[int], limit: int) -> None:
    tensors = [Storable(str(n), "U8", (size,), size, 0) for n, size in enumerate(sizes)]
    shards = cut_shards(tensors, max_shard_bytes=limit, keep_base_files=False)
    assert [place for shard in shards for place in shard] == list(range(len(sizes)))
    for shard in shards:
        assert len(shard) == 1 or sum(sizes[place] for place in shard) <= limit


@pytest.mark.parametrize(
    ("total", "expected"),
    [(900 * MB, 1 * GB), (30 * GB, 512 * MB), (2000 * GB, -(-2000 * GB // 1024)), (10_000 * GB, 4 * GB)],
)
def test_shard_size_depends_on_the_total_alone(total: int, expected: int) -> None:
    assert shard_size(total) == expected


def test_base_layout_keeps_the_bases_files(tmp_path: Path) -> None:
    from checkpoint_files import write_sharded

    tensors = parent_tensors(0)
    names = list(tensors)
    half = len(names) // 2
    shards = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:half]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[half:]},
    }
    write_sharded(tmp_path / "base", shards)
    write_sharded(tmp_path / "p1", shards)
    recipe = make_recipe({"base": tmp_path / "base", "p1": tmp_path / "p1"}, "task_arithmetic", layout="base")
    plan = plan_of(recipe)
    assert [{tensor.name for tensor in unit.tensors} for unit in plan.units] == [
        set(shard) for shard in shards.values()
    ]


def test_ids_depend_on_every_bit_of_a_coefficient_and_on_nothing_of_the_machine(pool: dict[str, Path]) -> None:
    recipe = make_recipe(pool, "ties")
    reference = plan_of(recipe)
    assert plan_of(recipe, Budget(memory_bytes=900 * MB, threads=7)).run_id == reference.run_id
    nudged = make_recipe(pool, "ties")
    entry = nudged.entries[0]
    nudged = replace(
        nudged, entries=(entry._replace(parameters=(("weight", float(np.nextafter(0.4, 1))),)), *nudged.entries[1:])
    )
    assert plan_of(nudged).run_id != reference.run_id
    resharded = plan_of(make_recipe(pool, "ties", max_shard_size="100kB"))
    assert resharded.run_id != reference.run_id
    assert resharded.candidate_ids == reference.candidate_ids


def test_ids_do_not_depend_on_paths(pool: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copies = {name: Path(shutil.copytree(path, tmp_path / f"elsewhere-{name}")) for name, path in pool.items()}
    assert plan_of(make_recipe(copies, "della", seed=3)).run_id == plan_of(make_recipe(pool, "della", seed=3)).run_id
    assert plan_of(make_recipe(copies, "della", seed=4)).run_id != plan_of(make_recipe(pool, "della", seed=3)).run_id


def test_a_plan_survives_pickling_and_its_summary_is_json(pool: dict[str, Path]) -> None:
    plan = plan_of(make_recipe(pool, "della"))
    again = pickle.loads(pickle.dumps(plan))
    assert again.run_id == plan.run_id and again.units == plan.units
    assert json.loads(json.dumps(plan_summary(plan, full=True)))["num_units"] == len(plan.units)


def test_several_coefficient_sets_share_units_and_have_their_own_candidate_ids(pool: dict[str, Path]) -> None:
    recipes = [make_recipe(pool, "ties", parameters={"density": density}) for density in (0.3, 0.6)]
    plan = build_plan(recipes, open_checkpoints(recipes[0]), BUDGET)
    assert plan.settings.num_sets == 2
    assert plan.candidate_ids == tuple(plan_of(recipe).candidate_ids[0] for recipe in recipes)
    assert plan.read_bytes == plan_of(recipes[0]).read_bytes


def test_output_dtype_casts_narrow_floats_and_names_what_stays_float32(tmp_path: Path) -> None:
    tensors = parent_tensors(0)
    tensors["model.router_bias"] = ("F32", np.ones(4, np.float32))
    pool = {name: changed_parent(tmp_path / name, tensors) for name in ("base", "p1")}
    plan = plan_of(make_recipe(pool, "linear", out_dtype="float16"))
    dtypes = {tensor.name: tensor.stored.dtype for unit in plan.units for tensor in unit.tensors}
    assert dtypes["lm_head.weight"] == "F16"
    assert dtypes["model.router_bias"] == "F32"
    assert dtypes["model.position_offset"] == "I64"
    assert any("model.router_bias" in note and "dtype: all" in note for note in plan.notes)


def test_a_tensor_missing_in_a_parent_is_refused_with_the_rule_that_would_settle_it(
    pool: dict[str, Path], tmp_path: Path
) -> None:
    tensors = parent_tensors(1)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    bad = {**pool, "p1": changed_parent(tmp_path / "bad", tensors)}
    with pytest.raises(MismatchError, match=r"lacks 1 tensors .*up_proj.*rule.*copy: base"):
        plan_of(make_recipe(bad, "ties"))
    rule = {"match": {"name": "model.layers.1.mlp.up_proj.weight"}, "copy": "base"}
    plan_of(make_recipe(bad, "ties", rules=[rule]))


def test_many_missing_tensors_are_named_by_one_pattern_where_it_matches_nothing_else(
    pool: dict[str, Path], tmp_path: Path
) -> None:
    tensors = parent_tensors(1)
    absent = [name for name in tensors if name.endswith(".mlp.up_proj.weight")]
    assert len(absent) > 1
    bad = {
        **pool,
        "p1": changed_parent(tmp_path / "bad", {name: each for name, each in tensors.items() if name not in absent}),
    }
    with pytest.raises(MismatchError) as refusal:
        plan_of(make_recipe(bad, "ties"))
    (pattern,) = set(re.findall(r"name: '([^']*)'", str(refusal.value)))
    assert pattern == "model.layers.*.mlp.up_proj.weight"
    plan_of(make_recipe(bad, "ties", rules=[{"match": {"name": pattern}, "copy": "base"}]))


def test_a_tensor_only_in_a_parent_is_refused_unless_a_rule_speaks_of_it(pool: dict[str, Path], tmp_path: Path) -> None:
    tensors = parent_tensors(1) | {"model.extra.weight": bf16(np.ones((2, 2), np.float32))}
    more = {**pool, "p1": changed_parent(tmp_path / "more", tensors)}
    with pytest.raises(MismatchError, match=r"model\.extra\.weight.*drop: true"):
        plan_of(make_recipe(more, "ties"))
    dropped = plan_of(make_recipe(more, "ties", rules=[{"match": {"name": "model.extra.*"}, "drop": True}]))
    assert dropped.dropped == ("model.extra.weight",)
    copied = plan_of(make_recipe(more, "ties", rules=[{"match": {"name": "model.extra.*"}, "copy": "p1"}]))
    assert any(tensor.name == "model.extra.weight" for unit in copied.units for tensor in unit.tensors)


def test_a_vocabulary_mismatch_names_both_sizes_and_the_rule(pool: dict[str, Path], tmp_path: Path) -> None:
    wider = {**pool, "p1": changed_parent(tmp_path / "wider", parent_tensors(1, vocabulary=52))}
    with pytest.raises(
        MismatchError, match=r"vocabulary mismatch.*50 against 52.*class: \[embedding, head\]\}, copy: base"
    ):
        plan_of(make_recipe(wider, "ties"))
    plan_of(make_recipe(wider, "ties", rules=[{"match": {"class": ["embedding", "head"]}, "copy": "base"}]))


def test_a_shape_mismatch_names_both_shapes(pool: dict[str, Path], tmp_path: Path) -> None:
    tensors = parent_tensors(1) | {"model.norm.weight": bf16(np.ones(49, np.float32))}
    with pytest.raises(MismatchError, match=r"shape mismatch: model\.norm\.weight is \[48\] .* and \[49\]"):
        plan_of(make_recipe({**pool, "p1": changed_parent(tmp_path / "bad", tensors)}, "ties"))


def test_a_dtype_mismatch_is_refused_until_the_recipe_says_what_to_write(pool: dict[str, Path], tmp_path: Path) -> None:
    tensors = parent_tensors(1) | {"model.norm.weight": ("F32", np.ones(48, np.float32))}
    mixed = {**pool, "p1": changed_parent(tmp_path / "mixed", tensors)}
    with pytest.raises(MismatchError, match=r"dtype mismatch: model\.norm\.weight is BF16 .* and F32"):
        plan_of(make_recipe(mixed, "ties"))
    plan_of(make_recipe(mixed, "ties", dtype="bfloat16"))
    tensors["model.norm.weight"] = ("I32", np.ones(48, np.int32))
    integers = {**pool, "p1": changed_parent(tmp_path / "integers", tensors)}
    with pytest.raises(MismatchError, match="cannot be mixed"):
        plan_of(make_recipe(integers, "ties", dtype="bfloat16"))


def test_a_tied_head_missing_in_one_parent_is_no_mismatch(pool: dict[str, Path], tmp_path: Path) -> None:
    tensors = parent_tensors(1)
    del tensors["lm_head.weight"]
    tied = changed_parent(tmp_path / "tied", tensors, {**CONFIG, "tie_word_embeddings": True})
    plan = plan_of(make_recipe({**pool, "p1": tied}, "ties"))
    (head,) = (tensor for unit in plan.units for tensor in unit.tensors if tensor.name == "lm_head.weight")
    assert dict(head.sources)[1] == open_checkpoint(str(tied)).tensors["model.embed_tokens.weight"]


def test_a_buffer_computed_at_load_is_copied_from_the_base(pool: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = changed_parent(tmp_path / "old", parent_tensors(0) | {name: ("F32", np.ones(4, np.float32))})
    plan = plan_of(make_recipe({**pool, "base": base}, "ties"))
    (buffer,) = (tensor for unit in plan.units for tensor in unit.tensors if tensor.name == name)
    assert buffer.is_copy


def test_a_budget_too_small_is_refused_with_both_numbers(pool: dict[str, Path]) -> None:
    with pytest.raises(BudgetError, match=r"asked to stay within 19 MiB.*needs \d+ MiB.*--memory \d+MiB"):
        plan_of(make_recipe(pool, "ties"), Budget(memory_bytes=20 * MB, threads=2))


def test_the_projection_is_a_sum_of_its_terms_and_stays_below_what_is_allowed(pool: dict[str, Path]) -> None:
    for method in ("linear", "ties", "della", "model_stock"):
        projection = plan_of(make_recipe(pool, method)).projection
        assert projection.total_bytes == sum(size for _, size in projection.terms) <= projection.allowed_bytes


def test_an_unbound_recipe_is_not_planned(pool: dict[str, Path]) -> None:
    recipe = make_recipe(pool, "ties", parameters={"density": {"search": [0.2, 0.9], "as": "d"}})
    with pytest.raises(RecipeError, match=r"ranges to search \(d\)"):
        plan_of(recipe)
