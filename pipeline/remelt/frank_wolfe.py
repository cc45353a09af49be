"""Frank-Wolfe over a pool of checkpoints: oracle, directions, steps, duality gap, and the loop that ties them together.

The feasible set is the convex hull of V vertices (the checkpoints of a pool), one hull for each of B blocks of tensors:
the whole model, each layer, or each tensor. An iterate is its coefficients, a matrix (B, V) whose rows are at least 0
and sum to 1, so that every iterate is a recipe. What a step needs of the loss is its value and, for each block, the
inner products of its gradient with the vertices; where these come from is the `Problem`'s business.

Sources: Frank and Wolfe 1956; Jaggi 2013 (gap, rates); Lacoste-Julien and Jaggi 2015 (away steps, pairwise);
FW-Merging, arXiv 2503.12649 (vertices are checkpoints). Where those leave a choice, docs/selection.md says what was
chosen.

Shape suffixes: B blocks, V vertices, S vertices of a soft step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from remelt.errors import RecipeError
from remelt.oracle import Matrix

Variant: TypeAlias = Literal["vanilla", "away", "pairwise"]
StepRule: TypeAlias = Literal["open_loop", "line_search"]

VARIANTS: tuple[Variant, ...] = ("vanilla", "away", "pairwise")
STEP_RULES: tuple[StepRule, ...] = ("open_loop", "line_search")

SUFFICIENT = 1e-4
"""Armijo's constant: the share of the decrease promised by the slope that a line search asks for at least."""
SHRINK = 0.5
"""A line search's third try and later ones are at most this share of the one before."""
SHRINK_BROKEN = 0.1
"""The same after a loss that is no number."""


class Evaluation(NamedTuple):
    """The loss at an iterate, and its gradient as the vertices see it."""

    loss: float
    products_BV: Matrix
    scores_BV: Matrix
    """The oracle's; the products themselves for `inner`."""


class Problem(Protocol):
    """A loss over coefficient matrices. Both are functions: the same coefficients give the same answer."""

    def evaluate(self, coefficients_BV: Matrix) -> Evaluation:
        """The loss and one gradient."""
        ...

    def loss(self, coefficients_BV: Matrix) -> float:
        """The loss alone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to walk.

    Raises:
        RecipeError: Values out of range, or a soft step of another variant than vanilla.
    """

    variant: Variant = "pairwise"
    step: StepRule = "line_search"
    scale: float = 1.0
    """In (0, 1]. The open loop's step is scale x 2 / (t + 2); a line search goes no further than scale x the farthest
    edge."""
    soft_vertices: int | None = None
    """None for hard steps, to one vertex; else the number of vertices of a soft step."""
    soft_steps: int = 3
    """Projected gradient steps on the coefficients of a soft step; each after the first costs a gradient."""
    search_losses: int = 4
    """Losses that a line search may measure."""
    iterations: int = 10
    """Steps at most."""
    gap_tolerance: float = 0.0
    """Stop where the duality gap is no larger: on a convex loss, that is how far the optimum may still be below."""
    min_gain: float = 0.0
    patience: int = 3
    """Stop after so many steps in a row that do not lower the least loss by more than `min_gain`."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise RecipeError(f"step scale {self.scale:g} is outside (0, 1]: iterates would leave the hull of the pool")
        if self.soft_vertices is not None and self.variant != "vanilla":
            raise RecipeError(
                f"soft steps move towards several vertices at once and know no {self.variant} steps; use vanilla"
            )
        for name, value, low in (
            ("iterations", self.iterations, 1),
            ("patience", self.patience, 1),
            ("search_losses", self.search_losses, 1),
            ("soft_steps", self.soft_steps, 1),
            ("soft_vertices", self.soft_vertices or 1, 1),
        ):
            if value < low:
                raise RecipeError(f"{name} is {value}; give {low} or more")


class Direction(NamedTuple):
    """Where each block goes, in coefficients."""

    kinds_B: tuple[str, ...]
    """`toward` the oracle's vertex, `away` from the worst active one, `pairwise` from the one to the other, `stay`."""
    moves_BV: Matrix
    """Rows sum to 0."""
    limits_B: Matrix
    """The largest step inside the hull; 0 for a block that stays."""
    slopes_B: Matrix
    """Derivative of the loss along the move; below 0 downhill."""


def duality_gaps(products_BV: Matrix, coefficients_BV: Matrix) -> Matrix:
    """<g, x - s> of each block, s the vertex of the least inner product; at least 0 up to rounding.

    Their sum bounds loss - least loss over the hull, where the loss is convex (Jaggi 2013, section 2).
    """
    at_iterate_B = np.array([math.fsum(row) for row in products_BV * coefficients_BV])
    gaps_B: Matrix = np.maximum(at_iterate_B - products_BV.min(axis=1), 0.0)
    return gaps_B


def minimise(scores_BV: Matrix) -> NDArray[np.int64]:
    """The linear minimisation oracle: each block's vertex of the least score; the first of several."""
    places_B: NDArray[np.int64] = np.argmin(scores_BV, axis=1)
    return places_B


def find_direction(variant: Variant, found: Evaluation, coefficients_BV: Matrix) -> Direction:
    """Each block's direction by its own vertices: the hulls of blocks are independent of each other."""
    rows = [
        _find_move(variant, scores_V, products_V, coefficients_V)
        for scores_V, products_V, coefficients_V in zip(
            found.scores_BV, found.products_BV, coefficients_BV, strict=True
        )
    ]
    kinds, moves, limits = zip(*rows, strict=True)
    moves_BV = np.array(moves)
    slopes_B = np.array([math.fsum(row) for row in moves_BV * found.products_BV])
    return Direction(kinds, moves_BV, np.array(limits), slopes_B)


def _find_move(
    variant: Variant, scores_V: Matrix, products_V: Matrix, coefficients_V: Matrix
) -> tuple[str, Matrix, float]:
    toward = int(np.argmin(scores_V))
    active = np.flatnonzero(coefficients_V > 0)
    away = int(active[np.argmax(scores_V[active])])
    # A block without gradient, or whose vertices are all one to it, has nowhere to go.
    if scores_V[toward] == scores_V[away] or (variant == "vanilla" and coefficients_V[toward] == 1.0):
        return "stay", np.zeros(len(scores_V)), 0.0
    target_V, worst_V = np.zeros(len(scores_V)), np.zeros(len(scores_V))
    target_V[toward], worst_V[away] = 1.0, 1.0
    if variant == "pairwise":
        return "pairwise", target_V - worst_V, float(coefficients_V[away])
    share = float(coefficients_V[away])
    forward_V, backward_V = target_V - coefficients_V, coefficients_V - worst_V
    if variant == "vanilla" or share == 1.0 or products_V @ forward_V <= products_V @ backward_V:
        return "toward", forward_V, 1.0
    return "away", backward_V, share / (1.0 - share)


def take_step(coefficients_BV: Matrix, direction: Direction, steps_B: Matrix) -> Matrix:
    """The coefficients after the step: at least 0, each row's sum 1. A step to the edge drops its vertex entirely."""
    moved_BV = coefficients_BV + steps_B[:, None] * direction.moves_BV
    at_edge_B = (steps_B > 0) & (steps_B >= direction.limits_B)
    # What reaches the edge is 0 but for rounding: below a millionth of a millionth of a row that sums to 1.
    moved_BV[at_edge_B[:, None] & (np.abs(moved_BV) < 1e-12)] = 0.0
    return normalise(np.maximum(moved_BV, 0.0))


def normalise(coefficients_BV: Matrix) -> Matrix:
    """Rows divided by their sums, which rounding has moved from 1."""
    sums_B = np.array([math.fsum(row) for row in coefficients_BV])
    normalised_BV: Matrix = coefficients_BV / sums_B[:, None]
    return normalised_BV


def open_loop(number: int, scale: float = 1.0) -> float:
    """scale x 2 / (t + 2), the step that needs no loss (Jaggi 2013, algorithm 1); t counts from 0."""
    return scale * 2.0 / (number + 2.0)


class LineSearch(NamedTuple):
    """Where a search along a line ended."""

    step: float
    """In [0, 1]; 0 where nothing better was found."""
    loss: float


def search_line(loss_at: Callable[[float], float], loss: float, slope: float, *, num_losses: int) -> LineSearch:
    """The best step in [0, 1] found with at most `num_losses` losses, by parabolas through the start and its slope.

    A quadratic loss takes two: one at the edge, one at its exact minimum (one, where that lies at the edge or beyond).
    """
    best = LineSearch(0.0, loss)
    if not slope < 0:
        return best
    step = 1.0
    for _ in range(num_losses):
        found = loss_at(step)
        if found < best.loss:
            best = LineSearch(step, found)
        if not math.isfinite(found):
            step *= SHRINK_BROKEN
            continue
        curvature = (found - loss - slope * step) / step**2
        wanted = -slope / (2.0 * curvature) if curvature > 0 else step
        is_enough = found <= loss + SUFFICIENT * slope * step
        if wanted >= step or (is_enough and step < 1.0):
            break
        step = wanted if step == 1.0 else min(wanted, SHRINK * step)
    return best


def project(rows: Matrix) -> Matrix:
    """Each row's nearest point with entries at least 0 and a sum of at most 1 (Duchi et al. 2008, figure 1)."""
    projected = np.maximum(rows, 0.0)
    for place, row in enumerate(rows):
        if math.fsum(projected[place]) <= 1.0:
            continue
        falling = np.sort(row)[::-1]
        excess = (np.cumsum(falling) - 1.0) / np.arange(1, len(row) + 1)
        kept = int(np.flatnonzero(falling > excess)[-1])
        projected[place] = np.maximum(row - excess[kept], 0.0)
    return projected


@dataclass(frozen=True, slots=True)
class Iterate:
    """One point of the walk, and the step that left it."""

    number: int
    coefficients_BV: Matrix
    loss: float
    gap: float
    """Sum of the blocks' duality gaps."""
    targets_B: tuple[int, ...]
    """The oracle's vertex of each block."""
    kinds_B: tuple[str, ...]
    steps_B: tuple[float, ...]
    """How far each block went from here; zeros at the end of the walk."""
    stopped: str | None = None
    """Why the walk ended here: `gap`, `iterations` or `no gain`."""


def walk(problem: Problem, start_BV: Matrix, options: Options) -> Iterator[Iterate]:
    """Frank-Wolfe from `start_BV`, one iterate at a time; the last one says why it is the last.

    The walk is a function of what the problem answers, so one that is run again over the same answers is the same.
    """
    coefficients_BV, least, num_stale = normalise(start_BV), math.inf, 0
    number = 0
    while True:
        found = problem.evaluate(coefficients_BV)
        gap = math.fsum(duality_gaps(found.products_BV, coefficients_BV))
        direction = find_direction(options.variant, found, coefficients_BV)
        num_stale = 0 if found.loss < least - options.min_gain else num_stale + 1
        least = min(least, found.loss)
        stopped: str | None = None
        next_BV, steps_B = coefficients_BV, np.zeros(len(coefficients_BV))
        if gap <= options.gap_tolerance:
            stopped = "gap"
        elif number == options.iterations:
            stopped = "iterations"
        elif num_stale >= options.patience:
            stopped = "no gain"
        else:
            next_BV, steps_B = _leave(problem, coefficients_BV, found, direction, number, options)
            stopped = None if (next_BV != coefficients_BV).any() else "no gain"
        targets_B = tuple(int(place) for place in minimise(found.scores_BV))
        steps = tuple(float(step) for step in steps_B)
        yield Iterate(number, coefficients_BV, found.loss, gap, targets_B, direction.kinds_B, steps, stopped)
        if stopped:
            return
        coefficients_BV, number = next_BV, number + 1


def _leave(
    problem: Problem, coefficients_BV: Matrix, found: Evaluation, direction: Direction, number: int, options: Options
) -> tuple[Matrix, Matrix]:
    """The next coefficients, and each block's step."""
    if options.soft_vertices is not None:
        return _soft_step(problem, coefficients_BV, found, number, options)
    if options.step == "open_loop":
        steps_B = np.minimum(direction.limits_B, open_loop(number, options.scale))
        return take_step(coefficients_BV, direction, steps_B), steps_B
    # One step for all blocks, as far as each one's edge: a block near its edge does not hold up the others.
    reach = options.scale * float(direction.limits_B.max())

    def steps_at(share: float) -> Matrix:
        steps_B: Matrix = np.minimum(direction.limits_B, share * reach)
        return steps_B

    def loss_at(share: float) -> float:
        return problem.loss(take_step(coefficients_BV, direction, steps_at(share)))

    slope = math.fsum(direction.slopes_B) * reach
    best = search_line(loss_at, found.loss, slope, num_losses=options.search_losses)
    steps_B = steps_at(best.step)
    return (take_step(coefficients_BV, direction, steps_B) if best.step else coefficients_BV), steps_B


def _soft_step(
    problem: Problem, coefficients_BV: Matrix, found: Evaluation, number: int, options: Options
) -> tuple[Matrix, Matrix]:
    """Towards the S best vertices of each block at once: x + sum_j l_j (s_j - x), l by projected gradient on the loss.

    l starts at 0. The first step is as long as a hard one would be (its largest share is the open loop's step), later
    ones as the one before; a step that does not lower the loss is halved.
    """
    assert options.soft_vertices is not None
    num_blocks, num_vertices = coefficients_BV.shape
    num_chosen = min(options.soft_vertices, num_vertices)
    chosen_BS = np.argsort(found.scores_BV, axis=1, kind="stable")[:, :num_chosen]

    def point(shares_BS: Matrix) -> Matrix:
        moved_BV = coefficients_BV * (1.0 - shares_BS.sum(axis=1, keepdims=True))
        np.put_along_axis(moved_BV, chosen_BS, np.take_along_axis(moved_BV, chosen_BS, axis=1) + shares_BS, axis=1)
        return normalise(np.maximum(moved_BV, 0.0))

    def slopes(products_BV: Matrix) -> Matrix:
        at_start_B = (products_BV * coefficients_BV).sum(axis=1)
        slopes_BS: Matrix = np.take_along_axis(products_BV, chosen_BS, axis=1) - at_start_B[:, None]
        return slopes_BS

    shares_BS, loss, length = np.zeros((num_blocks, num_chosen)), found.loss, open_loop(number, options.scale)
    for inner in range(options.soft_steps):
        products_BV = found.products_BV if inner == 0 else problem.evaluate(point(shares_BS)).products_BV
        slopes_BS = slopes(products_BV)
        largest = float(np.abs(slopes_BS).max())
        if largest == 0.0:
            break
        moved = None
        for _ in range(options.search_losses):
            tried_BS = project(shares_BS - length / largest * slopes_BS)
            tried_loss = problem.loss(point(tried_BS))
            if tried_loss < loss:
                moved = tried_BS
                break
            length /= 2.0
        if moved is None:
            break
        shares_BS, loss = moved, tried_loss
    if not shares_BS.any():
        return coefficients_BV, np.zeros(num_blocks)
    return point(shares_BS), shares_BS.sum(axis=1)


def best_of(iterates: Sequence[Iterate]) -> Iterate:
    """The iterate of the least loss; the first of several."""
    return min(iterates, key=lambda iterate: iterate.loss)
