"""The hull of a pool: which checkpoints are its vertices, and the recipe of any point in it.

A point is coefficients (B, V), see `remelt.frank_wolfe`. Its recipe has a rule for each block (none is needed where the
whole model is one block) that merges the block's vertices with their coefficients by the chosen operator. Vertices of
coefficient 0 are left out, so a recipe names, and its merge reads, the active ones alone.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from remelt.errors import RecipeError
from remelt.oracle import Blocks, Matrix
from remelt.recipe import MergeRule, Recipe
from remelt.recipe_checks import installed_operators
from remelt.recipe_yaml import parse_recipe
from remelt.strict_config import suggestion

BASE_NAME = "base"
"""Of the base among the vertices, unless a checkpoint of the pool has that name."""


class Member(NamedTuple):
    """A checkpoint of the pool."""

    source: str
    name: str
    parameters: Mapping[str, Any]
    """Of its own, such as `density`; never a weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hull:
    """A pool, and how its points are merged.

    Raises:
        RecipeError: an operator without coefficients, a weight where a coefficient will stand, or whatever the recipe
            of the uniform point is refused for.
    """

    pool: tuple[Member, ...]
    merge_method: str = "linear"
    base: str | None = None
    """Source of the base; gives layout, config and tokenizer, and is what task vectors are taken from."""
    with_base: bool = False
    """Whether the base is a vertex."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Options of the operator for all members."""
    rules: tuple[Mapping[str, Any], ...] = ()
    """Copy and drop rules, which come before those of the blocks."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the recipe: dtype, out_dtype, seed, compat, max_shard_size..."""
    where: str = "selection"
    """What refusals call the recipe."""

    def __post_init__(self) -> None:
        operators = installed_operators()
        if self.merge_method not in operators:
            raise RecipeError(
                f"{self.where}: unknown operator {self.merge_method!r}; {suggestion(self.merge_method, operators)}"
            )
        operator = operators[self.merge_method]
        if operator.weight == "none" or operator.min_models > 1 or operator.max_models is not None:
            valid = [
                name
                for name, each in operators.items()
                if each.weight != "none" and each.min_models == 1 and each.max_models is None
            ]
            raise RecipeError(
                f"{self.where}: {self.merge_method} does not take a coefficient for each of any number of checkpoints; "
                f"use one of {', '.join(sorted(valid))}"
            )
        if any("weight" in parameters for parameters in (self.parameters, *(each.parameters for each in self.pool))):
            raise RecipeError(f"{self.where}: a `weight` is given, but weights are what is selected; leave it out")
        if self.with_base and self.base is None:
            raise RecipeError(f"{self.where}: the base is to be a vertex, but there is no `base_model`")
        recipe = self.recipe(self.uniform(1), None)
        if any(isinstance(rule, MergeRule) for rule in recipe.rules):
            raise RecipeError(f"{self.where}: `rules` copy or drop here; how tensors are merged is what is selected")
        if recipe.variables:
            raise RecipeError(f"{self.where}: ranges are for `remelt search`; give numbers")

    @property
    def vertices(self) -> tuple[str, ...]:
        """The vertices: the pool in its order, then the base where it is one."""
        names = tuple(member.name for member in self.pool)
        return (*names, self._base_name) if self.with_base else names

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the vertices lie."""
        sources = tuple(member.source for member in self.pool)
        return (*sources, str(self.base)) if self.with_base else sources

    @property
    def _base_name(self) -> str:
        return BASE_NAME if all(member.name != BASE_NAME for member in self.pool) else f"{BASE_NAME} model"

    @property
    def is_linear(self) -> bool:
        """Whether a merge is linear in its coefficients, so that gradients with respect to them are exact."""
        return self.merge_method in ("linear", "task_arithmetic")

    @property
    def scale(self) -> float:
        """What the operator multiplies the merged task vector by."""
        value = self.parameters.get("lambda", 1.0)
        has_base = installed_operators()[self.merge_method].base != "none"
        return float(value) if has_base and isinstance(value, int | float) else 1.0

    def uniform(self, num_blocks: int) -> Matrix:
        """The pool's mean; the base has no share in it."""
        row = np.array([1.0 / len(self.pool)] * len(self.pool) + [0.0] * self.with_base)
        return np.tile(row, (num_blocks, 1))

    def start(self, name: str, num_blocks: int) -> Matrix:
        """Coefficients of `uniform`, or of the vertex called `name`."""
        if name == "uniform":
            return self.uniform(num_blocks)
        if name not in self.vertices:
            raise RecipeError(f"{self.where}: no start {name!r}; {suggestion(name, ['uniform', *self.vertices])}")
        return np.tile(np.eye(len(self.vertices))[self.vertices.index(name)], (num_blocks, 1))

    def recipe(self, coefficients_BV: Matrix, blocks: Blocks | None) -> Recipe:
        """The recipe that merges a point; `blocks` may be missing where there is but one."""
        active = [place for place in range(len(self.vertices)) if (coefficients_BV[:, place] > 0).any()]
        mean_V = coefficients_BV.mean(axis=0)
        document: dict[str, Any] = {"merge_method": self.merge_method, **self.more}
        if self.base is not None:
            document["base_model"] = self.base
        rules = list(self.rules)
        if blocks is not None and blocks.granularity != "model":
            rules += self._block_rules(coefficients_BV, blocks)
        document["models"] = [self._entry(place, float(mean_V[place])) for place in active if self._is_merged(place)]
        if not document["models"]:
            # The base alone: with operators on task vectors, a merge of nothing.
            document["merge_method"] = "linear"
            document["models"] = [self._entry(place, 1.0) for place in active]
        elif self.parameters:
            document["parameters"] = dict(self.parameters)
        if rules:
            document["rules"] = [dict(rule) for rule in rules]
        return parse_recipe(document, where=self.where)

    def _is_merged(self, place: int) -> bool:
        """Whether the operator takes the vertex as a model: the base's task vector is zero, and is left out."""
        return place < len(self.pool) or installed_operators()[self.merge_method].base == "none"

    def _entry(self, place: int, coefficient: float) -> dict[str, Any]:
        if place == len(self.pool):
            return {"model": self.base, "name": self._base_name, "parameters": {"weight": coefficient}}
        member = self.pool[place]
        # Streams as in the whole pool: which random masks a member gets does not depend on who else is active.
        stream = {} if self._same_as_base(member) else {"stream": place}
        parameters = {**member.parameters, "weight": coefficient}
        return {"model": member.source, "name": member.name, **stream, "parameters": parameters}

    def _same_as_base(self, member: Member) -> bool:
        return self.base is not None and member.source.rstrip("/") == self.base.rstrip("/")

    def _block_rules(self, coefficients_BV: Matrix, blocks: Blocks) -> list[dict[str, Any]]:
        """A rule for each block; layers before classes, since a class alone also matches inside the layers."""
        order = sorted(range(blocks.num_blocks), key=lambda place: not blocks.labels_B[place].startswith("layer "))
        return [
            {"match": _match(blocks, place), **self._block_merge(coefficients_BV[place])}
            for place in (range(blocks.num_blocks) if blocks.granularity == "tensor" else order)
        ]

    def _block_merge(self, coefficients_V: Sequence[float] | Matrix) -> dict[str, Any]:
        models = {}
        for place, coefficient in enumerate(coefficients_V):
            if coefficient > 0 and self._is_merged(place):
                entry = self._entry(place, float(coefficient))
                models[entry["name"]] = entry["parameters"]
        if not models:
            return {"copy": self.base}
        merge: dict[str, Any] = {"merge_method": self.merge_method, "models": models}
        if self.parameters:
            merge["parameters"] = dict(self.parameters)
        return merge


def _match(blocks: Blocks, place: int) -> dict[str, Any]:
    label = blocks.labels_B[place]
    if blocks.granularity == "tensor":
        return {"name": glob.escape(label)}
    if label.startswith("layer "):
        number = int(label.removeprefix("layer "))
        return {"layers": [number, number]}
    return {"class": [label]}
