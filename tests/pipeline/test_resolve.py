"""From a bound recipe to the treatment of each tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import RecipeError
from remelt.operators import OPERATORS
from remelt.recipe import Gradient
from remelt.recipe_yaml import load_recipe, parse_recipe
from remelt.resolve import find_unused, resolve, scalar_at
from remelt.treatment import Apply, Copy, Drop, Treatment

RECIPES = Path(__file__).parents[1] / "fixtures" / "recipes"
EMBEDDING = "model.embed_tokens.weight"


def q_proj(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def up_proj(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def llama_names(layers: int) -> list[str]:
    inner = [name for layer in range(layers) for name in (q_proj(layer), up_proj(layer))]
    return [EMBEDDING, *inner, "model.norm.weight", "lm_head.weight"]


def treat(recipe: Any, layers: int = 32, **keywords: Any) -> dict[str, Any]:
    names = llama_names(layers)
    return dict(zip(names, resolve(recipe, names, **keywords), strict=True))


def options_of(treatment: Treatment) -> dict[str, Any]:
    assert isinstance(treatment, Apply)
    return dict(treatment.options)


def parse(**keys: Any) -> Any:
    two: list[Mapping[str, Any]] = [{"model": "o/a"}, {"model": "o/b"}]
    document: dict[str, Any] = {"merge_method": "ties", "base_model": "o/base", "models": two}
    document["parameters"] = {"weight": 1}
    return parse_recipe(document | keys)


def test_ties_fixture_drops_the_base_and_reads_gradients_over_layers() -> None:
    found = treat(load_recipe(RECIPES / "ties_base_listed_again.yaml"), layers=31)
    first, last = found[q_proj(0)], found[q_proj(30)]
    assert (first.operator, first.base, first.models) == ("ties", 0, (1, 2, 3))
    assert first.coefficients == (1.0, 0.0, 0.0)
    assert last.coefficients == (1.0, 1.0, 0.0)
    assert found[up_proj(10)].coefficients == pytest.approx((1.0, 0.3, 0.5))
    assert options_of(found[q_proj(15)])["density"] == pytest.approx((0.7, 0.5, 0.33))
    assert options_of(last)["density"] == (0.1, 0.5, 0.33)
    assert options_of(last)["normalize"] is True
    # Outside the layers a gradient is read at its beginning.
    for name in (EMBEDDING, "model.norm.weight", "lm_head.weight"):
        assert found[name] == first


def test_dare_fixture_rescales_by_keep_probability_and_by_l1_for_mergekit() -> None:
    path = RECIPES / "dare_ties_int8_mask.yaml"
    ours = options_of(treat(load_recipe(path))[EMBEDDING])
    theirs = options_of(treat(load_recipe(path, compat="mergekit"))[EMBEDDING])
    assert (ours["rescale"], ours["density"], ours["normalize"]) == ("keep", (0.53, 0.53), False)
    assert theirs == ours | {"rescale": "l1", "norm_floor": 1e-7}


def test_slerp_fixture_goes_from_the_base_to_the_other_model() -> None:
    found = treat(load_recipe(RECIPES / "slerp_slices_filters.yaml"), layers=32)
    assert found[EMBEDDING] == Apply("slerp", None, (0, 1), (1.0, 1.0), (("t", 0.5),))
    assert options_of(found[q_proj(0)])["t"] == 0.0
    assert options_of(found[q_proj(31)])["t"] == 1.0
    assert options_of(found[up_proj(0)])["t"] == 1.0
    place = 8 / 31 * 4  # layer 8 of 32 over four stretches: just past the second anchor
    assert options_of(found[q_proj(8)])["t"] == pytest.approx(0.5 + (place - 1) * (0.3 - 0.5))


def test_della_fixture_takes_epsilon_of_the_entry_before_the_one_for_all() -> None:
    recipe = load_recipe(RECIPES / "della_tokenizer_base.yaml")
    options = options_of(treat(recipe)[EMBEDDING])
    assert (options["epsilon"], options["density"], options["lambda"]) == ((0.1, 0.15), (0.6, 0.4), 1.1)
    assert options["rescale"] == "keep"
    assert (recipe.dtype, recipe.out_dtype, recipe.tokenizer_source) == ("F32", "BF16", "base")


def test_linear_fixture_merges_every_model_without_a_base() -> None:
    found = treat(load_recipe(RECIPES / "linear_ignored_density.yaml"))
    assert set(found.values()) == {Apply("linear", None, (0, 1, 2), (1.0, 0.3, 0.5), (("normalize", True),))}


def test_linear_counts_a_listed_base_and_task_vectors_do_not() -> None:
    models = [{"model": "o/a"}, {"model": "o/base"}]
    assert treat(parse(merge_method="linear", models=models))[EMBEDDING].models == (1, 0)
    assert treat(parse(merge_method="task_arithmetic", models=models))[EMBEDDING].models == (1,)


def test_slerp_adds_a_base_that_is_not_listed() -> None:
    recipe = parse(merge_method="slerp", models=[{"model": "o/a"}], parameters={"t": 0.25})
    assert treat(recipe)[EMBEDDING].models == (0, 1)


def test_rescale_true_and_false_are_read_as_mergekit_writes_them() -> None:
    def form(method: str, value: object, **keys: object) -> object:
        recipe = parse(merge_method=method, parameters={"weight": 1, "rescale": value}, **keys)
        return options_of(treat(recipe)[EMBEDDING])["rescale"]

    assert [form("dare_ties", value) for value in (True, False, "l1")] == ["keep", "none", "l1"]
    assert form("dare_ties", True, compat="mergekit") == "l1"
    assert form("dare_ties", "keep", compat="mergekit") == "keep"
    assert [form("ties", value) for value in (True, False)] == ["l1", "none"]


def test_compat_sets_rescale_and_floors_and_nothing_else() -> None:
    for name, operator in OPERATORS.items():
        keys: dict[str, Any] = {"merge_method": name, "parameters": {"weight": 1} if operator.weight != "none" else {}}
        if name == "slerp":
            keys["models"] = [{"model": "o/base"}, {"model": "o/b"}]
        ours, theirs = (options_of(treat(parse(**keys, compat=each))[EMBEDDING]) for each in ("remelt", "mergekit"))
        assert {key for key in ours if ours[key] != theirs[key]} <= {"rescale", "norm_floor"}


def test_rules_beat_filters_beat_parameters_and_the_first_match_wins() -> None:
    recipe = parse(
        models=[
            {"model": "o/a", "parameters": {"weight": 1}},
            {"model": "o/b", "parameters": {"weight": 2, "density": [{"filter": "mlp", "value": 0.2}]}},
        ],
        parameters={"density": 0.9},
        rules=[
            {"match": {"name": "lm_head*"}, "drop": True},
            {"match": {"class": "head"}, "copy": "a"},
            {"match": {"class": ["embedding", "norm"]}, "copy": "o/base"},
            {
                "match": {"class": "mlp", "layers": [1, 2]},
                "merge_method": "linear",
                "models": {"a": {"weight": 3}, "o/base": {"weight": 1}},
                "parameters": {"normalize": False},
            },
            {"match": {"layers": [3, 3]}, "merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}},
        ],
    )
    found = treat(recipe, layers=5)
    assert found["lm_head.weight"] == Drop(0)
    assert found[EMBEDDING] == found["model.norm.weight"] == Copy(0)
    assert found[up_proj(1)] == Apply("linear", None, (1, 0), (3.0, 1.0), (("normalize", False),))
    assert found[q_proj(3)] == Apply("task_arithmetic", 0, (1, 2), (1.0, 2.0), (("lambda", 0.5), ("normalize", False)))
    assert options_of(found[up_proj(0)])["density"] == (0.9, 0.2)
    assert options_of(found[q_proj(1)])["density"] == (0.9, 0.9)


def test_a_gradient_stays_between_its_anchors() -> None:
    @settings(deadline=None, max_examples=200)
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1))
    def check(anchors: list[float], position: float) -> None:
        value = scalar_at(Gradient(tuple(anchors)), "x", position)
        assert isinstance(value, float)
        assert min(anchors) <= value <= max(anchors)

    check()


def test_a_filter_list_without_a_match_falls_to_the_next_level() -> None:
    recipe = parse(
        models=[
            {"model": "o/a", "parameters": {"density": [{"filter": "mlp", "value": [0.2, 0.4]}]}},
            {"model": "o/b"},
        ],
        parameters={"weight": 1, "density": {"filter": "self_attn", "value": 0.6}},
    )
    found = treat(recipe, layers=3)
    assert options_of(found[up_proj(1)])["density"] == (pytest.approx(0.3), 1.0)
    assert options_of(found[q_proj(1)])["density"] == (0.6, 0.6)
    assert options_of(found[EMBEDDING])["density"] == (1.0, 1.0)


def test_a_weight_that_no_filter_gives_is_refused_with_the_tensor() -> None:
    recipe = parse(parameters={"weight": [{"filter": "mlp", "value": 1}]})
    with pytest.raises(RecipeError, match=rf"{EMBEDDING}.*'weight'.*no filter"):
        treat(recipe)


def test_options_that_contradict_each_other_are_refused_with_the_tensor() -> None:
    recipe = parse(merge_method="della", parameters={"weight": 1, "density": [0.5, 0.1], "epsilon": 0.15})
    with pytest.raises(RecipeError, match=r"layers\.3\.\S+ della: keep probabilities would run from"):
        treat(recipe, layers=4)


def test_weights_that_sum_to_zero_are_refused_before_any_data_is_read() -> None:
    models = [{"model": "o/a", "parameters": {"weight": 1}}, {"model": "o/b", "parameters": {"weight": -1}}]
    with pytest.raises(RecipeError, match=r"linear: .*sum"):
        treat(parse(merge_method="linear", models=models))


def test_ranges_must_be_bound_first() -> None:
    recipe = parse(parameters={"weight": {"search": [0, 1], "as": "w"}})
    with pytest.raises(RecipeError, match=r"ranges \(w\)"):
        treat(recipe)
    assert treat(recipe.bind({"w": 0.25}))[EMBEDDING].coefficients == (0.25, 0.25)


def test_layers_behind_the_last_match_the_mtp_class() -> None:
    names = [up_proj(layer) for layer in range(4)] + ["model.layers.3.eh_proj.weight"]
    recipe = parse(rules=[{"match": {"class": "mtp"}, "drop": True}])
    assert [isinstance(each, Drop) for each in resolve(recipe, names)] == [False, False, False, True, True]
    assert isinstance(resolve(recipe, names[:4], num_hidden_layers=3)[3], Drop)


def test_ninety_thousand_tensors_of_sixteen_models_share_a_few_treatments() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer in range(61)
        for expert in range(256)
        for part in ("gate_proj", "up_proj", "down_proj")
    ] + [f"model.layers.{layer}.self_attn.part_{part}.weight" for layer in range(61) for part in range(740)]
    models = [{"model": f"o/m{place}", "parameters": {"weight": [0.1, place + 1.0]}} for place in range(16)]
    rules = [
        {"match": {"class": ["routed_experts"], "layers": [58, 60], "name": "model.layers.*"}, "copy": "m3"},
        {"match": {"name": "*.mtp.*"}, "drop": True},
    ]
    recipe = parse(models=models, rules=rules, parameters={"density": [{"filter": "mlp", "value": 0.5}, {"value": 1}]})
    treatments = resolve(recipe, names)
    assert len(treatments) == len(names) > 90_000
    assert len({id(each) for each in treatments}) < 200  # interned
    assert sum(isinstance(each, Copy) for each in treatments) == 3 * 768


def test_rules_and_filters_that_fit_no_tensor_are_named() -> None:
    recipe = parse_recipe(
        {
            "merge_method": "linear",
            "models": [
                {"model": "a", "parameters": {"weight": [{"filter": "self_atn", "value": 1}, {"value": 0.5}]}},
                {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}},
            ],
            "rules": [
                {"match": {"name": "model.layrs.*"}, "copy": "a"},
                {"match": {"name": "*.mlp.*"}, "copy": "b"},
                {"match": {"class": "router", "layers": [1, 2]}, "copy": "b"},
            ],
        }
    )
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert find_unused(recipe, names) == [
        "rule 1 of the recipe, name model.layrs.*, matches no tensor",
        "rule 3 of the recipe, class router, layers 1 to 2, matches no tensor",
        "filter 'self_atn' of weight is in no tensor's name",
    ]
