"""Reading the values of a recipe's parameters: numbers, gradients over layers, filters by name, ranges to search.

Also the names of ranges: an `as:` as written, else a readable one from where the range stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remelt.recipe import (
    Case,
    Constraints,
    Filtered,
    Gradient,
    Parameters,
    Recipe,
    Scalar,
    Search,
    Value,
    leaves,
    rewrite,
)
from remelt.strict_config import Section, is_number, kind_of, suggestion


def parse_parameters(section: Section) -> Parameters:
    """The keys and values of a `parameters:` mapping; which keys there are is the operators' to say."""
    return tuple(sorted((key, _parse_value(section, key, section.values[key])) for key in section.values))


def _parse_value(section: Section, key: str, value: Any) -> Value:
    if isinstance(value, Mapping) and "search" not in value:
        return Filtered((_parse_case(section, key, value),))
    if not isinstance(value, list | tuple):
        return _parse_scalar(section, key, value)
    if any(isinstance(item, Mapping) and "search" not in item for item in value):
        return Filtered(tuple(_parse_case(section, f"{key}[{place}]", item) for place, item in enumerate(value)))
    return _parse_gradient(section, key, value)


def _parse_case(section: Section, key: str, value: Any) -> Case:
    case = Section(value, section.where, section.at(key), error=section.error)
    if not {"filter", "value"} & case.values.keys():
        case.refuse("expected a number, a list, {filter, value} or {search: [low, high]}, found " + kind_of(value))
    case.allow(("filter", "value"))
    pattern = case.text("filter", "*")
    inner = case.values.get("value")
    if isinstance(inner, list | tuple):
        return Case(None if pattern == "*" else pattern, _parse_gradient(case, "value", inner))
    return Case(None if pattern == "*" else pattern, _parse_scalar(case, "value", inner))


def _parse_gradient(section: Section, key: str, values: list[Any] | tuple[Any, ...]) -> Gradient:
    if not values:
        section.refuse("expected numbers, found an empty list", key)
    anchors = tuple(_parse_scalar(section, f"{key}[{place}]", item) for place, item in enumerate(values))
    for place, anchor in enumerate(anchors):
        if isinstance(anchor, bool | str):
            section.refuse(f"a list over layers holds numbers, found {kind_of(anchor)}", f"{key}[{place}]")
    return Gradient(anchors)


def _parse_scalar(section: Section, key: str, value: Any) -> Scalar:
    if isinstance(value, Mapping) and "search" in value:
        return _parse_search(Section(value, section.where, section.at(key), error=section.error))
    if isinstance(value, bool | str):
        return value
    if not is_number(value):
        section.refuse(f"expected a finite number, true or false, or text, found {kind_of(value)}", key)
    return float(value)


def _parse_search(section: Section) -> Search:
    section.allow(("search", "init", "as"))
    bounds = section.items("search")
    if len(bounds) != 2 or not all(is_number(bound) for bound in bounds) or not bounds[0] < bounds[1]:
        section.refuse(f"expected [low, high] with low below high, found {list(bounds)}", "search")
    low, high = float(bounds[0]), float(bounds[1])
    init = section.number("init", low=low, high=high) if section.has("init") else None
    return Search(low, high, init, section.text("as") if section.has("as") else "")


def name_variables(recipe: Recipe, section: Section) -> Recipe:
    """Give every range its name, and every range of one name the same bounds and start.

    Raises:
        RecipeError: where one name stands for two different ranges.
    """
    named: dict[str, Search] = {}
    for path, leaf in leaves(recipe):
        if isinstance(leaf, Search) and leaf.name:
            known = named.setdefault(leaf.name, leaf)
            starts = {known.init, leaf.init} - {None}
            if known[:2] != leaf[:2] or len(starts) > 1:
                section.refuse(f"{path}: the variable {leaf.name!r} stands elsewhere with another range or init")
            named[leaf.name] = known._replace(init=starts.pop() if starts else None)
    taken = set(named)

    def with_name(path: str, leaf: Scalar) -> Scalar:
        if not isinstance(leaf, Search):
            return leaf
        if leaf.name:
            return named[leaf.name]
        name, place = path, 1
        while name in taken:
            place += 1
            name = f"{path}.{place}"
        taken.add(name)
        return leaf._replace(name=name)

    return rewrite(recipe, with_name)


def parse_constraints(section: Section, recipe: Recipe) -> Constraints:
    """The `constraints:` mapping, checked against the recipe's variables.

    Raises:
        RecipeError: for an unknown variable, one in two groups, and a group whose ranges or starts cannot sum to 1.
    """
    section.allow(("simplex",))
    groups = section.items("simplex")
    if groups and all(isinstance(item, str) for item in groups):
        groups = [groups]
    variables = {variable.name: variable for variable in recipe.variables}
    seen: set[str] = set()
    for group in groups:
        if not isinstance(group, list | tuple) or len(group) < 2:
            section.refuse("expected at least two names of variables", "simplex")
        for name in group:
            if name not in variables:
                section.refuse(f"no variable {name!r}; {suggestion(str(name), variables.keys())}", "simplex")
            if name in seen:
                section.refuse(f"the variable {name!r} stands twice", "simplex")
            seen.add(name)
        members = [variables[name] for name in group]
        if any(member.low < 0 for member in members):
            section.refuse("its variables must not be negative; begin their ranges at 0", "simplex")
        if not sum(member.low for member in members) <= 1.0 <= sum(member.high for member in members):
            section.refuse(f"the ranges of {', '.join(group)} cannot sum to 1", "simplex")
    return Constraints(tuple(tuple(group) for group in groups))


def check_starts(recipe: Recipe, section: Section) -> None:
    """Refuse simplex groups whose starting values leave their ranges or do not sum to 1."""
    variables = {variable.name: variable for variable in recipe.variables}
    for group in recipe.constraints.simplex:
        members = [variables[name] for name in group]
        total = sum(member.init for member in members)
        is_inside = all(member.low <= member.init <= member.high for member in members)
        if not is_inside or abs(total - 1.0) > 1e-9:
            starts = ", ".join(f"{member.name} = {member.init:g}" for member in members)
            section.refuse(f"a simplex must start at values that sum to 1, found {starts}; give each an `init`")
