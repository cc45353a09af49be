"""Resident candidates are, bit for bit, what a merge to disk and a load give; half of one is never scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remelt.errors import CheckpointError, EvaluationError, NonFiniteError
from remelt.merge import merge_recipe
from remelt.recipe import Recipe
from remelt.recipe_yaml import parse_recipe
from remelt_evals import resident, zoo
from remelt_evals.backends import BackendOptions
from remelt_evals.hf_backend import load_model
from remelt_evals.resident import ResidentCandidate, ResidentCandidates

MB = 1_000_000
TEXT = "def f(x):\n    return x + 1  # 12*3=36\n"


def dense_recipe(weights: tuple[float, ...] = (0.3, 0.4), method: str = "task_arithmetic", **changes: Any) -> Recipe:
    parents = list(zoo.parents().items())[: len(weights)]
    return make_recipe(zoo.base(), parents, weights, method, **changes)


def experts_recipe(weights: tuple[float, ...] = (0.3, 0.4), method: str = "ties", **changes: Any) -> Recipe:
    return make_recipe(zoo.experts_base(), list(zoo.experts_parents().items()), weights, method, **changes)


def make_recipe(
    base: Path, parents: list[tuple[str, Path]], weights: tuple[float, ...], method: str, **changes: Any
) -> Recipe:
    models = [
        {"model": str(path), "name": name, "parameters": {"weight": weight}}
        for (name, path), weight in zip(parents, weights, strict=True)
    ]
    document = {"merge_method": method, "models": models, "base_model": str(base), **changes}
    if method == "linear":
        del document["base_model"]
    return parse_recipe(document)


def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.fixture
def residents(tmp_path: Path) -> Iterator[ResidentCandidates]:
    with ResidentCandidates(BackendOptions(), memory_bytes=300 * MB, threads=2, scratch=tmp_path) as candidates:
        yield candidates


def merge_one(residents: ResidentCandidates, recipe: Recipe) -> ResidentCandidate:
    merged = residents.merge([recipe])
    assert not isinstance(merged, str), merged
    return merged[0]


def assert_same_as_disk(
    candidate: ResidentCandidate, recipe: Recipe, folder: Path, options: BackendOptions | None = None
) -> None:
    merged = merge_recipe(recipe, folder)
    model, tokenizer = load_model(str(merged.path), options or BackendOptions())
    assert candidate.digest == merged.digest
    assert candidate.candidate_id == merged.candidate_id
    assert model.dtype == candidate.model.dtype
    expected, found = model.state_dict(), candidate.model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(logits_of(model, tokenizer), logits_of(candidate.model, candidate.tokenizer))


def test_a_tied_head_is_written_once_and_logits_are_those_of_a_load(
    residents: ResidentCandidates, tmp_path: Path
) -> None:
    for number, weights in enumerate([(0.3, 0.4, 0.1, 0.5), (0.9, 0.0, 0.2, 0.1), (0.3, 0.4, 0.1, 0.5)]):
        recipe = dense_recipe(weights)
        candidate = merge_one(residents, recipe)
        assert candidate.model.lm_head.weight is candidate.model.model.embed_tokens.weight
        assert_same_as_disk(candidate, recipe, tmp_path / str(number))
    assert residents.num_built == 1


@pytest.mark.parametrize("method", ["linear", "dare_ties", "della", "model_stock", "slerp"])
def test_every_kind_of_operator_gives_the_bits_of_a_merge_to_disk(
    method: str, residents: ResidentCandidates, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"seed": 3}
    if method in ("dare_ties", "della"):
        changes["parameters"] = {"density": 0.5}
    if method in ("model_stock", "slerp"):
        models = [{"model": str(path)} for path in zoo.parents().values()]
        own = {"models": models, "base_model": str(zoo.base())}
        if method == "slerp":
            own = {"models": models[:2], "parameters": {"t": 0.3}}
        recipe = parse_recipe({"merge_method": method, **own})
    else:
        recipe = dense_recipe((0.3, 0.4), method, **changes)
    assert_same_as_disk(merge_one(residents, recipe), recipe, tmp_path / "disk")
    # Parents are known by now: the second time nothing of them is checked again, and the bits are the same.
    assert_same_as_disk(merge_one(residents, recipe), recipe, tmp_path / "disk")


def test_global_thresholds_are_surveyed_in_memory(residents: ResidentCandidates, tmp_path: Path) -> None:
    recipe = dense_recipe((0.3, 0.4), "ties", parameters={"density": 0.3, "topk": "global"})
    assert_same_as_disk(merge_one(residents, recipe), recipe, tmp_path / "disk")


def test_fused_experts_are_filled_through_the_conversion_mapping(residents: ResidentCandidates, tmp_path: Path) -> None:
    for number, weights in enumerate([(0.3, 0.4), (0.8, 0.1)]):
        recipe = experts_recipe(weights, parameters={"density": 0.5})
        candidate = merge_one(residents, recipe)
        assert any("experts.gate_up_proj" in name for name, _ in candidate.model.named_parameters())
        assert_same_as_disk(candidate, recipe, tmp_path / str(number))
    assert residents.num_built == 1


@pytest.mark.parametrize("make", [dense_recipe, experts_recipe])
def test_an_output_dtype_that_the_model_does_not_compute_in_is_converted_as_a_load_does(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    options = BackendOptions(dtype="bfloat16")
    with ResidentCandidates(options, memory_bytes=300 * MB, scratch=tmp_path) as residents:
        recipe = make(out_dtype="float32")
        candidate = merge_one(residents, recipe)
        assert candidate.model.dtype == torch.bfloat16
        assert_same_as_disk(candidate, recipe, tmp_path / "disk", options)


def test_the_recipes_output_dtype_is_what_an_automatic_model_computes_in(
    residents: ResidentCandidates, tmp_path: Path
) -> None:
    recipe = dense_recipe(out_dtype="float32")
    candidate = merge_one(residents, recipe)
    assert candidate.model.dtype == torch.float32
    assert_same_as_disk(candidate, recipe, tmp_path / "disk")
    # Another layout of the output needs another model.
    other = dense_recipe(out_dtype="float16")
    assert_same_as_disk(merge_one(residents, other), other, tmp_path / "other")
    assert residents.num_built == 2


@pytest.mark.parametrize("memory_bytes", [300 * MB, 70 * MB])
def test_any_threads_and_any_memory_give_the_same_bits(
    memory_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "SMALL_BYTES", 0)
    recipe = dense_recipe(method="ties", parameters={"density": 0.5})
    with ResidentCandidates(BackendOptions(), memory_bytes=memory_bytes, threads=2, scratch=tmp_path) as residents:
        candidate = merge_one(residents, recipe)
        assert_same_as_disk(candidate, recipe, tmp_path / "disk")


def test_candidates_merged_together_take_a_model_each_and_one_read(
    residents: ResidentCandidates, tmp_path: Path
) -> None:
    recipes = [dense_recipe((0.1 * number, 0.4)) for number in range(3)]
    merged = residents.merge(recipes)
    assert not isinstance(merged, str)
    assert len({id(candidate.model) for candidate in merged}) == 3
    for number, (recipe, candidate) in enumerate(zip(recipes, merged, strict=True)):
        assert_same_as_disk(candidate, recipe, tmp_path / str(number))
    assert merged[0].read_bytes == merge_one(residents, recipes[0]).read_bytes


def test_a_generation_may_shrink_and_grow(residents: ResidentCandidates, tmp_path: Path) -> None:
    recipes = [dense_recipe((0.1 * number, 0.4)) for number in range(3)]
    for chosen in (recipes[:2], recipes[:1], recipes):
        merged = residents.merge(chosen)
        assert not isinstance(merged, str) and len(merged) == len(chosen)
    assert_same_as_disk(merged[2], recipes[2], tmp_path / "disk")
    assert residents.num_built == 3


def test_buffers_and_rope_are_left_alone(residents: ResidentCandidates) -> None:
    candidate = merge_one(residents, dense_recipe())
    reference, _ = load_model(str(zoo.base()), BackendOptions())
    buffers = dict(reference.named_buffers())
    assert buffers
    for name, buffer in candidate.model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_candidate_with_nan_takes_its_model_with_it(residents: ResidentCandidates, tmp_path: Path) -> None:
    good = dense_recipe(out_dtype="float16")
    merge_one(residents, good)
    # Finite parents, and a coefficient that float16 cannot bear.
    with pytest.raises(NonFiniteError):
        residents.merge([dense_recipe((3e6, 0.4), out_dtype="float16")])
    assert_same_as_disk(merge_one(residents, good), good, tmp_path / "disk")
    assert residents.num_built == 2


def test_a_parent_that_changes_is_refused(tmp_path: Path) -> None:
    import shutil

    own = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in list(zoo.parents().items())[:2]}
    recipe = make_recipe(zoo.base(), list(own.items()), (0.5, 0.5), "task_arithmetic")
    with ResidentCandidates(BackendOptions(), memory_bytes=300 * MB, scratch=tmp_path) as residents:
        merge_one(residents, recipe)
        shutil.copyfile(zoo.base() / "model.safetensors", own["prose"] / "model.safetensors")
        with pytest.raises(CheckpointError, match="changed"):
            residents.merge([recipe])


def test_a_dropped_parameter_does_not_load_and_is_refused(residents: ResidentCandidates) -> None:
    rule = {"match": {"name": "model.layers.1.mlp.up_proj.weight"}, "drop": True}
    with pytest.raises(EvaluationError, match=r"does not load completely.*up_proj"):
        residents.merge([dense_recipe(rules=[rule])])


def test_parents_are_mapped_only_within_the_allowance(tmp_path: Path) -> None:
    from remelt.direct import ParentReaders
    from remelt.merge import open_checkpoints
    from remelt.range_reader import MappedReader

    indexes = open_checkpoints(dense_recipe())
    size = sum(file.size for file in indexes[0].files)
    for allowed, expected in ((0, 0), (size, 1), (2 * size + 1, 2), (10 * size, 3)):
        parents = ParentReaders(indexes, allowed)
        assert sum(isinstance(reader, MappedReader) for reader in parents.readers) == expected
        parents.close()
