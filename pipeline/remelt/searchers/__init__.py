"""Searchers: what to try next. Pure ask and tell; the study, its journal and its trials are elsewhere.

To add one, write a module with a class that follows `spec.Searcher` and takes (space, seed, *, options), and give it a
row here: it then passes through `tests/conformance/test_searchers.py`, as every row does. Others add theirs under the
entry point group `remelt.searchers`; the table's own come first.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from remelt.errors import RecipeError
from remelt.searchers.cma_es import CmaEs
from remelt.searchers.gaussian_process import GaussianProcess
from remelt.searchers.greedy_soup import GreedySoup
from remelt.searchers.grid import Grid
from remelt.searchers.lcsc import Lcsc
from remelt.searchers.map_front import MapFront
from remelt.searchers.nsga3 import Nsga3
from remelt.searchers.random_search import RandomSearch
from remelt.searchers.spec import Reporting, Searcher, SearchSpace, Trial, TrialState
from remelt.searchers.tpe import ParzenEstimator

__all__ = [
    "SEARCHERS",
    "SearchSpace",
    "Searcher",
    "Trial",
    "TrialState",
    "build_searcher",
    "needs_objectives",
    "needs_simplex",
    "searcher_options",
    "searcher_report",
]

SEARCHERS: Mapping[str, type[Any]] = {
    "cmaes": CmaEs,
    "gp": GaussianProcess,
    "tpe": ParzenEstimator,
    "nsga3": Nsga3,
    "map": MapFront,
    "lcsc": Lcsc,
    "greedy_soup": GreedySoup,
    "grid": Grid,
    "random": RandomSearch,
}
"""Name in a study file -> class."""

ENTRY_POINTS = "remelt.searchers"


def searcher_options(name: str) -> dict[str, Any]:
    """The options of a searcher with their defaults: the keyword-only parameters of its class.

    Raises:
        RecipeError: No searcher has this name.
    """
    parameters = inspect.signature(_find(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def needs_objectives(name: str) -> bool:
    """Whether a searcher works on several objectives, `Trial.objectives`, and is no use with one.

    Raises:
        RecipeError: No searcher has this name.
    """
    return bool(getattr(_find(name), "needs_objectives", False))


def needs_simplex(name: str) -> bool:
    """Whether a searcher works on simplex groups of weights, and refuses a space without one.

    Raises:
        RecipeError: No searcher has this name.
    """
    return bool(getattr(_find(name), "needs_simplex", False))


def searcher_report(searcher: Searcher, seen: Sequence[Trial]) -> Mapping[str, Any]:
    """What a searcher has learned, as JSON values: fit errors of a surrogate, say. Empty where it tells nothing."""
    return searcher.report(seen) if isinstance(searcher, Reporting) else {}


def build_searcher(name: str, space: SearchSpace, seed: int, options: Mapping[str, Any] | None = None) -> Searcher:
    """The searcher `name` of the table, with its options checked.

    Raises:
        RecipeError: The name or an option is unknown, or an option is out of its interval.
    """
    known = searcher_options(name)
    for option, value in (options or {}).items():
        if option not in known:
            takes = ", ".join(known) or "none"
            raise RecipeError(f"searcher {name} has no option {option!r}{_nearest(option, known)}; it takes {takes}")
        if isinstance(known[option], str):
            if not isinstance(value, str):
                raise RecipeError(f"searcher {name}: option {option!r} is {value!r}; it must be a word")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"searcher {name}: option {option!r} is {value!r}; it must be a number")
    searcher: Searcher = _find(name)(space, seed, **(options or {}))
    return searcher


def _find(name: str) -> type[Any]:
    if name in SEARCHERS:
        return SEARCHERS[name]
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=ENTRY_POINTS, name=name):
        found: type[Any] = entry_point.load()
        return found
    raise RecipeError(f"unknown searcher {name!r}{_nearest(name, SEARCHERS)}; known: {', '.join(SEARCHERS)}")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, known, 1, 0.4)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
