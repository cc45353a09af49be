"""Checks of searchers' options, with one wording for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from remelt.errors import RecipeError


def whole_number(searcher: str, option: str, value: float, low: int, high: int) -> int:
    """A whole number in [low, high].

    Raises:
        RecipeError: It is none.
    """
    if not low <= value <= high or value != int(value):
        raise RecipeError(f"searcher {searcher}: {option} is {value:g}; it must be a whole number from {low} to {high}")
    return int(value)


def number_above(searcher: str, option: str, value: float, low: float, high: float) -> float:
    """A number in (low, high].

    Raises:
        RecipeError: It is none.
    """
    if not low < value <= high:
        raise RecipeError(f"searcher {searcher}: {option} is {value:g}; it must lie in ({low:g}, {high:g}]")
    return float(value)


def number_between(searcher: str, option: str, value: float, low: float, high: float) -> float:
    """A number in [low, high].

    Raises:
        RecipeError: It is none.
    """
    if not low <= value <= high:
        raise RecipeError(f"searcher {searcher}: {option} is {value:g}; it must lie in [{low:g}, {high:g}]")
    return float(value)


def choice(searcher: str, option: str, value: str, choices: Sequence[str]) -> str:
    """One of several words.

    Raises:
        RecipeError: It is none of them.
    """
    if value not in choices:
        raise RecipeError(f"searcher {searcher}: {option} is {value!r}; it must be one of {', '.join(choices)}")
    return value
