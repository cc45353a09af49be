"""Greedy soups: parents added one by one, best first, each kept where it helps.

Wortsman et al., "Model soups" (arXiv 2203.05482), recipe 1. The paper accepts a parent when the score is no worse; its
code (mlfoundations/model-soups) when it is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

from remelt.errors import RecipeError
from remelt.searchers.options import choice
from remelt.searchers.random_search import generator
from remelt.searchers.spec import SearchSpace, Trial, TrialState

ACCEPTANCES = ("strict", "paper")

MOST_GUESSES = 500
"""Ways in which running trials may end that one ask looks at."""

SAME = 1e-9

Soup: TypeAlias = tuple[int, ...]
"""How often each parent is in it; divided by their sum these are its coefficients."""


class _Walk(NamedTuple):
    """How far the procedure has come on one way through it."""

    order: tuple[int, ...]
    """Parents with a score, best first."""
    soup: Soup
    score: float | None
    """None where the soup was not scored yet."""
    turn: int = 1
    """Parents tried so far, pass after pass; the first of the first pass is what the soup begins with."""
    has_gained: bool = False
    """Whether this pass added one."""


class GreedySoup:
    """The procedure of the paper on simplex groups of weights, with one answer for trials that still run.

    The single parents are ranked by their scores, which a study takes first; those that no start stands for are asked
    for. The soup begins as the best parent. Each further parent, best first, is added with equal weight and stays if
    the score is better (`strict`) or no worse (`paper`). A failed or stopped trial adds nothing.

    Every step depends on the one before, so evaluators that are free while a step runs get the next step for the case
    that this one is rejected, then for the case that it is accepted. What the guess missed was evaluated in vain.

    When every parent had its turn, further passes begin, in which parents may be added again (with replacement:
    Caruana et al., ICML 2004), always with `strict`. When a pass adds nothing, asks are random soups. `report` says
    how far it is.

    With several groups (a coefficient for each layer group, say) the k-th names of all groups are one parent. Variables
    outside of groups keep their starting values.

    Args:
        space: The search space; its groups are of one size, their intervals hold 0 and 1.
        seed: The study's seed; only the random soups at the end depend on it.
        acceptance: `strict` or `paper`.

    Raises:
        RecipeError: The option is no such word, or the space has no such simplex group.
    """

    needs_simplex: ClassVar[bool] = True

    def __init__(self, space: SearchSpace, seed: int, *, acceptance: str = "strict") -> None:
        _check_space(space)
        self.space = space
        self.seed = seed
        self.acceptance = choice("greedy_soup", "acceptance", acceptance, ACCEPTANCES)
        self.num_parents = len(space.simplex[0])
        grouped = {name for group in space.simplex for name in group}
        self._fixed = {variable.name: variable.init for variable in space.variables if variable.name not in grouped}

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """The next soup; see `remelt.searchers.spec.Searcher`."""
        # Usually none: a study asks for one trial at a time, and sees those that it asked for.
        num_ahead = max(0, number - len(seen))
        soup = next(itertools.islice(self._wanted(self._known(seen)), num_ahead, None), None)
        if soup is None:
            return self._values(generator(self.seed, number).dirichlet([1.0] * self.num_parents).tolist())
        return self._values(_coefficients(soup))

    def report(self, seen: Sequence[Trial]) -> Mapping[str, Any]:
        """The soup so far with its score, and whether a whole pass added nothing to it."""
        known = self._known(seen)
        walk = self._begin(known)
        while walk is not None and (tried := self._next_step(walk)) is not None:
            outcomes = self._outcomes(*tried, known.get(_key(tried[1])))
            if len(outcomes) > 1:
                break
            walk = outcomes[0]
        counts = () if walk is None else zip(self.space.simplex[0], walk.soup, strict=True)
        return {
            "soup": {name: count for name, count in counts if count},
            "score": None if walk is None else walk.score,
            "is_finished": next(self._wanted(known), None) is None,
        }

    def _wanted(self, known: Mapping[tuple[float, ...], Trial]) -> Iterator[Soup]:
        """Soups that nobody has asked for yet, the likeliest to be needed first."""
        given = set(known)
        for k in range(self.num_parents):
            if _key(self._single(k)) not in given:
                given.add(_key(self._single(k)))
                yield self._single(k)
        begin = self._begin(known)
        ways = [] if begin is None else [begin]
        num_guesses = 0
        while ways and num_guesses < MOST_GUESSES:
            walk = ways.pop(0)
            step = self._next_step(walk)
            if step is None:
                continue
            if _key(step[1]) not in given:
                given.add(_key(step[1]))
                yield step[1]
            outcomes = self._outcomes(*step, known.get(_key(step[1])))
            num_guesses += len(outcomes) - 1
            ways = outcomes + ways if len(outcomes) == 1 else ways + outcomes

    def _begin(self, known: Mapping[tuple[float, ...], Trial]) -> _Walk | None:
        """The best parent; of equals the first. None where no parent has a score."""
        scores = {k: known[key].score for k in range(self.num_parents) if (key := _key(self._single(k))) in known}
        ranked = sorted((-score, k) for k, score in scores.items() if score is not None)
        if not ranked:
            return None
        order = tuple(k for _, k in ranked)
        return _Walk(order, self._single(order[0]), -ranked[0][0])

    def _next_step(self, walk: _Walk) -> tuple[_Walk, Soup] | None:
        """The next soup to compare, past turns that change nothing; None when a pass has added nothing."""
        while True:
            if walk.turn % len(walk.order) == 0:
                if not walk.has_gained:
                    return None
                walk = walk._replace(has_gained=False)
            k = walk.order[walk.turn % len(walk.order)]
            tried = tuple(count + (place == k) for place, count in enumerate(walk.soup))
            if _key(tried) != _key(walk.soup):
                return walk, tried
            walk = walk._replace(turn=walk.turn + 1)

    def _outcomes(self, walk: _Walk, tried: Soup, trial: Trial | None) -> list[_Walk]:
        """How a step ends: one way where that is known, else rejected and accepted."""
        rejected = walk._replace(turn=walk.turn + 1)
        if trial is not None and trial.state in (TrialState.FAILED, TrialState.STOPPED):
            return [rejected]
        score = None if trial is None else trial.score
        accepted = walk._replace(soup=tried, score=score, turn=walk.turn + 1, has_gained=True)
        if score is None or walk.score is None:
            return [rejected, accepted]
        is_first_pass = walk.turn < len(walk.order)
        accepts_equal = self.acceptance == "paper" and is_first_pass
        return [accepted if score > walk.score or (accepts_equal and score == walk.score) else rejected]

    def _known(self, seen: Sequence[Trial]) -> dict[tuple[float, ...], Trial]:
        """Trials by their coefficients, those that are soups of parents at the starting values of all else."""
        known: dict[tuple[float, ...], Trial] = {}
        for trial in seen:
            values = trial.values or (self.space.values(trial.point) if trial.point else {})
            if any(abs(values.get(name, math.inf) - start) > SAME for name, start in self._fixed.items()):
                continue
            found = [tuple(values.get(name, math.nan) for name in group) for group in self.space.simplex]
            key = _rounded(found[0])
            if all(_rounded(each) == key for each in found[1:]) and (key not in known or trial.score is not None):
                known[key] = trial
        return known

    def _single(self, k: int) -> Soup:
        return tuple(int(place == k) for place in range(self.num_parents))

    def _values(self, coefficients: Sequence[float]) -> dict[str, float]:
        shares = {name: share for group in self.space.simplex for name, share in zip(group, coefficients, strict=True)}
        return {variable.name: (shares | self._fixed)[variable.name] for variable in self.space.variables}


def _check_space(space: SearchSpace) -> None:
    if not space.simplex:
        raise RecipeError(
            "searcher greedy_soup averages parents, so their weights must sum to one: name them in the recipe under "
            "`constraints: {simplex: [...]}`, or choose another searcher"
        )
    if len({len(group) for group in space.simplex}) > 1:
        raise RecipeError(
            f"searcher greedy_soup takes the k-th name of every simplex group as one parent, but the groups have "
            f"{', '.join(str(len(group)) for group in space.simplex)} names; give all of them the same parents"
        )
    grouped = {name for group in space.simplex for name in group}
    for variable in space.variables:
        if variable.name in grouped and not (variable.low <= 0 and variable.high >= 1):
            raise RecipeError(
                f"searcher greedy_soup leaves parents out and begins with one alone, but {variable.name!r} lies in "
                f"[{variable.low:g}, {variable.high:g}]; give it the range [0, 1]"
            )


def _coefficients(soup: Soup) -> tuple[float, ...]:
    return tuple(count / sum(soup) for count in soup)


def _key(soup: Soup) -> tuple[float, ...]:
    return _rounded(_coefficients(soup))


def _rounded(coefficients: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(coefficient, 9) + 0.0 for coefficient in coefficients)
