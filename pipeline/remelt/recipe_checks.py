"""A recipe against what its operators declare: options, intervals, numbers of models; notes on what has no effect."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple, NoReturn

from remelt.errors import RecipeError
from remelt.operators import load_operators
from remelt.operators.spec import Interval, Operator, Option, OptionValue
from remelt.recipe import Entry, Filtered, Gradient, MergeRule, Parameters, Recipe, Scalar, Search, Value, rewrite_value
from remelt.strict_config import kind_of, suggestion

WEIGHT = Option("weight", "number", 1.0, interval=Interval(), per_model=True)
"""The recipe's key for a coefficient: any finite number."""


@cache
def installed_operators() -> Mapping[str, Operator]:
    """remelt's own operators and those of installed packages, by name."""
    return load_operators()


def is_required(option: Option) -> bool:
    """Whether an operator declares the option without a default."""
    default: object = option.default
    return default is inspect.Parameter.empty


def merged_entries(operator: Operator, base: int | None, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries that count as models, in the order that the operator wants them.

    The base has no task vector, so an operator with a base leaves it out. slerp goes from the base, listed or not, to
    the other model; with no base, from the first to the second.
    """
    if operator.name == "slerp" and base is not None:
        listed = [entry for entry in entries if entry.model == base] or [Entry(base)]
        return (*listed, *(entry for entry in entries if entry.model != base))
    if operator.base == "none":
        return tuple(entries)
    return tuple(entry for entry in entries if entry.model != base)


def option_value(option: Option, value: Scalar, compat: str) -> OptionValue:
    """A scalar of the recipe as the option takes it.

    mergekit's `rescale: true` and `false` are read as the operator's own form and `none`; 0 and 1 as truth values.

    Raises:
        ValueError: with a sentence, where the option does not take it.
    """
    if isinstance(value, Search):
        if option.kind != "number":
            raise ValueError(f"a range stands only where a number may; {option.name} takes {_takes(option)}")
        option_value(option, value.low, compat)
        option_value(option, value.high, compat)
        return value.low
    if option.kind == "bool" and (isinstance(value, bool) or value in (0.0, 1.0)):
        return bool(value)
    if option.name == "rescale" and isinstance(value, bool):
        return _rescale_form(option, compat) if value else "none"
    if option.kind == "choice" and value in option.choices:
        return value
    interval = option.interval or Interval()
    if option.kind == "number" and isinstance(value, float) and interval.holds(value):
        return value
    near = f"; {suggestion(value, option.choices)}" if isinstance(value, str) and option.choices else ""
    raise ValueError(f"{option.name} takes {_takes(option)}, found {kind_of(value)}{near}")


def _rescale_form(option: Option, compat: str) -> str:
    """What `rescale: true` means: the operator's default where that rescales, else (and for mergekit) L1."""
    return "l1" if compat == "mergekit" or option.default == "none" else str(option.default)


def _takes(option: Option) -> str:
    if option.kind == "number":
        interval = option.interval or Interval()
        return "a finite number" if interval == Interval() else f"a number in {interval}"
    return "true or false" if option.kind == "bool" else f"one of {', '.join(option.choices)}"


class _Use(NamedTuple):
    """An operator in use: by the recipe itself, or by one of its rules."""

    recipe: Recipe
    operator: Operator
    entries: tuple[Entry, ...]
    parameters: Parameters
    where: str
    prefix: str
    """Begins every path: empty for the recipe, `rules.0.` for its first rule."""
    is_inherited: bool = False
    """Whether the entries are the recipe's own, in a rule without `models`."""

    @property
    def merged(self) -> tuple[Entry, ...]:
        return merged_entries(self.operator, self.recipe.base, self.entries)

    def path(self, entry: Entry) -> str:
        return f"{self.prefix}models.{self.recipe.checkpoints[entry.model].name}"

    def refuse(self, path: str, message: str) -> NoReturn:
        raise RecipeError(f"{self.where}: {path}: {message}")


def check_recipe(recipe: Recipe, operators: Mapping[str, Operator], where: str) -> list[str]:
    """Check every method of the recipe, and return notes.

    Raises:
        RecipeError: for an unknown or missing parameter, a value outside its interval, a range where none may stand or
            where it has no effect, too few or too many models, or a missing base.
    """
    known = {"weight"} | {key for each in operators.values() for key in each.options}
    uses = [_Use(recipe, operators[recipe.merge_method], recipe.entries, recipe.parameters, where, "")]
    for place, rule in enumerate(recipe.rules):
        if isinstance(rule, MergeRule):
            is_inherited = rule.entries is None
            entries = recipe.entries if rule.entries is None else rule.entries
            operator = operators[rule.merge_method]
            uses.append(_Use(recipe, operator, entries, rule.parameters, where, f"rules.{place}.", is_inherited))
    notes = [
        note for use in uses for note in (*_check_models(use), *_check_parameters(use, known), *_rescale_note(use))
    ]
    return list(dict.fromkeys(notes))


def _check_parameters(use: _Use, known: Collection[str]) -> list[str]:
    """Check what is given and what is missing; notes on what has no effect."""
    operator, merged = use.operator, use.merged
    everywhere = dict(operator.options) | ({} if operator.weight == "none" else {"weight": WEIGHT})
    for_each = {key: option for key, option in everywhere.items() if option.per_model}
    ignored = _check_level(use, f"{use.prefix}parameters", use.parameters, everywhere, known)
    for entry in use.entries:
        taken = for_each if entry in merged else {}
        own = [] if use.is_inherited else _check_level(use, use.path(entry), entry.parameters, taken, known)
        # Of an entry that is the base, a note says already that it has no effect.
        ignored += own if entry in merged else []
    for entry in merged:
        _check_given(use, entry, everywhere)
    for key, option in operator.options.items():
        if is_required(option) and not option.per_model and key not in dict(use.parameters):
            use.refuse(f"{use.prefix}parameters", f"{operator.name} needs the parameter {key!r}, {_takes(option)}")
    notes = []
    for key in dict.fromkeys(key for key, _ in ignored):
        paths = ", ".join(path for each, path in ignored if each == key)
        hint = "; it is taken from `parameters`, for all models" if key in everywhere else ""
        notes.append(f"The parameter {key} ({paths}) has no effect on {operator.name}{hint}.")
    return notes


def _check_level(
    use: _Use, path: str, parameters: Parameters, taken: Mapping[str, Option], known: Collection[str]
) -> list[tuple[str, str]]:
    """Check one mapping of parameters against the options that may stand there; (key, path) of what has no effect."""
    ignored = []
    for key, value in parameters:
        if key not in known:
            use.refuse(path, f"unknown parameter {key!r}; {suggestion(key, known)}")
        if key in taken:
            _check_value(use, f"{path}.{key}", taken[key], value)
        else:
            ignored.append((key, path))
            _refuse_ranges(use, f"{path}.{key}", value)
    return ignored


def _rescale_note(use: _Use) -> list[str]:
    rescale = use.operator.options.get("rescale")
    if not rescale or rescale.default != "keep" or "rescale" in dict(use.parameters) or use.recipe.compat == "mergekit":
        return []
    return [
        f"{use.operator.name} rescales kept elements by 1/keep probability, as its paper does; "
        "mergekit matches the L1 norm instead: `rescale: l1`."
    ]


def _check_models(use: _Use) -> list[str]:
    """Numbers of models and the need of a base; a note where the base is listed again, or not at all."""
    operator, recipe, path = use.operator, use.recipe, f"{use.prefix}models"
    if operator.base == "required" and recipe.base is None:
        use.refuse(f"{use.prefix}merge_method", f"{operator.name} needs a `base_model`")
    if len(use.merged) < operator.min_models:
        use.refuse(path, f"{operator.name} needs at least {operator.min_models} models, found {len(use.merged)}")
    if operator.max_models is not None and len(use.merged) > operator.max_models:
        use.refuse(path, f"{operator.name} takes at most {operator.max_models} models, found {len(use.merged)}")
    if recipe.base is None:
        return []
    base = recipe.checkpoints[recipe.base].source
    if any(entry not in use.merged for entry in use.entries):
        return [
            f"{base} is the base and has no task vector: its entry among the models has no effect on {operator.name}."
        ]
    is_listed = any(entry.model == recipe.base for entry in use.entries)
    if not is_listed and not use.prefix and all(entry.model != recipe.base for entry in use.merged):
        is_unused = operator.base == "none"
        return [f"{operator.name} merges what `models` lists; {base} gives layout, config and tokenizer."] * is_unused
    return []


def _check_given(use: _Use, entry: Entry, everywhere: Mapping[str, Option]) -> None:
    """Refuse a model without a parameter that the operator cannot do without, or with two that exclude each other."""
    operator = use.operator
    given = {key for key, _ in (*entry.parameters, *use.parameters)}
    if {"epsilon", "window"} <= given & everywhere.keys():
        use.refuse(use.path(entry), "`window` is the full width and `epsilon` the half: give one of them")
    required = {key for key, option in operator.options.items() if option.per_model and is_required(option)}
    for key in sorted(required | ({"weight"} if operator.weight == "required" else set())):
        if key not in given:
            use.refuse(
                use.path(entry), f"{operator.name} needs a {key} for each model; write parameters: {{{key}: ...}}"
            )


def _check_value(use: _Use, path: str, option: Option, value: Value) -> None:
    def check(at: str, leaf: Scalar) -> Scalar:
        try:
            option_value(option, leaf, use.recipe.compat)
        except ValueError as problem:
            use.refuse(at, str(problem))
        return leaf

    cases = [case.value for case in value.cases] if isinstance(value, Filtered) else [value]
    if option.kind != "number" and any(isinstance(case, Gradient) for case in cases):
        use.refuse(path, f"{option.name} takes {_takes(option)}, found a list over layers")
    rewrite_value(path, value, check)


def _refuse_ranges(use: _Use, path: str, value: Value) -> None:
    def check(at: str, leaf: Scalar) -> Scalar:
        if isinstance(leaf, Search):
            use.refuse(at, f"is searched but has no effect on {use.operator.name}; give a number or leave it out")
        return leaf

    rewrite_value(path, value, check)
