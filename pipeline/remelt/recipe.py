"""The recipe: which checkpoints are merged, by which operator, with which coefficients and options.

A `Recipe` is a frozen value. It may hold ranges (`Search`) where a number may stand; `variables` lists them and `bind`
puts numbers in their places. `canonical` is its JSON form, which `remelt.recipe_yaml.parse_recipe` reads back to an
equal recipe. The YAML reader is `remelt.recipe_yaml`, the step to one treatment for each tensor `remelt.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any, Literal, NamedTuple, TypeAlias

from remelt.dtypes import DTYPES
from remelt.errors import RecipeError

SIMPLEX_TOLERANCE = 1e-6
"""How far from 1 the bound values of a simplex constraint may sum."""


class Search(NamedTuple):
    """A range in the place of a number. Equal names are one variable."""

    low: float
    high: float
    init: float | None
    """As written; `Variable.init` has the default filled in."""
    name: str


Scalar: TypeAlias = float | bool | str | Search


class Gradient(NamedTuple):
    """Anchors spread evenly over the layers, linear in between: position t = layer / (num_layers - 1)."""

    anchors: tuple[Scalar, ...]


class Case(NamedTuple):
    """A value for the tensors whose name contains `pattern`; None stands for every tensor."""

    pattern: str | None
    value: Scalar | Gradient


class Filtered(NamedTuple):
    """Cases by tensor name; the first match holds, and a tensor without one falls to the next level of precedence."""

    cases: tuple[Case, ...]


Value: TypeAlias = Scalar | Gradient | Filtered
Parameters: TypeAlias = tuple[tuple[str, Value], ...]
"""(key, value) pairs, sorted by key."""


class CheckpointRef(NamedTuple):
    """An input checkpoint, as the recipe names it."""

    source: str
    """A path or Hub id as written, its `@revision` included."""
    name: str
    """Unique in the recipe: the `name:` key, else the shortest unique end of the path."""
    stream: int
    """Number of its random stream: its place in `models:` without the base, or its `stream:` key; -1 for a base."""


class Entry(NamedTuple):
    """A model of a merge: its place in `Recipe.checkpoints`, and parameters of its own."""

    model: int
    parameters: Parameters = ()


class Match(NamedTuple):
    """What a rule asks of a tensor; all that is given must hold."""

    classes: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    """First and last layer, both inclusive."""
    name: str | None = None
    """A glob over the whole name, case-sensitive; `*` also matches dots."""


class CopyRule(NamedTuple):
    """Matching tensors are copied from a checkpoint, by its place."""

    match: Match
    model: int


class DropRule(NamedTuple):
    """Matching tensors are left out of the output."""

    match: Match


class MergeRule(NamedTuple):
    """Matching tensors are merged by an operator of their own; nothing of the recipe's `parameters` reaches them."""

    match: Match
    merge_method: str
    entries: tuple[Entry, ...] | None
    """None: the recipe's models with their own parameters, over which this rule's `parameters` win."""
    parameters: Parameters = ()


Rule: TypeAlias = CopyRule | DropRule | MergeRule


class Constraints(NamedTuple):
    """What the variables must obey together."""

    simplex: tuple[tuple[str, ...], ...] = ()
    """Groups of variable names whose values are at least 0 and sum to 1."""


NO_CONSTRAINTS = Constraints()


class Variable(NamedTuple):
    """Something to search: a number in [low, high]."""

    name: str
    low: float
    high: float
    init: float
    occurs: tuple[str, ...] = ()
    """Where it stands in the recipe, such as `models.math.weight` or `parameters.density`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to merge and how. Models are named by their place in `checkpoints`."""

    merge_method: str
    checkpoints: tuple[CheckpointRef, ...]
    """The base first where there is one, then the models in the order of the recipe."""
    entries: tuple[Entry, ...]
    """The `models:` in their order; one of them may be the base (whether it counts is the operator's to say)."""
    base: int | None = None
    parameters: Parameters = ()
    rules: tuple[Rule, ...] = ()
    constraints: Constraints = NO_CONSTRAINTS
    name: str | None = None
    dtype: str | None = None
    """safetensors' name. mergekit's dtype of arithmetic, which here is always float32; it sets the output's."""
    out_dtype: str | None = None
    dtype_all: bool = False
    """Whether tensors that the base keeps in float32 are cast too (`dtype: all`)."""
    seed: int = 0
    compat: Literal["remelt", "mergekit"] = "remelt"
    tokenizer_source: Literal["base"] | None = None
    max_shard_bytes: int | None = None
    shard_layout: Literal["size", "base"] = "size"
    allow_nonfinite: bool = False
    expected_layers: int | None = None
    """Layers that single-range `slices` name; to be checked against the checkpoint's num_hidden_layers."""
    notes: tuple[str, ...] = dataclass_field(default=(), compare=False)
    """One sentence each, for the user; no part of what the recipe means."""

    @property
    def layout(self) -> int:
        """Place of the checkpoint that stands for layout, config and tokenizer: the base, else the first model."""
        return self.entries[0].model if self.base is None else self.base

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Every variable once, in the order of the recipe: models, parameters, rules."""
        found: dict[str, list[tuple[str, Search]]] = {}
        for path, leaf in leaves(self):
            if isinstance(leaf, Search):
                found.setdefault(leaf.name, []).append((path, leaf))
        inits = self._simplex_inits({name: uses[0][1] for name, uses in found.items()})
        return tuple(
            Variable(
                name,
                uses[0][1].low,
                uses[0][1].high,
                inits[name] if name in inits else _default_init(uses[0][1]),
                tuple(path for path, _ in uses),
            )
            for name, uses in found.items()
        )

    def _simplex_inits(self, ranges: Mapping[str, Search]) -> dict[str, float]:
        """Starting values of simplex groups: those not written share what the written ones leave of 1."""
        inits: dict[str, float] = {}
        for group in self.constraints.simplex:
            written = [ranges[name].init for name in group]
            given = sum(init for init in written if init is not None)
            share = (1.0 - given) / max(1, written.count(None))
            inits.update({name: share if init is None else init for name, init in zip(group, written, strict=True)})
        return inits

    @property
    def is_bound(self) -> bool:
        """Whether every range has been given its number."""
        return not any(isinstance(leaf, Search) for _, leaf in leaves(self))

    def bind(self, values: Mapping[str, float]) -> Recipe:
        """Put a number in the place of every variable.

        Raises:
            RecipeError: for a name that is no variable, a variable without a value, a value outside its range, or a
                simplex group that does not sum to 1 (within 1e-6).
        """
        variables = {variable.name: variable for variable in self.variables}
        if unknown := sorted(values.keys() - variables.keys()):
            raise RecipeError(f"no variable {unknown[0]!r} in the recipe; it has: {', '.join(variables) or 'none'}")
        for name, variable in variables.items():
            if name not in values:
                raise RecipeError(f"variable {name!r} has no value; bind gives one to each of: {', '.join(variables)}")
            if not variable.low <= values[name] <= variable.high:
                raise RecipeError(
                    f"variable {name!r} is {values[name]!r}, outside [{variable.low:g}, {variable.high:g}]"
                )
        for group in self.constraints.simplex:
            total = math.fsum(values[name] for name in group)
            if abs(total - 1.0) > SIMPLEX_TOLERANCE:
                raise RecipeError(f"the simplex {', '.join(group)} sums to {total!r}; its values must sum to 1")
        bound = rewrite(self, lambda _, leaf: float(values[leaf.name]) if isinstance(leaf, Search) else leaf)
        return replace(bound, constraints=NO_CONSTRAINTS)

    def canonical(self) -> dict[str, Any]:
        """The recipe as JSON values under the recipe's own keys, every default written out; stable."""
        document: dict[str, Any] = {"merge_method": self.merge_method}
        if self.name is not None:
            document = {"name": self.name, **document}
        if self.base is not None:
            document["base_model"] = self.checkpoints[self.base].source
        models = [self._entry_document(entry) for entry in self.entries]
        if self.expected_layers is None:
            document["models"] = models
        else:
            layer_range = {"layer_range": [0, self.expected_layers]}
            document["slices"] = [{"sources": [{**model, **layer_range} for model in models]}]
        optional = {
            "parameters": _parameters_document(self.parameters),
            "rules": [self._rule_document(rule) for rule in self.rules],
            "constraints": {"simplex": [list(group) for group in self.constraints.simplex]},
            "dtype": "all" if self.dtype_all else _dtype_document(self.dtype),
            "out_dtype": _dtype_document(self.out_dtype),
            "tokenizer_source": self.tokenizer_source,
            "max_shard_size": self.max_shard_bytes,
        }
        if not self.constraints.simplex:
            del optional["constraints"]
        document.update({key: value for key, value in optional.items() if value not in (None, [], {})})
        document.update(
            layout=self.shard_layout, seed=self.seed, compat=self.compat, allow_nonfinite=self.allow_nonfinite
        )
        return document

    def to_yaml(self) -> str:
        """The canonical form as YAML, which loads to an equal recipe."""
        from remelt.strict_config import dump_yaml

        return dump_yaml(self.canonical())

    def _entry_document(self, entry: Entry) -> dict[str, Any]:
        checkpoint = self.checkpoints[entry.model]
        document: dict[str, Any] = {"model": checkpoint.source, "name": checkpoint.name}
        if entry.model != self.base:
            document["stream"] = checkpoint.stream
        if entry.parameters:
            document["parameters"] = _parameters_document(entry.parameters)
        return document

    def _rule_document(self, rule: Rule) -> dict[str, Any]:
        match: dict[str, Any] = {}
        if rule.match.classes:
            match["class"] = list(rule.match.classes)
        if rule.match.layers is not None:
            match["layers"] = list(rule.match.layers)
        if rule.match.name is not None:
            match["name"] = rule.match.name
        document: dict[str, Any] = {"match": match}
        if isinstance(rule, CopyRule):
            document["copy"] = self.checkpoints[rule.model].name
        elif isinstance(rule, DropRule):
            document["drop"] = True
        else:
            document["merge_method"] = rule.merge_method
            if rule.entries is not None:
                document["models"] = {
                    self.checkpoints[entry.model].name: _parameters_document(entry.parameters) for entry in rule.entries
                }
            if rule.parameters:
                document["parameters"] = _parameters_document(rule.parameters)
        return document


def leaves(recipe: Recipe) -> list[tuple[str, Scalar]]:
    """Every scalar of the recipe's parameters with its path, such as ("models.math.weight", 0.5)."""
    found: list[tuple[str, Scalar]] = []

    def note(path: str, leaf: Scalar) -> Scalar:
        found.append((path, leaf))
        return leaf

    rewrite(recipe, note)
    return found


def rewrite(recipe: Recipe, change: Callable[[str, Scalar], Scalar]) -> Recipe:
    """The recipe with `change(path, leaf)` in the place of every scalar of its parameters."""

    def entries_of(prefix: str, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple(
            Entry(
                entry.model,
                _rewrite_parameters(f"{prefix}.{recipe.checkpoints[entry.model].name}", entry.parameters, change),
            )
            for entry in entries
        )

    entries = entries_of("models", recipe.entries)
    parameters = _rewrite_parameters("parameters", recipe.parameters, change)
    rules: list[Rule] = []
    for place, rule in enumerate(recipe.rules):
        if isinstance(rule, MergeRule):
            own = None if rule.entries is None else entries_of(f"rules.{place}.models", rule.entries)
            options = _rewrite_parameters(f"rules.{place}.parameters", rule.parameters, change)
            rules.append(rule._replace(entries=own, parameters=options))
        else:
            rules.append(rule)
    return replace(recipe, entries=entries, parameters=parameters, rules=tuple(rules))


def rewrite_value(path: str, value: Value, change: Callable[[str, Scalar], Scalar]) -> Value:
    """A parameter's value with `change(path, leaf)` in the place of every scalar in it."""
    if isinstance(value, Filtered):
        cases = [
            Case(pattern, _rewrite_anchors(f"{path}.{'*' if pattern is None else pattern}", inner, change))
            for pattern, inner in value.cases
        ]
        return Filtered(tuple(cases))
    return _rewrite_anchors(path, value, change)


def _rewrite_anchors(path: str, value: Scalar | Gradient, change: Callable[[str, Scalar], Scalar]) -> Scalar | Gradient:
    if isinstance(value, Gradient):
        return Gradient(tuple(change(f"{path}.{place}", anchor) for place, anchor in enumerate(value.anchors)))
    return change(path, value)


def _rewrite_parameters(prefix: str, parameters: Parameters, change: Callable[[str, Scalar], Scalar]) -> Parameters:
    return tuple((key, rewrite_value(f"{prefix}.{key}", value, change)) for key, value in parameters)


def _default_init(search: Search) -> float:
    return (search.low + search.high) / 2 if search.init is None else search.init


def _dtype_document(dtype: str | None) -> str | None:
    return None if dtype is None else DTYPES[dtype].torch_name


def _parameters_document(parameters: Parameters) -> dict[str, Any]:
    return {key: _value_document(value) for key, value in parameters}


def _value_document(value: Value) -> Any:
    if isinstance(value, Search):
        init = {} if value.init is None else {"init": value.init}
        return {"search": [value.low, value.high], **init, "as": value.name}
    if isinstance(value, Gradient):
        return [_value_document(anchor) for anchor in value.anchors]
    if isinstance(value, Filtered):
        return [
            {"filter": "*" if pattern is None else pattern, "value": _value_document(inner)}
            for pattern, inner in value.cases
        ]
    return value
