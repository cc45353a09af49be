"""Frank-Wolfe on convex quadratics over hulls, where optimum, gap and rates are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import RecipeError
from remelt.frank_wolfe import (
    Evaluation,
    Iterate,
    Options,
    best_of,
    duality_gaps,
    find_direction,
    minimise,
    open_loop,
    project,
    search_line,
    take_step,
    walk,
)
from remelt.oracle import Matrix, TensorProducts, block_products, group_tensors, oracle_scores

VARIANTS = ("vanilla", "away", "pairwise")


class Quadratic:
    """Half the squared distance between a point of a product of hulls and a target, stretched along the axes."""

    def __init__(self, vertices_BVD: np.ndarray, target_BD: np.ndarray, stretch_D: np.ndarray | None = None) -> None:
        self.vertices_BVD, self.target_BD = vertices_BVD, target_BD
        self.stretch_D = np.ones(target_BD.shape[1]) if stretch_D is None else stretch_D
        self.num_gradients = self.num_losses = 0
        self.least = 0.0

    @classmethod
    def random(cls, seed: int, *, vertices: int, dim: int, active: int, blocks: int = 1) -> Quadratic:
        """A target in the hull of the first `active` vertices, so that the least loss is 0."""
        rng = np.random.default_rng(seed)
        points_BVD = rng.standard_normal((blocks, vertices, dim))
        shares = rng.dirichlet(np.full(active, 5.0), blocks)
        return cls(points_BVD, np.einsum("bv,bvd->bd", shares, points_BVD[:, :active]), rng.uniform(0.5, 2.0, dim))

    @classmethod
    def on_face(cls, seed: int, *, vertices: int, active: int, blocks: int = 1, extra: float = 1.0) -> Quadratic:
        """Over simplices, with optima in the middle of a face of `active` vertices and a gradient there that is not 0.

        Vertices after the first eight are `extra` times as far away.
        """
        rng = np.random.default_rng(seed)
        lengths_V = np.where(np.arange(vertices) < 8, 1.0, extra)
        optimum_BV = np.zeros((blocks, vertices))
        optimum_BV[:, :active] = rng.dirichlet(np.full(active, 5.0), blocks)
        # By the conditions of Karush, Kuhn and Tucker: products are -0.1 on the face, above that off it.
        target_BV = optimum_BV + 0.1
        target_BV[:, active:] = -rng.uniform(0.05, 0.2, (blocks, vertices - active))
        problem = cls(np.tile(np.diag(lengths_V), (blocks, 1, 1)), target_BV)
        problem.least = problem.value(optimum_BV)
        return problem

    def point(self, coefficients_BV: Matrix) -> np.ndarray:
        return np.einsum("bv,bvd->bd", coefficients_BV, self.vertices_BVD)

    def value(self, coefficients_BV: Matrix) -> float:
        return float((self.stretch_D * (self.point(coefficients_BV) - self.target_BD) ** 2).sum() / 2)

    def loss(self, coefficients_BV: Matrix) -> float:
        self.num_losses += 1
        return self.value(coefficients_BV)

    def evaluate(self, coefficients_BV: Matrix) -> Evaluation:
        self.num_gradients += 1
        gradient_BD = self.stretch_D * (self.point(coefficients_BV) - self.target_BD)
        products_BV = np.einsum("bd,bvd->bv", gradient_BD, self.vertices_BVD)
        return Evaluation(self.value(coefficients_BV), products_BV, products_BV)

    @property
    def uniform(self) -> Matrix:
        blocks, vertices, _ = self.vertices_BVD.shape
        return np.full((blocks, vertices), 1.0 / vertices)

    @property
    def curvature(self) -> float:
        """Of the loss over the hull, at most: largest eigenvalue times the squared diameter (Jaggi 2013, eq. 3)."""
        diameters = [
            max(((one - two) ** 2).sum() for one in points_VD for two in points_VD) for points_VD in self.vertices_BVD
        ]
        return float(self.stretch_D.max() * sum(diameters))


def run(problem: Quadratic, **options: Any) -> list[Iterate]:
    return list(walk(problem, problem.uniform, Options(**options)))


def test_the_open_loop_walks_the_example_worked_by_hand() -> None:
    # Pool (1, 0), (0, 1), (1, 1), target (0.6, 0.9), from the middle.
    problem = Quadratic(np.array([[[1.0, 0], [0, 1], [1, 1]]]), np.array([[0.6, 0.9]]))
    iterates = run(problem, variant="vanilla", step="open_loop", iterations=4, patience=9)
    assert [iterate.targets_B[0] for iterate in iterates[:4]] == [1, 0, 1, 2]
    points = [problem.point(iterate.coefficients_BV)[0].tolist() for iterate in iterates]
    expected = [[2 / 3, 2 / 3], [0, 1], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0.6, 0.8]]
    assert np.allclose(points, expected, atol=1e-12)
    assert iterates[0].gap == pytest.approx(0.12222, abs=1e-4)
    assert iterates[-1].stopped == "iterations"


def test_the_oracle_picks_the_least_score_and_the_first_of_equals() -> None:
    assert minimise(np.array([[3.0, -1, 2], [0, 0, 0], [5, 4, 4]])).tolist() == [1, 0, 1]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), vertices=st.integers(2, 8), blocks=st.integers(1, 3))
def test_the_gap_bounds_the_error_and_iterates_stay_in_the_hull(
    variant: Any, seed: int, vertices: int, blocks: int
) -> None:
    problem = Quadratic.random(seed, vertices=vertices, dim=4, active=min(3, vertices), blocks=blocks)
    for rule in ("open_loop", "line_search"):
        for iterate in run(problem, variant=variant, step=rule, iterations=12, patience=99):
            assert iterate.loss <= iterate.gap + 1e-12  # the least loss is 0
            assert (iterate.coefficients_BV >= 0).all()
            assert np.allclose(iterate.coefficients_BV.sum(axis=1), 1.0, atol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_vanilla_steps_keep_their_known_rate(seed: int) -> None:
    problem = Quadratic.random(seed, vertices=10, dim=6, active=3)
    iterates = run(problem, variant="vanilla", step="open_loop", iterations=200, patience=999)
    for iterate in iterates[1:]:
        # Jaggi 2013, theorem 1: loss after t steps - least <= 2 C / (t + 2).
        assert iterate.loss <= 2 * problem.curvature / (iterate.number + 2)


@pytest.mark.parametrize("variant", ["away", "pairwise"])
@pytest.mark.parametrize("seed", range(4))
def test_away_and_pairwise_steps_converge_linearly_where_vanilla_steps_zigzag(seed: int, variant: Any) -> None:
    problem = Quadratic.on_face(seed, vertices=8, active=3)
    options: dict[str, Any] = {"iterations": 60, "patience": 999, "search_losses": 2}
    slow = [iterate.loss - problem.least for iterate in run(problem, variant="vanilla", **options)]
    walked = run(problem, variant=variant, **options)
    quick = [iterate.loss - problem.least for iterate in walked]
    # The optimum lies on a face, where vanilla Frank-Wolfe with a line search is no faster than 1 / t (Wolfe 1970).
    assert slow[-1] > 0.01 * slow[0] / len(slow)
    assert quick[-1] < 1e-12 * quick[0]
    # Linear: by a factor in any ten steps, until rounding.
    errors = [error for error in quick if error > 1e-12]
    assert all(later < 0.5 * earlier for earlier, later in zip(errors, errors[10:], strict=False))
    # The face is found: vertices off it are dropped altogether.
    assert (walked[-1].coefficients_BV[0, 3:] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_irrelevant_vertices_do_not_hurt(variant: Any) -> None:
    few = Quadratic.on_face(3, vertices=8, active=3)
    many = Quadratic.on_face(3, vertices=40, active=3, extra=4.0)
    # They wreck the uniform point, and leave the optimum where it was.
    assert many.value(many.uniform) - many.least > 3 * (few.value(few.uniform) - few.least)
    start = few.value(few.uniform) - few.least
    iterates = run(many, variant=variant, iterations=150, patience=999, search_losses=2)
    assert iterates[-1].loss - many.least < (0.1 if variant == "vanilla" else 1e-9) * start
    if variant != "vanilla":
        assert (iterates[-1].coefficients_BV[0, 8:] == 0).all()


def test_blocks_walk_to_optima_of_their_own() -> None:
    problem = Quadratic.on_face(1, vertices=6, active=3, blocks=4)
    shared = Quadratic(problem.vertices_BVD.transpose(1, 0, 2).reshape(1, 6, -1), problem.target_BD.reshape(1, -1))
    by_block = run(problem, iterations=80, patience=999)[-1]
    assert by_block.loss - problem.least < 1e-9
    assert (by_block.coefficients_BV[:, 3:] < 1e-9).all()
    # One row of coefficients cannot serve four targets.
    assert run(shared, iterations=80, patience=999)[-1].loss - problem.least > 1e-3


def test_a_block_without_gradient_stays_where_it_is() -> None:
    coefficients = np.array([[0.25, 0.75], [0.5, 0.5]])
    products = np.array([[0.0, 0.0], [1.0, -1.0]])
    for variant in VARIANTS:
        direction = find_direction(variant, Evaluation(1.0, products, products), coefficients)  # type: ignore[arg-type]
        assert direction.kinds_B[0] == "stay"
        assert direction.limits_B[0] == 0
        moved = take_step(coefficients, direction, direction.limits_B)
        assert moved[0].tolist() == [0.25, 0.75]
        assert moved[1].tolist() == [0, 1]


def test_an_away_step_to_the_edge_drops_its_vertex_exactly() -> None:
    coefficients = np.array([[0.1, 0.2, 0.7]])
    products = np.array([[9.0, -0.1, -0.2]])
    direction = find_direction("away", Evaluation(1.0, products, products), coefficients)
    assert direction.kinds_B == ("away",)
    moved = take_step(coefficients, direction, direction.limits_B)
    assert moved[0, 0] == 0.0
    assert moved[0, 1:] == pytest.approx([2 / 9, 7 / 9])


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 50), st.floats(-5, -0.01))
def test_a_line_search_is_exact_on_parabolas_with_two_losses(curvature: float, slope: float) -> None:
    tried: list[float] = []

    def loss_at(step: float) -> float:
        tried.append(step)
        return 3.0 + slope * step + curvature * step**2

    best = search_line(loss_at, 3.0, slope, num_losses=4)
    assert best.step == pytest.approx(min(1.0, -slope / (2 * curvature)), rel=1e-6)
    assert len(tried) <= 2


def test_a_line_search_gives_up_uphill_and_survives_broken_merges() -> None:
    assert search_line(lambda step: 0.0, 1.0, 0.5, num_losses=4).step == 0.0
    broken = search_line(lambda step: math.nan if step > 0.3 else 1.0 - step, 1.0, -1.0, num_losses=4)
    assert 0 < broken.step <= 0.3
    assert search_line(lambda step: 2.0, 1.0, -1.0, num_losses=3).step == 0.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(0, 1000))
def test_projection_is_the_nearest_point_of_the_capped_simplex(values: list[float], seed: int) -> None:
    row = np.array([values])
    nearest = project(row)
    assert (nearest >= 0).all()
    assert nearest.sum() <= 1 + 1e-12
    others = np.random.default_rng(seed).dirichlet(np.ones(len(values) + 1), 200)[:, :-1]
    distances = ((others - row) ** 2).sum(axis=1)
    assert ((nearest - row) ** 2).sum() <= distances.min() + 1e-12


def test_soft_steps_go_to_several_vertices_and_gain_more_in_each() -> None:
    problem = Quadratic.random(5, vertices=8, dim=10, active=4)
    hard = run(problem, variant="vanilla", iterations=6, patience=99)
    soft = run(problem, variant="vanilla", soft_vertices=4, soft_steps=3, iterations=6, patience=99)
    assert soft[-1].loss < 0.5 * hard[-1].loss
    losses = [iterate.loss for iterate in soft]
    assert losses == sorted(losses, reverse=True)
    for iterate in soft:
        assert iterate.coefficients_BV.sum() == pytest.approx(1.0, abs=1e-14)
        assert (iterate.coefficients_BV >= 0).all()


def test_a_walk_stops_at_its_gap_at_its_steps_and_without_gain() -> None:
    problem = Quadratic.random(2, vertices=5, dim=6, active=3)
    by_gap = run(problem, iterations=500, gap_tolerance=1e-3, patience=999)
    assert by_gap[-1].stopped == "gap"
    assert by_gap[-1].gap <= 1e-3 < by_gap[-2].gap
    assert run(problem, iterations=3)[-1].stopped == "iterations"
    assert len(run(problem, iterations=3)) == 4
    # Open loop steps jump away from a start that is the optimum.
    optimum = Quadratic(problem.vertices_BVD, problem.point(problem.uniform) + 1e-3)
    stale = list(
        walk(optimum, optimum.uniform, Options(variant="vanilla", step="open_loop", patience=2, iterations=50))
    )
    assert stale[-1].stopped == "no gain"
    assert len(stale) == 3
    assert best_of(stale).number == 0


def test_a_line_search_costs_no_more_losses_than_allowed() -> None:
    problem = Quadratic.random(2, vertices=5, dim=6, active=3)
    run(problem, iterations=4, search_losses=2)
    assert problem.num_losses <= 8
    assert problem.num_gradients == 5
    free = Quadratic.random(2, vertices=5, dim=6, active=3)
    run(free, iterations=4, step="open_loop", patience=99)
    assert free.num_losses == 0


def test_scaled_steps_are_shorter() -> None:
    assert open_loop(0) == 1.0
    assert open_loop(2, 0.1) == pytest.approx(0.05)
    with pytest.raises(RecipeError, match="outside"):
        Options(scale=1.5)
    with pytest.raises(RecipeError, match="use vanilla"):
        Options(variant="away", soft_vertices=3)


NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.norm.weight",
)


def test_tensors_are_grouped_by_model_layer_and_name() -> None:
    assert group_tensors(NAMES, "model").labels_B == ("model",)
    layers = group_tensors(NAMES, "layer")
    assert layers.labels_B == ("embedding", "layer 0", "layer 10", "norm")
    assert layers.of_T == (0, 1, 1, 2, 3)
    assert group_tensors(NAMES, "tensor").labels_B == NAMES


def test_sums_and_cosines_of_blocks_are_those_of_their_tensors() -> None:
    rng = np.random.default_rng(0)
    gradient, vertices = rng.standard_normal((5, 7)), rng.standard_normal((5, 3, 7))
    vertices[1, 0] = 0.0  # a task vector of zeros counts as 0, not as NaN
    products = np.einsum("td,tvd->tv", gradient, vertices)
    squares = (vertices**2).sum(axis=2)
    # One tensor of the blocks has no gradient.
    found = TensorProducts(NAMES[:4], products[:4], squares[:4], (gradient[:4] ** 2).sum(axis=1))
    layers = group_tensors(NAMES, "layer")
    sums = block_products(found, layers)
    assert np.allclose(sums[1], products[1] + products[2])
    assert (sums[3] == 0).all()
    norms = np.linalg.norm(gradient, axis=1)[:, None] * np.linalg.norm(vertices, axis=2)
    cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    assert np.allclose(oracle_scores(found, layers, "cosine")[1], cosines[1] + cosines[2])
    assert oracle_scores(found, layers, "cosine")[1, 0] == pytest.approx(cosines[2, 0])
    assert (oracle_scores(found, layers, "inner") == sums).all()


def test_gaps_are_of_inner_products_and_never_negative() -> None:
    gaps = duality_gaps(np.array([[1.0, -1.0], [2.0, 2.0]]), np.array([[0.5, 0.5], [0.3, 0.7]]))
    assert gaps.tolist() == [1.0, 0.0]
