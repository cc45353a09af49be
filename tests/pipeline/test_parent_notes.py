"""Equal shapes that mean different things are named in the plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from merge_fixtures import make_recipe
from remelt.merge import open_checkpoints
from remelt.planner import build_plan
from remelt_evals import zoo


def changed(folder: Path, name: str, **changes: Any) -> Path:
    """A copy of a specialist with another value in one of its JSON files."""
    shutil.copytree(zoo.parents()["strings"], folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    return folder


def notes_of(parent: Path) -> list[str]:
    recipe = make_recipe({"base": zoo.base(), "p1": zoo.parents()["prose"], "p2": parent}, "task_arithmetic")
    return [note for note in build_plan(recipe, open_checkpoints(recipe)).notes if str(parent) in note]


def test_parents_that_agree_are_not_spoken_of() -> None:
    assert notes_of(zoo.parents()["strings"]) == []


def test_tokens_with_other_ids_are_counted_and_one_is_named(tmp_path: Path) -> None:
    tokenizer = json.loads((zoo.base() / "tokenizer.json").read_text())
    model = tokenizer["model"]
    vocabulary = dict(model["vocab"])
    vocabulary["a"], vocabulary["z"] = vocabulary["z"], vocabulary["a"]
    parent = changed(tmp_path / "p", "tokenizer.json", model=model | {"vocab": vocabulary})
    (note,) = notes_of(parent)
    assert "gives 2 tokens other ids" in note
    assert f"'a' ({vocabulary['a']} there, {vocabulary['z']} here)" in note


def test_a_token_more_is_no_disagreement(tmp_path: Path) -> None:
    tokenizer = json.loads((zoo.base() / "tokenizer.json").read_text())
    added = [*tokenizer["added_tokens"], {"id": 5000, "content": "<chat>"}]
    assert notes_of(changed(tmp_path / "p", "tokenizer.json", added_tokens=added)) == []


@pytest.mark.parametrize(("key", "value", "is_told"), [("rms_norm_eps", 1e-5, True), ("use_cache", False, False)])
def test_keys_of_the_config_that_change_what_weights_mean_are_named(
    tmp_path: Path, key: str, value: object, is_told: bool
) -> None:
    told = notes_of(changed(tmp_path / "p", "config.json", **{key: value}))
    assert [f"{key} (" in note for note in told] == ([True] if is_told else [])


def test_an_architecture_of_another_name_is_named(tmp_path: Path) -> None:
    (note,) = notes_of(changed(tmp_path / "p", "config.json", architectures=["MistralForCausalLM"]))
    assert 'architectures (["MistralForCausalLM"] there, ["LlamaForCausalLM"] here)' in note


def test_a_parent_without_a_config_is_named(tmp_path: Path) -> None:
    parent = tmp_path / "p"
    shutil.copytree(zoo.parents()["strings"], parent)
    (parent / "config.json").unlink()
    (note,) = notes_of(parent)
    assert "has no config.json" in note
