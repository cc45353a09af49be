"""What an operator declares of itself: options with intervals, scope, and its need of a base.

An operator is a pure function `(base, tensors_K, coefficients_K, *, options) -> tensor`. Its keyword-only parameters
are its options, each annotated with its interval or choices:

    @operator(scope="tensor", base="required")
    def ties(
        base: Tensor,
        tensors_K: Sequence[Tensor],
        coefficients_K: Sequence[float],
        *,
        density: Annotated[PerModel, Interval(0, 1, open_low=True)] = 1.0,
        normalize: bool = True,
        lambda_: Annotated[float, Interval()] = 1.0,
        topk: Literal["tensor", "global"] = "tensor",
    ) -> Tensor: ...

That one declaration validates recipes, makes the table in the README, and bounds the search. A trailing underscore is
dropped from the recipe's key (`lambda_` is `lambda`). `Annotated[PerModel, ...]` marks an option that recipes may give
for each model; the function takes a number for all or a sequence of K.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

PerModel: TypeAlias = "float | tuple[float, ...]"
"""A number for all models, or one for each."""

Scope: TypeAlias = Literal["element", "row", "tensor", "matrix"]
"""What an output element depends on: its own position in each parent, its row, its tensor, or a whole matrix."""

OptionValue: TypeAlias = "float | bool | str | tuple[float, ...]"


@dataclass(frozen=True, slots=True)
class Interval:
    """The numbers that an option takes: [low, high], open at an end where said."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an operator."""

    name: str
    """The recipe's key."""
    kind: Literal["number", "bool", "choice"]
    default: float | bool | str
    interval: Interval | None = None
    choices: tuple[str, ...] = ()
    per_model: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """A merge function with all that the recipe, the planner and the executors ask of it."""

    name: str
    version: int
    """Part of every unit id: raised when the same call gives other bytes."""
    function: Callable[..., Any]
    """The pure torch function; the oracle of the CPU kernels, and what a CUDA device runs."""
    scope: Scope
    base: Literal["required", "optional", "none"]
    """`none` means that a base is an ordinary model to it."""
    min_models: int
    max_models: int | None
    weight: Literal["required", "optional", "none"]
    is_random: bool
    options: Mapping[str, Option]
    """By the recipe's key."""
    summary: str
    option_check: Callable[[Mapping[str, OptionValue]], str | None] | None = None
    coefficient_check: Callable[[Sequence[float], Mapping[str, OptionValue]], str | None] | None = None

    def keyword(self, option: str) -> str:
        """The function's own name for an option: with a trailing underscore where the key is a word of Python."""
        return f"{option}_" if iskeyword(option) else option

    def check_options(self, options: Mapping[str, OptionValue]) -> str | None:
        """A sentence on what is wrong between options (each one's own interval is checked elsewhere), or None."""
        return self.option_check(options) if self.option_check else None

    def check_coefficients(self, coefficients_K: Sequence[float], options: Mapping[str, OptionValue]) -> str | None:
        """A sentence on what is wrong with the resolved coefficients of one tensor, or None."""
        return self.coefficient_check(coefficients_K, options) if self.coefficient_check else None


def _option(parameter: inspect.Parameter, namespace: dict[str, Any]) -> Option:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        # Evaluated one by one so that the tensor annotations, which would import torch, stay unevaluated.
        annotation = eval(annotation, namespace)
    name = parameter.name.rstrip("_")
    if annotation is bool:
        return Option(name, "bool", parameter.default)
    if get_origin(annotation) is Literal:
        return Option(name, "choice", parameter.default, choices=get_args(annotation))
    if get_origin(annotation) is Annotated:
        kind, interval = get_args(annotation)
        per_model = kind is not float
        return Option(name, "number", parameter.default, interval=interval, per_model=per_model)
    raise TypeError(f"option {name}: annotate it as bool, Literal[...] or Annotated[float, Interval(...)]")


def describe(
    function: Callable[..., Any],
    *,
    scope: Scope,
    base: Literal["required", "optional", "none"],
    version: int = 1,
    min_models: int = 1,
    max_models: int | None = None,
    weight: Literal["required", "optional", "none"] = "required",
    is_random: bool = False,
    check: Callable[[Mapping[str, OptionValue]], str | None] | None = None,
    check_coefficients: Callable[[Sequence[float], Mapping[str, OptionValue]], str | None] | None = None,
) -> Operator:
    """Make an `Operator` of a function, its options read from the keyword-only parameters.

    Parameters named `draws` (the source of randomness) are arguments, not options. `check` and `check_coefficients`
    return a sentence on what is wrong between resolved options or coefficients, or None.
    """
    parameters = inspect.signature(function).parameters.values()
    options = [
        _option(parameter, function.__globals__)
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "draws"
    ]
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    return Operator(
        function.__name__,
        version,
        function,
        scope,
        base,
        min_models,
        max_models,
        weight,
        is_random,
        {option.name: option for option in options},
        summary,
        check,
        check_coefficients,
    )
