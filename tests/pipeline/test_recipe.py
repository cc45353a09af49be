"""Recipes: mergekit's keys with mergekit's meaning, our additions, and refusals."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import RecipeError
from remelt.operators import OPERATORS
from remelt.recipe import Constraints, Recipe, Search
from remelt.recipe_yaml import load_recipe, parse_recipe
from remelt.resolve import resolve
from remelt.starting_points import single, uniform
from remelt.strict_config import parse_yaml

RECIPES = Path(__file__).parents[1] / "fixtures" / "recipes"


def parse(text: str, **keywords: Any) -> Recipe:
    return parse_recipe(parse_yaml(text, where="r.yaml"), where="r.yaml", **keywords)


SEARCHED = """
merge_method: task_arithmetic
base_model: o/base
models:
  - {model: o/math@v2, parameters: {weight: {search: [0, 1], init: 0.25, as: w_math}}}
  - {model: o/code, name: coder, stream: 7, parameters: {weight: {search: [0, 1], as: w_code}}}
parameters:
  lambda: [0.5, {search: [0.2, 0.9]}, {search: [0, 2], as: depth}]
rules:
  - {match: {class: router}, merge_method: linear, models: {coder: {weight: {search: [0.5, 1]}}}}
  - {match: {layers: [0, 1]}, merge_method: ties, parameters: {weight: 1, density: [{filter: mlp, value: 0.5}]}}
  - {match: {name: "*.mtp.*"}, drop: true}
  - {match: {class: [embedding, head], layers: [3, 60], name: "model.*"}, copy: o/base}
constraints: {simplex: [w_math, w_code]}
seed: 3
max_shard_size: 40GB
layout: base
"""


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("ties_base_listed_again", ["has no task vector"]),
        ("dare_ties_int8_mask", ["chat_template", "int8_mask", "rescale: l1"]),
        ("slerp_slices_filters", []),
        ("della_tokenizer_base", ["has no task vector"]),
        ("linear_ignored_density", ["density (models.step-1000, models.step-2000) has no effect on linear"]),
    ],
)
def test_published_forms_load_with_a_note_for_what_has_no_effect(name: str, notes: list[str]) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert len(recipe.notes) == len(notes)
    for note, part in zip(recipe.notes, notes, strict=True):
        assert part in note


def test_slices_over_all_layers_keep_the_layers_to_check() -> None:
    recipe = load_recipe(RECIPES / "slerp_slices_filters.yaml")
    assert recipe.expected_layers == 32
    assert [checkpoint.source for checkpoint in recipe.checkpoints] == ["acme/solver-7b", "acme/writer-7b"]
    assert recipe.layout == recipe.base == 0


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_written_back_loads_to_the_same_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse(recipe.to_yaml()) == recipe
    assert json.loads(json.dumps(recipe.canonical())) == recipe.canonical()
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    hash(recipe)


def test_a_recipe_with_ranges_and_one_bound_are_written_back_too() -> None:
    recipe = parse(SEARCHED)
    assert parse(recipe.to_yaml()) == recipe
    bound = recipe.bind(uniform(recipe))
    assert parse(bound.to_yaml()) == bound
    assert parse_recipe(json.loads(json.dumps(bound.canonical()))) == bound


def test_variables_are_named_by_as_or_by_their_place() -> None:
    recipe = parse(SEARCHED)
    found = {variable.name: variable[1:] for variable in recipe.variables}
    assert found == {
        "w_math": (0.0, 1.0, 0.25, ("models.math.weight",)),
        "w_code": (0.0, 1.0, 0.75, ("models.coder.weight",)),  # what w_math leaves of 1
        "parameters.lambda.1": (0.2, 0.9, pytest.approx(0.55), ("parameters.lambda.1",)),
        "depth": (0.0, 2.0, 1.0, ("parameters.lambda.2",)),
        "rules.0.models.coder.weight": (0.5, 1.0, 0.75, ("rules.0.models.coder.weight",)),
    }
    assert recipe.constraints == Constraints((("w_math", "w_code"),))
    assert [checkpoint.stream for checkpoint in recipe.checkpoints] == [-1, 0, 7]
    assert (recipe.max_shard_bytes, recipe.shard_layout, recipe.seed) == (40_000_000_000, "base", 3)


def test_the_same_as_is_one_variable() -> None:
    text = """
merge_method: ties
base_model: b
models: [{model: x, parameters: {weight: {search: [0, 1], as: w}}}, {model: y, parameters: {weight: 1}}]
parameters: {density: {search: [0.1, 1]}, lambda: {filter: mlp, value: {search: [0, 1], init: 0.3, as: w}}}
"""
    recipe = parse(text)
    assert [variable.name for variable in recipe.variables] == ["w", "parameters.density"]
    assert recipe.variables[0].occurs == ("models.x.weight", "parameters.lambda.mlp")
    assert recipe.variables[0].init == 0.3
    bound = recipe.bind({"w": 0.5, "parameters.density": 0.2})
    assert bound.is_bound and not recipe.is_bound and not bound.variables
    [treatment] = resolve(bound, ["model.layers.0.mlp.up_proj.weight"])
    assert treatment.coefficients == (0.5, 1.0)  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="'w' stands elsewhere with another range"):
        parse(text.replace("init: 0.3", "init: 0.3").replace("value: {search: [0, 1]", "value: {search: [0, 2]"))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"w": 0.5, "d": 0.5, "q": 1}, "no variable 'q'.*has: d, w"),
        ({"w": 0.5}, "'d' has no value"),
        ({"w": 1.5, "d": 0.5}, r"'w' is 1\.5, outside \[0, 1\]"),
        ({"w": float("nan"), "d": 0.5}, "'w' is nan"),
    ],
)
def test_bind_refuses_unknown_missing_and_out_of_range_values(values: dict[str, float], problem: str) -> None:
    recipe = parse(
        "{merge_method: ties, base_model: b, models: [{model: x}],"
        " parameters: {weight: {search: [0, 1], as: w}, density: {search: [0.1, 1], as: d}}}"
    )
    with pytest.raises(RecipeError, match=problem):
        recipe.bind(values)


def test_bind_holds_a_simplex() -> None:
    recipe = parse(SEARCHED)
    values = uniform(recipe)
    assert values["w_math"] == values["w_code"] == 0.5
    with pytest.raises(RecipeError, match=r"sums to 0\.8"):
        recipe.bind(values | {"w_code": 0.3})


MODELS = "models: [{model: x, parameters: {weight: 1}}, {model: y, parameters: {weight: 1}}]"
TIES = f"merge_method: ties\nbase_model: b\n{MODELS}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TIES + "sead: 1", r"^r\.yaml: unknown key 'sead'; did you mean 'seed'"),
        ("merge_method: tie\n" + MODELS, r"merge_method: unknown operator 'tie'; did you mean 'ties'"),
        (MODELS, "key 'merge_method' is missing"),
        ("merge_method: linear", "no models"),
        ("merge_method: linear\nmodels: {model: x}", "models: expected a list"),
        ("merge_method: linear\nmodels: [x]", r"models\[0\]: expected a mapping"),
        ("merge_method: linear\nmodels: [{model: x, weight: 1}]", r"models\[0\]: unknown key 'weight'"),
        ("merge_method: linear\nmodels: [{model: x}]", r"models\.x: linear needs a weight"),
        ("merge_method: ties\n" + MODELS, "ties needs a `base_model`"),
        ("merge_method: model_stock\nbase_model: b\nmodels: [{model: x}]", "at least 2 models, found 1"),
        ("merge_method: slerp\nbase_model: b\n" + MODELS, "at most 2 models, found 3"),
        (TIES + "parameters: {densty: 1}", r"parameters: unknown parameter 'densty'; did you mean 'density'"),
        (TIES + "parameters: {density: 0}", r"parameters\.density: density takes a number in \(0, 1\], found .* 0"),
        (TIES + "parameters: {density: [0.5, 1.5]}", r"parameters\.density\.1: .*\(0, 1\], found the number 1\.5"),
        (TIES + "parameters: {density: {search: [0, 1]}}", r"density takes a number in \(0, 1\]"),
        (TIES + "parameters: {density: .nan}", r"parameters\.density: expected a finite number"),
        (TIES + "parameters: {density: '0.5'}", "density takes a number .* found the text '0.5'"),
        (TIES + "parameters: {density: []}", r"parameters\.density: .* empty list"),
        (TIES + "parameters: {density: [{filter: mlp}]}", r"density\[0\]\.value: .* found nothing"),
        (TIES + "parameters: {density: [{filtr: mlp, value: 1}]}", "unknown key 'filtr'; did you mean 'filter'"),
        (TIES + "parameters: {density: {serch: [0, 1]}}", r"or \{search: \[low, high\]\}"),
        (TIES + "parameters: {normalize: maybe}", "normalize takes true or false"),
        (TIES + "parameters: {normalize: {search: [0, 1]}}", "a range stands only where a number may"),
        (TIES + "parameters: {topk: globl}", "topk takes one of tensor, global.*did you mean 'global'"),
        (TIES + "parameters: {t: {search: [0, 1]}}", r"parameters\.t: is searched but has no effect on ties"),
        (TIES + "parameters: {lambda: {search: [1, 0]}}", r"lambda\.search: expected \[low, high\]"),
        (TIES + "parameters: {lambda: {search: [0, 1], init: 2}}", r"lambda\.init: 2 is outside \[0, 1\]"),
        (TIES + "constraints: {simplex: [p, q]}", "simplex: no variable 'p'"),
        (TIES + "tokenizer_source: union", "other tokenizers than the base's come later"),
        (TIES + "tokenizer: {source: base, tokens: {}}", "changing the vocabulary comes later"),
        (TIES + "chat_template: chatml", "setting a chat template comes later"),
        (TIES + "dtype: bfloat61", "dtype: unknown value 'bfloat61'; did you mean 'bfloat16'"),
        (TIES + "max_shard_size: 5G", r"max_shard_size: '5G' is no size"),
        (TIES + "compat: peft", "compat: unknown value 'peft'"),
        (TIES + "seed: -1", r"seed: -1 is outside \[0"),
        (TIES + "modules: {default: {}}", "`modules` are not read"),
        ("merge_method: passthrough\n" + MODELS, "builds no stacks"),
        (TIES.replace("model: y", "model: y+lora"), r"models\[1\]\.model: 'y\+lora' names an adapter"),
        (TIES.replace("model: y", "model: x/"), r"models\[1\]\.model: 'x/' is listed twice"),
        (TIES.replace("model: y", "model: y, stream: 0"), "two models have the stream 0"),
        (TIES.replace("model: y", "model: y, name: x"), "two models have the name 'x'"),
        (TIES + "rules: [{match: {class: routr}, drop: true}]", "unknown tensor class 'routr'; did you mean 'router'"),
        (TIES + "rules: [{match: {class: router}}]", r"rules\[0\]: a rule does one of .* found none"),
        (TIES + "rules: [{match: {class: router}, drop: true, copy: x}]", "found copy, drop"),
        (TIES + "rules: [{match: {class: router}, drop: false}]", "write `drop: true`"),
        (TIES + "rules: [{match: {}, drop: true}]", "a rule needs a `match`"),
        (TIES + "rules: [{match: {layers: [3, 1]}, copy: x}]", r"match\.layers: expected \[first, last\]"),
        (TIES + "rules: [{match: {name: 'x*'}, copy: z}]", r"rules\[0\]\.copy: no model 'z'"),
        (TIES + "rules: [{match: {name: 'x*'}, copy: x, parameters: {t: 1}}]", "go with merge_method, not with copy"),
        (TIES + "rules: [{match: {name: 'x'}, merge_method: linear, models: {x: {}}}]", r"rules\.0\.models\.x: .*wei"),
        (TIES + "slices: []", "`models` and `slices` stand for the same"),
        ("merge_method: della\nbase_model: b\nmodels: [{model: x, parameters: {weight: 1, epsilon: 0.1}}]\n"
         "parameters: {window: 0.2}", "give one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_words(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        parse(text)
    assert str(caught.value).startswith("r.yaml: ")


@pytest.mark.parametrize(
    ("slices", "problem"),
    [
        (
            "[{sources: [{model: x, layer_range: [0, 4]}]}, {sources: [{model: x, layer_range: [2, 8]}]}]",
            "2 slices stack",
        ),
        ("[{sources: [{model: x, layer_range: [1, 4]}]}]", "leaves layers out"),
        ("[{sources: [{model: x, layer_range: [0, 4]}, {model: y, layer_range: [0, 5]}]}]", "layer ranges differ"),
        ("[{sources: []}]", "no sources"),
        ("[{sources: [{model: x, layer_range: [0]}]}]", r"expected \[0, number of layers\]"),
    ],
)
def test_slices_that_stack_layers_are_refused(slices: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        parse(f"merge_method: linear\nparameters: {{weight: 1}}\nslices: {slices}")


def test_parameters_and_base_of_the_slice_hold_before_the_recipes() -> None:
    recipe = parse(
        "{merge_method: slerp, base_model: x, parameters: {t: 0.1},"
        " slices: [{base_model: y, parameters: {t: 0.9}, sources: [{model: x}, {model: y}]}]}"
    )
    assert recipe.checkpoints[0].source == "y"
    assert recipe.parameters == (("t", 0.9),)
    assert recipe.expected_layers is None


def test_names_are_the_shortest_end_of_a_path_that_no_other_has() -> None:
    sources = ["org/math@v1", "org/math@v2", "runs/a/step-10", "runs/b/step-10/", "./solo@main"]
    models = [{"model": source, "parameters": {"weight": 1}} for source in sources]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    assert [checkpoint.name for checkpoint in recipe.checkpoints] == [
        "math@v1",
        "math@v2",
        "a/step-10",
        "b/step-10",
        "solo",
    ]
    assert recipe.layout == 0 and recipe.base is None


def test_a_derived_name_never_takes_a_given_one() -> None:
    models = [{"model": "o/x", "parameters": {"weight": 1}}, {"model": "o/y", "name": "x", "parameters": {"weight": 1}}]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    assert [checkpoint.name for checkpoint in recipe.checkpoints] == ["o/x", "x"]


def test_a_parameter_for_all_models_under_one_of_them_is_noted() -> None:
    recipe = parse(TIES.replace("{weight: 1}", "{weight: 1, normalize: false}"))
    assert any("it is taken from `parameters`" in note for note in recipe.notes)


def test_dtype_all_is_kept_apart_from_the_dtype() -> None:
    recipe = parse(TIES + "dtype: all\nout_dtype: bf16")
    assert (recipe.dtype, recipe.out_dtype, recipe.dtype_all) == (None, "BF16", True)
    assert parse(recipe.to_yaml()) == recipe


def test_single_parents_where_the_variables_can_say_them() -> None:
    linear = parse(
        "{merge_method: linear, models: [{model: x, parameters: {weight: {search: [0, 1], as: a}}},"
        " {model: y, parameters: {weight: {search: [0, 1], as: b}}}]}"
    )
    assert uniform(linear) == {"a": 0.5, "b": 0.5}
    assert [single(linear, place) for place in (0, 1)] == [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]
    slerp = parse("{merge_method: slerp, models: [{model: x}, {model: y}], parameters: {t: {search: [0, 1], as: t}}}")
    assert (uniform(slerp), single(slerp, 0), single(slerp, 1)) == ({"t": 0.5}, {"t": 0.0}, {"t": 1.0})
    vectors = parse(
        "{merge_method: task_arithmetic, base_model: b, parameters: {lambda: {search: [0, 2], as: l}},"
        " models: [{model: x, parameters: {weight: {search: [0, 1], as: a}}},"
        " {model: y, parameters: {weight: {search: [0, 1], as: b}}}]}"
    )
    assert single(vectors, 0) == {"a": 0.0, "b": 0.0, "l": 1.0}
    assert single(vectors, 2) == {"a": 0.0, "b": 1.0, "l": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        SEARCHED,  # rules treat tensors apart
        "{merge_method: linear, models: [{model: x, parameters: {weight: {search: [0, 1]}}}, {model: y, parameters: "
        "{weight: 0.5}}]}",
        "{merge_method: linear, models: [{model: x}, {model: y}], parameters: {weight: {search: [0, 1]}}}",
        "{merge_method: linear, models: [{model: x, parameters: {weight: {search: [0, 0.5]}}}, {model: y, parameters: "
        "{weight: 0}}]}",
        "{merge_method: ties, base_model: b, models: [{model: x, parameters: {weight: {search: [0, 1]}}}]}",
    ],
)
def test_a_parent_that_the_variables_cannot_say_is_none(text: str) -> None:
    recipe = parse(text)
    assert single(recipe, recipe.entries[0].model) is None
    assert recipe.bind(uniform(recipe)).is_bound


_NUMBERS = st.floats(0.01, 1).map(lambda x: round(x, 3))
_LEAVES = st.one_of(
    _NUMBERS,
    st.builds(lambda low, high: {"search": [low, high + 1.0]}, _NUMBERS, _NUMBERS),
)
_VALUES = st.one_of(
    _LEAVES,
    st.lists(_LEAVES, min_size=1, max_size=3),
    st.lists(
        st.builds(
            lambda pattern, value: {"filter": pattern, "value": value},
            st.sampled_from(["mlp", "self_attn", "*"]),
            st.one_of(_LEAVES, st.lists(_LEAVES, min_size=1, max_size=3)),
        ),
        min_size=1,
        max_size=3,
    ),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(_VALUES, min_size=1, max_size=3), _VALUES)
def test_any_nesting_of_values_names_its_variables_and_survives_writing(weights: list[Any], lambda_: Any) -> None:
    models = [{"model": f"m{place}", "parameters": {"weight": weight}} for place, weight in enumerate(weights)]
    parameters = {"lambda": lambda_}
    recipe = parse_recipe({"merge_method": "ties", "base_model": "b", "models": models, "parameters": parameters})
    assert parse(recipe.to_yaml()) == recipe
    uses = [use for variable in recipe.variables for use in variable.occurs]
    assert len(recipe.variables) == len(uses)  # without `as`, each range is a variable of its own
    bound = recipe.bind({variable.name: variable.init for variable in recipe.variables})
    assert bound.is_bound
    assert parse(bound.to_yaml()) == bound
    assert "Search" not in repr(bound)


def test_every_operator_loads_and_binds_with_its_options_searched() -> None:
    for name, operator in OPERATORS.items():
        parameters: dict[str, Any] = {} if operator.weight == "none" else {"weight": {"search": [0.1, 1]}}
        for key, option in operator.options.items():
            if option.kind == "number" and key != "window":
                parameters[key] = {"search": [0.2, 0.3]}
        models = [{"model": "x"}, {"model": "y"}]
        base = {} if operator.base == "none" else {"base_model": "b"}
        recipe = parse_recipe({"merge_method": name, "models": models, "parameters": parameters, **base})
        assert len(recipe.variables) == len(parameters)
        assert all(isinstance(value, Search) for _, value in recipe.parameters)
        assert recipe.bind(uniform(recipe)).is_bound


def test_a_recipe_from_plain_values_needs_neither_yaml_nor_torch() -> None:
    code = (
        "import sys\n"
        "from remelt.recipe_yaml import parse_recipe\nfrom remelt.resolve import resolve\n"
        "r = parse_recipe({'merge_method': 'linear', 'models': [{'model': 'x', 'parameters': {'weight': 1}}]})\n"
        "resolve(r, ['a.weight'])\n"
        "print([m for m in ('yaml', 'torch', 'pydantic', 'numba', 'ray') if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_recipe_in_the_documentation_loads_and_binds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipe = parse(page.split("```yaml\n")[1].split("```")[0])
    assert [variable.name for variable in recipe.variables] == ["w_math", "w_code"]
    assert recipe.bind({"w_math": 0.4, "w_code": 0.6}).is_bound
