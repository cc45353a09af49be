"""From a bound recipe to one treatment for each tensor.

Rules come first (the first match wins); a tensor without one takes the recipe's method. An option's value is looked up
at the model's entry, then in `parameters`, then in the operator's defaults; a filter list that matches nothing falls to
the next level, and a gradient is read at the tensor's layer.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from remelt.errors import RecipeError
from remelt.operators import MERGEKIT_OPTIONS
from remelt.operators.spec import Operator, Option, OptionValue
from remelt.recipe import (
    CopyRule,
    DropRule,
    Entry,
    Filtered,
    Gradient,
    Match,
    MergeRule,
    Parameters,
    Recipe,
    Scalar,
    Value,
)
from remelt.recipe_checks import WEIGHT, installed_operators, is_required, merged_entries, option_value
from remelt.tensor_classes import TensorClass, classify, num_layers
from remelt.treatment import Apply, Copy, Drop, Treatment


def resolve(
    recipe: Recipe,
    names: Sequence[str],
    *,
    num_hidden_layers: int | None = None,
    operators: Mapping[str, Operator] | None = None,
) -> list[Treatment]:
    """One treatment for each tensor of `names`, in their order; equal treatments are one object.

    Args:
        recipe: bound, that is without ranges.
        names: all tensors of the output's layout; layers are counted from them where they are not given.
        num_hidden_layers: of the language model, where the checkpoint's config tells.
        operators: the operators there are; remelt's own and those of installed packages if None.

    Raises:
        RecipeError: for a recipe with ranges, or options that do not go together; names a tensor that has them.
    """
    if not recipe.is_bound:
        variables = ", ".join(variable.name for variable in recipe.variables)
        raise RecipeError(
            f"the recipe has ranges ({variables}): write numbers in their places to merge it, or search them with "
            "`remelt search`"
        )
    operators = installed_operators() if operators is None else operators
    layers = num_layers(names) if num_hidden_layers is None else num_hidden_layers
    own = _Method(recipe, operators[recipe.merge_method], recipe.entries, recipe.parameters, layers)
    matchers = [
        (rule.match, _treatments_of(recipe, place, operators, layers)) for place, rule in enumerate(recipe.rules)
    ]
    treatments: list[Treatment] = []
    for name in names:
        found = classify(name, layers)
        method = next((method for match, method in matchers if matches(match, name, found)), own)
        treatments.append(method.treatment(name, found.layer) if isinstance(method, _Method) else method)
    return treatments


def find_unused(recipe: Recipe, names: Sequence[str], *, num_hidden_layers: int | None = None) -> list[str]:
    """A sentence for each rule and each filter of the recipe that fits no tensor: often a name that is misspelt."""
    layers = num_layers(names) if num_hidden_layers is None else num_hidden_layers
    found = {name: classify(name, layers) for name in names} if recipe.rules else {}
    unused = [
        f"rule {place} of the recipe, {_match_text(rule.match)}, matches no tensor"
        for place, rule in enumerate(recipe.rules, 1)
        if not any(matches(rule.match, name, kind) for name, kind in found.items())
    ]
    merge_rules = [rule for rule in recipe.rules if isinstance(rule, MergeRule)]
    entries = [*recipe.entries, *(entry for rule in merge_rules for entry in rule.entries or ())]
    tables = [recipe.parameters, *(entry.parameters for entry in entries), *(rule.parameters for rule in merge_rules)]
    patterns = {
        case.pattern: key
        for table in tables
        for key, value in table
        if isinstance(value, Filtered)
        for case in value.cases
        if case.pattern is not None
    }
    unused += [
        f"filter {pattern!r} of {key} is in no tensor's name"
        for pattern, key in patterns.items()
        if not any(pattern in name for name in names)
    ]
    return unused


def _match_text(match: Match) -> str:
    parts = {
        "class": ", ".join(match.classes),
        "layers": "" if match.layers is None else f"{match.layers[0]} to {match.layers[1]}",
        "name": match.name or "",
    }
    return ", ".join(f"{key} {text}" for key, text in parts.items() if text)


def matches(match: Match, name: str, tensor_class: TensorClass) -> bool:
    """Whether a rule's match holds for a tensor: class, layers and glob, as far as they are given."""
    if match.classes and tensor_class.kind not in match.classes:
        return False
    if match.layers is not None:
        first, last = match.layers
        if tensor_class.layer is None or not first <= tensor_class.layer <= last:
            return False
    return match.name is None or _glob(match.name).match(name) is not None


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def _treatments_of(recipe: Recipe, place: int, operators: Mapping[str, Operator], layers: int) -> Copy | Drop | _Method:
    rule = recipe.rules[place]
    if isinstance(rule, CopyRule):
        return Copy(rule.model)
    if isinstance(rule, DropRule):
        return Drop(place)
    operator = operators[rule.merge_method]
    if rule.entries is not None:
        return _Method(recipe, operator, rule.entries, rule.parameters, layers)
    return _Method(recipe, operator, recipe.entries, rule.parameters, layers, is_entry_first=False)


class _Method:
    """An operator with its models and parameters, ready to be asked for tensor after tensor.

    Tensors of the same filter matches and the same position in the layers share a treatment, so the work is done once
    for each such pair, not for each of a hundred thousand names.
    """

    def __init__(
        self,
        recipe: Recipe,
        operator: Operator,
        entries: Sequence[Entry],
        parameters: Parameters,
        layers: int,
        *,
        is_entry_first: bool = True,
    ) -> None:
        self.recipe = recipe
        self.operator = operator
        self.layers = layers
        merged = merged_entries(operator, recipe.base, entries)
        self.models = tuple(entry.model for entry in merged)
        shared = dict(parameters)
        self.levels_K = [
            [dict(entry.parameters), shared] if is_entry_first else [shared, dict(entry.parameters)] for entry in merged
        ]
        self.shared = [shared]
        used = [value for levels in (*self.levels_K, self.shared) for level in levels for value in level.values()]
        cases = [case for value in used if isinstance(value, Filtered) for case in value.cases]
        self.patterns = tuple({case.pattern for case in cases if case.pattern is not None})
        self.has_gradient = any(isinstance(value, Gradient) for value in (*used, *(case.value for case in cases)))
        self.defaults: Mapping[str, OptionValue] = {}
        if recipe.compat == "mergekit":
            self.defaults = MERGEKIT_OPTIONS.get(operator.name, {})
        self.cache: dict[tuple[tuple[bool, ...], float], Treatment] = {}

    def treatment(self, name: str, layer: int | None) -> Treatment:
        """The treatment of the tensor `name`, which stands in `layer`."""
        hits = tuple([pattern in name for pattern in self.patterns])
        position = layer_position(layer, self.layers) if self.has_gradient else 0.0
        key = (hits, position)
        if key not in self.cache:
            self.cache[key] = self._apply(name, position)
        return self.cache[key]

    def _apply(self, name: str, position: float) -> Apply:
        operator = self.operator
        options: dict[str, OptionValue] = {}
        for key, option in operator.options.items():
            if option.per_model:
                options[key] = self._numbers(option, name, position)
            else:
                options[key] = self._value(self.shared, option, name, position)
        coefficients = tuple(1.0 for _ in self.models)
        if operator.weight != "none":
            coefficients = self._numbers(WEIGHT, name, position)
        if problem := operator.check_options(options) or operator.check_coefficients(coefficients, options):
            raise RecipeError(f"tensor {name}: {operator.name}: {problem}")
        base = None if operator.base == "none" else self.recipe.base
        return Apply(operator.name, base, self.models, coefficients, tuple(sorted(options.items())))

    def _numbers(self, option: Option, name: str, position: float) -> tuple[float, ...]:
        values = [self._value(levels, option, name, position) for levels in self.levels_K]
        return tuple(float(value) for value in values if not isinstance(value, tuple))

    def _value(self, levels: Sequence[Mapping[str, Value]], option: Option, name: str, position: float) -> OptionValue:
        for level in levels:
            if option.name in level:
                scalar = scalar_at(level[option.name], name, position)
                if scalar is not None:
                    try:
                        return option_value(option, scalar, self.recipe.compat)
                    except ValueError as problem:
                        raise RecipeError(f"tensor {name}: {self.operator.name}: {problem}") from problem
        if is_required(option) or (option is WEIGHT and self.operator.weight == "required"):
            raise RecipeError(
                f"tensor {name}: {self.operator.name} needs {option.name!r}, and no filter of it matches this tensor; "
                "end the list with a value for all others: {filter: '*', value: ...}"
            )
        return self.defaults.get(option.name, option.default)


def layer_position(layer: int | None, layers: int) -> float:
    """Where a gradient is read: layer / (layers - 1), and 0 for tensors outside the layers."""
    if layer is None or layers < 2 or layer >= layers:
        return 0.0
    return layer / (layers - 1)


def scalar_at(value: Value, name: str, position: float) -> Scalar | None:
    """A parameter's value for the tensor `name` at a position in [0, 1]; None where no filter matches."""
    if isinstance(value, Filtered):
        for pattern, inner in value.cases:
            if pattern is None or pattern in name:
                return scalar_at(inner, name, position)
        return None
    return _interpolate(value, position) if isinstance(value, Gradient) else value


def _interpolate(gradient: Gradient, position: float) -> float:
    """Piecewise linear between anchors that stand evenly over [0, 1]."""
    anchors = [float(anchor) for anchor in gradient.anchors if isinstance(anchor, float)]
    scaled = position * (len(anchors) - 1)
    left = min(int(scaled), len(anchors) - 1)
    low, high = anchors[left], anchors[min(left + 1, len(anchors) - 1)]
    fraction = scaled - left
    between = (1.0 - fraction) * low + fraction * high
    # Rounding must not carry an option past its anchors, which lie in its interval.
    return min(max(between, min(low, high)), max(low, high))
