"""What a search scores before it asks for anything: the uniform merge, and each parent alone, as values to bind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from remelt.operators.spec import Operator
from remelt.recipe import Entry, Filtered, Gradient, Recipe, Scalar, Search, Value
from remelt.recipe_checks import installed_operators, merged_entries


def uniform(recipe: Recipe, *, operators: Mapping[str, Operator] | None = None) -> dict[str, float]:
    """Values for the merge in which every model counts the same.

    Each weight variable becomes 1/K for K models (slerp's `t` one half), brought into its range where that leaves it
    out; every other variable takes its starting value. A simplex group gets equal shares of 1.
    """
    operator = (installed_operators() if operators is None else operators)[recipe.merge_method]
    entries = merged_entries(operator, recipe.base, recipe.entries)
    values = {variable.name: variable.init for variable in recipe.variables}
    for entry in entries:
        for leaf in _scalars(_weight(recipe, entry)):
            if isinstance(leaf, Search):
                values[leaf.name] = _clamped(1.0 / len(entries), leaf)
    if operator.weight == "none":
        place = _scalars(dict(recipe.parameters).get("t"))
        values.update({leaf.name: _clamped(0.5, leaf) for leaf in place if isinstance(leaf, Search)})
    for group in recipe.constraints.simplex:
        shares = {name: 1.0 / len(group) for name in group}
        ranges = {variable.name: variable for variable in recipe.variables if variable.name in shares}
        is_inside = all(each.low <= shares[name] <= each.high for name, each in ranges.items())
        values.update(shares if is_inside else {name: each.init for name, each in ranges.items()})
    return values


def single(recipe: Recipe, place: int, *, operators: Mapping[str, Operator] | None = None) -> dict[str, float] | None:
    """Values for "only this parent", or None where the variables cannot say it.

    They can for linear, nuslerp, task_arithmetic (with lambda 1) and slerp, if no rule treats tensors apart. Operators
    that thin or trim task vectors change even a parent that is alone, so there the parent itself is to be scored.

    Args:
        place: of the parent in `Recipe.checkpoints`.
    """
    if recipe.rules:
        return None
    operator = (installed_operators() if operators is None else operators)[recipe.merge_method]
    entries = merged_entries(operator, recipe.base, recipe.entries)
    wanted: list[tuple[Value | None, float]] = []
    if recipe.merge_method == "slerp":
        wanted = [(dict(recipe.parameters).get("t"), float(entries[1].model == place))]
    elif recipe.merge_method in ("linear", "task_arithmetic", "nuslerp"):
        wanted = [(_weight(recipe, entry), float(entry.model == place)) for entry in entries]
    if recipe.merge_method == "task_arithmetic":
        wanted.append((dict(recipe.parameters).get("lambda", 1.0), 1.0))
    is_base_alone = recipe.merge_method == "task_arithmetic" and place == recipe.base
    if not wanted or not (is_base_alone or any(entry.model == place for entry in entries)):
        return None
    values = {variable.name: variable.init for variable in recipe.variables}
    decided: dict[str, float] = {}
    for value, target in wanted:
        for leaf in _scalars(value):
            if not isinstance(leaf, Search):
                if leaf != target:
                    return None
            elif not leaf.low <= target <= leaf.high or decided.setdefault(leaf.name, target) != target:
                return None
    values.update(decided)
    if any(abs(sum(values[name] for name in group) - 1.0) > 1e-9 for group in recipe.constraints.simplex):
        return None
    return values


def _clamped(value: float, search: Search) -> float:
    return min(max(value, search.low), search.high)


def _weight(recipe: Recipe, entry: Entry) -> Value | None:
    """The weight of a model, its own before the one for all."""
    return (dict(recipe.parameters) | dict(entry.parameters)).get("weight")


def _scalars(value: Value | None) -> Iterator[Scalar]:
    """Every scalar in a value; where it leaves some tensors to the next level, one more that fits nothing."""
    if isinstance(value, Filtered):
        for case in value.cases:
            yield from _scalars(case.value)
        if all(case.pattern is not None for case in value.cases):
            yield "absent"
    elif isinstance(value, Gradient):
        yield from value.anchors
    else:
        yield "absent" if value is None else value
