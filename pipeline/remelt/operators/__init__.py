"""Merge operators: pure functions on tensors, each declared once, in one explicit table.

Importing this package imports neither torch nor numba. A third party adds an operator by an entry point of the group
`remelt.operators` that resolves to an `Operator` made with `describe`; `load_operators` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from remelt.errors import RecipeError
from remelt.operators.dropout import check_widths, dare_linear, dare_ties, della, della_linear
from remelt.operators.linear import assembly_of_experts, check_sum_of_weights, linear, task_arithmetic
from remelt.operators.sparse import breadcrumbs, breadcrumbs_ties, check_topk, ties
from remelt.operators.spec import Operator, OptionValue, describe
from remelt.operators.spherical import model_stock, nuslerp, slerp

_TABLE = (
    describe(linear, scope="element", base="none", check_coefficients=check_sum_of_weights),
    describe(task_arithmetic, scope="element", base="required"),
    describe(slerp, scope="tensor", base="none", min_models=2, max_models=2, weight="none"),
    describe(nuslerp, scope="tensor", base="optional", min_models=2, max_models=2),
    describe(ties, scope="tensor", base="required", check=check_topk),
    describe(dare_linear, scope="element", base="required", is_random=True),
    describe(dare_ties, scope="element", base="required", is_random=True),
    describe(della, scope="row", base="required", is_random=True, check=check_widths),
    describe(della_linear, scope="row", base="required", is_random=True, check=check_widths),
    describe(breadcrumbs, scope="tensor", base="required"),
    describe(breadcrumbs_ties, scope="tensor", base="required"),
    describe(model_stock, scope="tensor", base="required", min_models=2, weight="none"),
    describe(assembly_of_experts, scope="tensor", base="none", min_models=2, check_coefficients=check_sum_of_weights),
)

OPERATORS: Mapping[str, Operator] = MappingProxyType({operator.name: operator for operator in _TABLE})
"""The operators of this package, by name."""

MERGEKIT_OPTIONS: Mapping[str, Mapping[str, OptionValue]] = MappingProxyType(
    {
        "dare_linear": {"rescale": "l1", "norm_floor": 1e-7},
        "dare_ties": {"rescale": "l1", "norm_floor": 1e-7},
        "della": {"rescale": "l1", "norm_floor": 1e-7},
        "della_linear": {"rescale": "l1", "norm_floor": 1e-7},
        "ties": {"norm_floor": 1e-7},
        "breadcrumbs": {"norm_floor": 1e-7},
        "breadcrumbs_ties": {"norm_floor": 1e-7},
        "model_stock": {"norm_floor": 1e-6},
    }
)
"""What `compat: mergekit` sets where a recipe does not say otherwise, by operator."""

ENTRY_POINT_GROUP = "remelt.operators"


def load_operators() -> dict[str, Operator]:
    """All operators: this package's, then those of installed entry points, which may not take a name that is taken."""
    operators = dict(OPERATORS)
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        operator = point.load()
        if not isinstance(operator, Operator):
            raise RecipeError(
                f"entry point {point.name} = {point.value} of group {ENTRY_POINT_GROUP} is a "
                f"{type(operator).__name__}, not an Operator; make it with remelt.operators.describe"
            )
        if operator.name in operators:
            raise RecipeError(f"entry point {point.value} defines the operator {operator.name}, which exists already")
        operators[operator.name] = operator
    return operators


__all__ = ["ENTRY_POINT_GROUP", "MERGEKIT_OPTIONS", "OPERATORS", "Operator", "describe", "load_operators"]
