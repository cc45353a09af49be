"""What happens to one tensor: merged by an operator, copied, or dropped by an explicit rule.

A recipe resolves to one treatment for each tensor name. Treatments are canonical as JSON and enter the unit ids, so
they hold resolved numbers only: no gradients, no filters, no search ranges. Models are named by their place in
`Recipe.checkpoints`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from remelt.operators.spec import OptionValue


class Apply(NamedTuple):
    """Merge with an operator."""

    operator: str
    base: int | None
    """Place of the base in `Recipe.checkpoints`, or None where the operator takes none."""
    models: tuple[int, ...]
    """Places of the K merged checkpoints, in recipe order."""
    coefficients: tuple[float, ...]
    """One for each model: the recipe's `weight`; all 1.0 for an operator without weights."""
    options: tuple[tuple[str, OptionValue], ...]
    """Every option of the operator, sorted by name; a per-model option is a tuple of K."""


class Copy(NamedTuple):
    """Copy bit for bit, with its scales where it has them."""

    model: int


class Drop(NamedTuple):
    """Leave out of the output, by an explicit rule."""

    rule: int
    """Place of the rule in the recipe."""


Treatment: TypeAlias = Apply | Copy | Drop
