"""Parts of fused parameters lie where transformers' own conversion would put them; what cannot be placed is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from remelt.recipe_yaml import parse_recipe
from remelt_evals import zoo
from remelt_evals.backends import BackendOptions
from remelt_evals.hf_backend import load_model
from remelt_evals.resident import ResidentCandidates
from remelt_evals.resident_places import StoredShape, _Part, _views_of_parts, find_places

GATE, UP, DOWN = "experts.*.gate.weight", "experts.*.up.weight", "experts.*.down.weight"


def stored_parts(sources: dict[str, list[torch.Tensor]]) -> list[_Part]:
    return [
        _Part(pattern, StoredShape(f"{pattern}-{number}", tuple(tensor.shape)))
        for pattern, tensors in sources.items()
        for number, tensor in enumerate(tensors)
    ]


@pytest.mark.parametrize(
    ("operations", "shapes"),
    [
        ([MergeModulelist(dim=0)], {DOWN: [(3, 5)] * 4}),
        ([MergeModulelist(dim=0), Concatenate(dim=1)], {GATE: [(3, 5)] * 4, UP: [(3, 5)] * 4}),
        ([MergeModulelist(dim=0), Concatenate(dim=1)], {UP: [(2, 5)] * 3, GATE: [(4, 5)] * 3}),
        ([MergeModulelist(dim=0), Concatenate(dim=-1)], {GATE: [(3, 5)] * 2, UP: [(3, 2)] * 2}),
        ([Concatenate(dim=0)], {GATE: [(3, 5)], UP: [(2, 5)]}),
    ],
)
def test_views_are_where_the_conversion_puts_the_parts(
    operations: list[ConversionOps], shapes: dict[str, list[tuple[int, ...]]]
) -> None:
    converter = WeightConverter(list(shapes), "fused.weight", operations)
    sources = {pattern: [torch.randn(shape) for shape in found] for pattern, found in shapes.items()}
    expected: Any = {pattern: list(tensors) for pattern, tensors in sources.items()}
    for operation in operations:
        expected = operation.convert(
            expected, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
        )
    (fused,) = expected.values()
    target = torch.zeros_like(fused)
    views = _views_of_parts(target, converter, stored_parts(sources))
    assert not isinstance(views, str), views
    for pattern, tensors in sources.items():
        for number, tensor in enumerate(tensors):
            views[f"{pattern}-{number}"].copy_(tensor)
    assert torch.equal(target, fused)


@pytest.mark.parametrize(
    ("converter", "reason"),
    [
        (WeightConverter(GATE, "fused.weight", [MergeModulelist(0), Transpose(1, 2)]), "MergeModulelist, Transpose"),
        (WeightConverter("qkv", ["q", "k", "v"], [Chunk(0)]), "also make other parameters"),
        (WeightConverter([GATE, UP], "fused.weight", [MergeModulelist(0), Concatenate(1)]), "missing"),
        (WeightConverter(GATE, "fused.weight", [MergeModulelist(0)]), "of which there are 3"),
        (WeightConverter(GATE, "fused.weight", [MergeModulelist(0), Concatenate(1)]), "which are 3 long"),
    ],
)
def test_what_cannot_be_written_in_place_is_said(converter: WeightConverter, reason: str) -> None:
    pattern = converter.source_patterns[0]
    parts = [_Part(pattern, StoredShape(f"{number}", (3, 5))) for number in range(3)]
    found = _views_of_parts(torch.zeros(4, 6, 5), converter, parts)
    assert isinstance(found, str) and reason in found


def shapes_of(folder: Path) -> list[StoredShape]:
    return [StoredShape(name, tuple(t.shape)) for name, t in load_file(folder / "model.safetensors").items()]


@pytest.mark.parametrize("folder", [zoo.base(), zoo.experts_base()], ids=["dense", "experts"])
def test_every_parameter_of_the_zoo_is_filled_by_what_is_stored(folder: Path) -> None:
    model, _ = load_model(str(folder), BackendOptions())
    stored = load_file(folder / "model.safetensors")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find_places(model, shapes_of(folder))
    assert found.problem is None
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
        for name, view in found.views.items():
            assert view is not None
            view.copy_(stored[name])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_is_not_filled_whole_has_no_places() -> None:
    model, _ = load_model(str(zoo.base()), BackendOptions())
    shapes = shapes_of(zoo.base())
    for changed, reason in (
        (shapes[1:], "would be left as they are"),
        ([*shapes, StoredShape("lm_head.weight", (100, 64))], "would not be filled exactly once"),
        ([*shapes, StoredShape("model.layers.9.mlp.up_proj.weight", (1, 1))], "has no place in the model"),
        ([shapes[0]._replace(shape=(1, 1)), *shapes[1:]], "1x1, its place in the model"),
    ):
        found = find_places(model, changed)
        assert not found.views
        assert found.problem is not None and reason in found.problem


def test_an_older_checkpoints_rope_buffer_is_passed_over_as_in_a_load() -> None:
    model, _ = load_model(str(zoo.base()), BackendOptions())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    found = find_places(model, [*shapes_of(zoo.base()), StoredShape(name, (8,))])
    assert found.problem is None and found.views[name] is None


def test_candidates_that_store_a_tied_head_of_their_own_go_by_disk(tmp_path: Path) -> None:
    own = []
    for name, path in list(zoo.parents().items())[:2]:
        own.append(Path(shutil.copytree(path, tmp_path / name)))
        tensors = load_file(own[-1] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, own[-1] / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in own]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    with ResidentCandidates(BackendOptions(), memory_bytes=300_000_000, scratch=tmp_path) as residents:
        for _ in range(2):
            assert "filled exactly once" in str(residents.merge([recipe]))
        # What cannot be is found once.
        assert residents.num_built == 1
