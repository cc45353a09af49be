"""Reading a recipe: mergekit's keys with mergekit's meaning, and our own.

Strict: an unknown key, operator or option is refused with the file, the path in it and the nearest valid word. What is
read but has no effect becomes a note. The meaning of each key is in docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from remelt.dtypes import RECIPE_DTYPES
from remelt.operators.spec import Operator
from remelt.recipe import (
    CheckpointRef,
    CopyRule,
    DropRule,
    Entry,
    Match,
    MergeRule,
    Parameters,
    Recipe,
    Rule,
)
from remelt.recipe_checks import check_recipe, installed_operators
from remelt.recipe_values import check_starts, name_variables, parse_constraints, parse_parameters
from remelt.strict_config import Section, load_yaml, suggestion
from remelt.tensor_classes import KINDS

_MERGEKIT_KEYS = (
    "name",
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
)
_TOKENIZER_KEYS = ("tokenizer_source", "tokenizer", "chat_template")
_OUR_KEYS = ("rules", "constraints", "seed", "compat", "max_shard_size", "layout", "allow_nonfinite")
_MODEL_KEYS = ("model", "name", "stream", "parameters")
_RULE_KEYS = ("match", "copy", "drop", "merge_method", "models", "parameters")

Compat = Literal["remelt", "mergekit"]


class _Model(NamedTuple):
    """An item of `models:` (or a source of the one slice) as read."""

    section: Section
    source: str
    name: str | None
    stream: int | None
    parameters: Parameters


def load_recipe(path: Path, *, compat: Compat | None = None, operators: Mapping[str, Operator] | None = None) -> Recipe:
    """Read the recipe in a YAML file.

    Args:
        path: a file of at most 1 MB.
        compat: overrides the recipe's own `compat`.
        operators: the operators there are; remelt's own and those of installed packages if None.

    Raises:
        RecipeError: for whatever cannot be read or done, with the file and the path in it.
    """
    return parse_recipe(load_yaml(path), where=str(path), compat=compat, operators=operators)


def parse_recipe(
    document: Mapping[str, Any],
    *,
    where: str = "recipe",
    compat: Compat | None = None,
    operators: Mapping[str, Operator] | None = None,
) -> Recipe:
    """Read a recipe from plain values, as YAML or JSON gives them; `where` names it in refusals."""
    operators = installed_operators() if operators is None else operators
    top = Section(document, where)
    if top.has("modules"):
        top.refuse("`modules` are not read: remelt merges whole checkpoints; `rules` treat their parts", "modules")
    top.allow((*_MERGEKIT_KEYS, *_TOKENIZER_KEYS, *_OUR_KEYS))
    method = _method(top, "merge_method", operators)
    models, slice_parameters, expected_layers = _read_models(top)
    base_source = _base_source(top)
    checkpoints, places = _checkpoints(top, base_source, models)
    parameters = dict(parse_parameters(top.section("parameters"))) | dict(slice_parameters)
    dtype, is_dtype_all = _dtypes(top)
    tokenizer_source, notes = _tokenizer(top)
    recipe = Recipe(
        merge_method=method,
        checkpoints=checkpoints,
        entries=tuple(Entry(place, model.parameters) for place, model in zip(places, models, strict=True)),
        base=None if base_source is None else 0,
        parameters=tuple(sorted(parameters.items())),
        name=top.text("name") if top.has("name") else None,
        dtype=dtype,
        out_dtype=_dtype(top, "out_dtype"),
        dtype_all=is_dtype_all,
        seed=top.integer("seed", 0, low=0, high=2**63 - 1),
        compat=cast(Compat, compat or top.choice("compat", ("remelt", "mergekit"), "remelt")),
        tokenizer_source=tokenizer_source,
        max_shard_bytes=_max_shard_bytes(top),
        shard_layout=cast(Literal["size", "base"], top.choice("layout", ("size", "base"), "size")),
        allow_nonfinite=top.flag("allow_nonfinite", False),
        expected_layers=expected_layers,
    )
    recipe = replace(recipe, rules=tuple(_read_rule(rule, recipe, operators) for rule in top.sections("rules")))
    recipe, mask_notes = _without_int8_mask(recipe)
    recipe = name_variables(recipe, top)
    recipe = replace(recipe, constraints=parse_constraints(top.section("constraints"), recipe))
    check_starts(recipe, top)
    return replace(recipe, notes=(*notes, *mask_notes, *check_recipe(recipe, operators, where)))


def _method(section: Section, key: str, operators: Mapping[str, Operator]) -> str:
    name = section.text(key)
    if name == "passthrough":
        section.refuse("passthrough stacks layers; remelt merges checkpoints of one shape and builds no stacks", key)
    if name not in operators:
        section.refuse(f"unknown operator {name!r}; {suggestion(name, operators.keys())}", key)
    return name


def _source(section: Section, key: str) -> str:
    source = section.text(key)
    if "+" in source:
        section.refuse(f"{source!r} names an adapter after the '+': adapters are not read yet; merge it first", key)
    return source


def _base_source(top: Section) -> str | None:
    """`base_model`; that of the one slice holds before the recipe's."""
    for section in (*(top.sections("slices") if top.has("slices") else ()), top):
        if section.has("base_model"):
            return _source(section, "base_model")
    return None


def _same(source: str) -> str:
    """What two spellings of one source have in common."""
    return source.rstrip("/") or source


def _read_models(top: Section) -> tuple[list[_Model], Parameters, int | None]:
    """The models, the parameters of the one slice, and the layers that its range names."""
    if not top.has("slices"):
        if not top.items("models"):
            top.refuse("no models: list at least one under `models:`, each as {model: PATH, parameters: {...}}")
        return [_read_model(section) for section in top.sections("models")], (), None
    if top.has("models"):
        top.refuse("`models` and `slices` stand for the same thing; keep one of them", "slices")
    slices = top.sections("slices")
    if len(slices) != 1:
        top.refuse(f"{len(slices)} slices stack layers; only one slice that covers all layers is merged", "slices")
    slice_ = slices[0]
    slice_.allow(("sources", "parameters", "base_model"))
    sources = slice_.sections("sources")
    if not sources:
        slice_.refuse("no sources: list at least one, each as {model: PATH, layer_range: [0, LAYERS]}")
    ends = {_last_layer(source) for source in sources}
    if len(ends) > 1:
        slice_.refuse("the sources' layer ranges differ; remelt merges each layer with its own counterparts", "sources")
    models = [_read_model(source, "layer_range") for source in sources]
    return models, parse_parameters(slice_.section("parameters")), ends.pop()


def _last_layer(source: Section) -> int | None:
    if not source.has("layer_range"):
        return None
    bounds = source.items("layer_range")
    if len(bounds) != 2 or not all(type(bound) is int for bound in bounds) or bounds[1] <= 0:
        source.refuse(f"expected [0, number of layers], found {list(bounds)}", "layer_range")
    if bounds[0] != 0:
        source.refuse(f"{list(bounds)} leaves layers out; only a range over all of them is merged", "layer_range")
    return int(bounds[1])


def _read_model(section: Section, *more_keys: str) -> _Model:
    section.allow((*_MODEL_KEYS, *more_keys))
    return _Model(
        section,
        _source(section, "model"),
        section.text("name") if section.has("name") else None,
        section.integer("stream", low=0) if section.has("stream") else None,
        parse_parameters(section.section("parameters")),
    )


def _checkpoints(
    top: Section, base_source: str | None, models: Sequence[_Model]
) -> tuple[tuple[CheckpointRef, ...], list[int]]:
    """All checkpoints, the base first, and the place of each model among them."""
    sources = [] if base_source is None else [base_source]
    names: list[str | None] = [None] * len(sources)
    streams = [-1] * len(sources)
    places: list[int] = []
    for model in models:
        known = [place for place, source in enumerate(sources) if _same(source) == _same(model.source)]
        if known and (known[0] in places or base_source is None):
            model.section.refuse(f"{model.source!r} is listed twice", "model")
        if known:
            names[0] = model.name
            places.append(0)
            continue
        places.append(len(sources))
        sources.append(model.source)
        names.append(model.name)
        counted = len(sources) - 1 - (base_source is not None)
        streams.append(counted if model.stream is None else model.stream)
    unique = _unique_names(sources, names)
    for kind, values in (("name", unique), ("stream", streams)):
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            top.refuse(f"two models have the {kind} {twice[0]!r}; give each its own", "models")
    refs = zip(sources, unique, streams, strict=True)
    return tuple(CheckpointRef(*ref) for ref in refs), places


def _unique_names(sources: Sequence[str], given: Sequence[str | None]) -> list[str]:
    """Names as given, else the shortest end of the path that no other has, without its revision where that does."""
    ends = [_path_ends(source) for source in sources]
    taken = {name for name in given if name}
    names: list[str] = []
    for place, (source, name) in enumerate(zip(sources, given, strict=True)):
        others = {end for number, other in enumerate(ends) if number != place for end in other}
        free = [end for end in ends[place] if end not in others | taken]
        names.append(name or (free[0] if free else source))
    return names


def _path_ends(source: str) -> list[str]:
    """What a path may be called: `math`, `org/math`, then the same with its revision."""
    whole = _same(source)
    folder, slash, last = whole.rpartition("/")
    plain = folder + slash + last.split("@")[0]
    return [
        "/".join(parts[-length:])
        for parts in (plain.split("/"), whole.split("/"))
        for length in range(1, len(parts) + 1)
    ]


def _place_of(reference: str, recipe: Recipe, section: Section, key: str | None) -> int:
    """Place of the checkpoint that `reference` names, or whose source it is."""
    names = [checkpoint.name for checkpoint in recipe.checkpoints]
    sources = [_same(checkpoint.source) for checkpoint in recipe.checkpoints]
    if reference not in names and _same(reference) not in sources:
        section.refuse(f"no model {reference!r} in the recipe; {suggestion(reference, names)}", key)
    return names.index(reference) if reference in names else sources.index(_same(reference))


def _read_rule(section: Section, recipe: Recipe, operators: Mapping[str, Operator]) -> Rule:
    section.allow(_RULE_KEYS)
    actions = [key for key in ("copy", "drop", "merge_method") if section.has(key)]
    if len(actions) != 1:
        section.refuse(f"a rule does one of copy, drop and merge_method; found {', '.join(actions) or 'none of them'}")
    match = _read_match(section)
    if actions != ["merge_method"] and (section.has("models") or section.has("parameters")):
        section.refuse(f"`models` and `parameters` go with merge_method, not with {actions[0]}")
    if actions == ["copy"]:
        return CopyRule(match, _place_of(section.text("copy"), recipe, section, "copy"))
    if actions == ["drop"]:
        if not section.flag("drop"):
            section.refuse("write `drop: true`, or leave the rule out", "drop")
        return DropRule(match)
    entries: tuple[Entry, ...] | None = None
    if section.has("models"):
        models = section.section("models")
        entries = tuple(
            Entry(_place_of(name, recipe, models, None), parse_parameters(models.section(name)))
            for name in models.values
        )
        if len({entry.model for entry in entries}) < len(entries):
            models.refuse("a model is listed twice, by its name and by its path")
    method = _method(section, "merge_method", operators)
    return MergeRule(match, method, entries, parse_parameters(section.section("parameters")))


def _read_match(rule: Section) -> Match:
    section = rule.section("match")
    section.allow(("class", "layers", "name"))
    if not section.values:
        rule.refuse("a rule needs a `match` of class, layers or name; {name: '*'} matches every tensor", "match")
    classes = section.texts("class")
    for kind in classes:
        if kind not in KINDS:
            section.refuse(f"unknown tensor class {kind!r}; {suggestion(kind, KINDS)}", "class")
    layers: tuple[int, int] | None = None
    if section.has("layers"):
        bounds = section.items("layers")
        if len(bounds) != 2 or not all(type(bound) is int for bound in bounds) or not 0 <= bounds[0] <= bounds[1]:
            section.refuse(f"expected [first, last], both inclusive, found {list(bounds)}", "layers")
        layers = (bounds[0], bounds[1])
    return Match(classes, layers, section.text("name") if section.has("name") else None)


def _dtype(top: Section, key: str) -> str | None:
    return RECIPE_DTYPES[top.choice(key, RECIPE_DTYPES.keys())] if top.has(key) else None


def _dtypes(top: Section) -> tuple[str | None, bool]:
    """`dtype`, and whether it is `all`: then float32 tensors are cast too, to `out_dtype` or what most tensors have."""
    is_all = top.values.get("dtype") == "all"
    return (None if is_all else _dtype(top, "dtype")), is_all


def _tokenizer(top: Section) -> tuple[Literal["base"] | None, list[str]]:
    """`tokenizer_source` and notes; what would make a new tokenizer is refused."""
    section, key = top, "tokenizer_source"
    if top.has("tokenizer"):
        if top.has(key):
            top.refuse("`tokenizer` and `tokenizer_source` say the same; keep one of them", "tokenizer")
        section, key = top.section("tokenizer"), "source"
        section.allow((key,) if section.values.keys() <= {key} else (key, "tokens", "pad_to_multiple_of"))
        if section.values.keys() - {key}:
            section.refuse("changing the vocabulary comes later; now `source: base` alone is read")
    if section.has(key) and section.text(key) != "base":
        section.refuse(f"{section.text(key)!r}: other tokenizers than the base's come later; write `base`", key)
    notes = []
    if top.has("chat_template"):
        if top.text("chat_template") != "auto":
            top.refuse("setting a chat template comes later; leave the key out to keep the base's", "chat_template")
        notes.append("chat_template auto: the template of the base (without one, of the first model) is kept.")
    return ("base" if section.has(key) else None), notes


def _max_shard_bytes(top: Section) -> int | None:
    if not top.has("max_shard_size"):
        return None
    size = top.size_bytes("max_shard_size")
    if size <= 0:
        top.refuse("a shard needs a size above 0", "max_shard_size")
    return size


def _without_int8_mask(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe without mergekit's `int8_mask`, which set the dtype of a temporary."""

    def without(parameters: Parameters) -> Parameters:
        return tuple((key, value) for key, value in parameters if key != "int8_mask")

    entries = tuple(Entry(entry.model, without(entry.parameters)) for entry in recipe.entries)
    changed = replace(recipe, parameters=without(recipe.parameters), entries=entries)
    if changed == recipe:
        return recipe, []
    return changed, ["int8_mask has no effect: it chose the dtype of a temporary, which changes no result."]
