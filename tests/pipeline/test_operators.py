"""The operators as functions: worked examples, options, and what they promise of randomness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operator_cases import SEED, Case, make_tensors, program_of, run_program, values_of
from remelt.errors import OperatorError, RecipeError
from remelt.operators import MERGEKIT_OPTIONS, OPERATORS, load_operators
from remelt.operators.dropout import della, della_linear
from remelt.operators.linear import assembly_of_experts, linear, task_arithmetic
from remelt.operators.quantities import kept_range, proportions, rank_probabilities
from remelt.operators.sparse import breadcrumbs, ties
from remelt.operators.spherical import model_stock, nuslerp, slerp
from remelt.operators.steps import agreeing, disjoint_mean, drop_by_rank, elect_signs, l1_scale, row_ranks, trim


def _tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def _mask_bits(*kept: int) -> torch.Tensor:
    """Draws that keep (0) or drop (all ones) whatever the probability."""
    return torch.tensor([0 if keep else -1 for keep in kept], dtype=torch.int32)


ZERO5 = torch.zeros(5)
TAU1, TAU2 = _tensor(0.1, -0.4, 0.2, -0.3, 0.05), _tensor(0.3, 0.35, -0.01, -0.02, 0.5)


def test_ties_worked_example_keeps_exactly_two_of_five() -> None:
    assert torch.allclose(trim(TAU1, 0.4), _tensor(0, -0.4, 0, -0.3, 0))
    assert torch.allclose(trim(TAU2, 0.4), _tensor(0, 0.35, 0, 0, 0.5))
    assert torch.allclose(ties(ZERO5, [TAU1, TAU2], [1, 1], density=0.4), _tensor(0, -0.4, 0, -0.3, 0.5))


def test_della_worked_example_of_probabilities_and_masks() -> None:
    row = _tensor(0.1, -0.4, 0.2, -0.3)
    probabilities = rank_probabilities(4, 0.5, 0.2)[row_ranks(row)[0].numpy()]
    assert np.allclose(probabilities, [0.3, 0.7, 0.43333333, 0.56666667])
    masked, reciprocals = drop_by_rank(row, _mask_bits(0, 1, 0, 1), 0.5, 0.2)
    assert reciprocals is not None
    assert torch.allclose(masked * reciprocals, _tensor(0, -0.571429, 0, -0.529412), atol=1e-6)
    assert torch.allclose(masked * l1_scale(row, masked, 0.0), _tensor(0, -0.571429, 0, -0.428571), atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1.0, 1.0), (0.2, 0.6, 0, -0.314706)), ((2.0, 1.0), (0.2, -0.571429, 0, -0.386275))],
)
def test_della_worked_example_of_election_and_fusion(weights: tuple, expected: tuple) -> None:
    deltas = [_tensor(0, -0.571429, 0, -0.529412), _tensor(0.2, 0.6, 0, -0.1)]
    weighted = [delta * w for delta, w in zip(deltas, weights, strict=True)]
    is_plus = elect_signs(weighted)
    agrees = [agreeing(vote, is_plus) for vote in weighted]
    assert torch.allclose(disjoint_mean(weighted, agrees, weights, normalize=True), _tensor(*expected), atol=1e-6)


def test_task_arithmetic_worked_example() -> None:
    base = _tensor(1.0)
    assert torch.allclose(task_arithmetic(base, [base + 0.2, base - 0.1], [1, 1], lambda_=0.3), _tensor(1.03))


def test_model_stock_worked_example() -> None:
    merged = model_stock(torch.zeros(2), [_tensor(3, 0), _tensor(1, 2)])
    assert torch.allclose(merged, _tensor(1.236068, 0.618034))


def test_model_stock_of_untouched_models_is_the_base() -> None:
    base = torch.randn(3, 4)
    assert torch.equal(model_stock(base, [base, base.clone()]), base)


def test_slerp_worked_example_and_its_linear_end() -> None:
    assert torch.allclose(slerp(None, [_tensor(1, 0), _tensor(0, 1)], t=0.5), _tensor(0.707107, 0.707107))
    nearly = [_tensor(1, 0), _tensor(2, 0.001)]
    assert torch.allclose(slerp(None, nearly, t=0.25), _tensor(1.25, 0.00025))
    assert torch.allclose(slerp(None, [torch.zeros(2), _tensor(0, 1)], t=0.5), _tensor(0, 0.707107))


def test_nuslerp_takes_rows_or_columns_and_anything_of_one_row_whole() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, -1.0]])
    rows = nuslerp(None, [a, b], [1, 1], nuslerp_flatten=False)
    assert torch.allclose(rows, torch.tensor([[0.7071, 0.7071], [0.5137, 2.0550], [2.3511, 0.0]]), atol=1e-4)
    columns = nuslerp(None, [a, b], [1, 1], nuslerp_flatten=False, nuslerp_row_wise=True)
    assert torch.allclose(columns, torch.tensor([[0.5470, 0.5684], [0.5470, 2.2735], [2.1882, 0.0]]), atol=1e-4)
    for flags in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
        assert torch.allclose(nuslerp(None, [a[0], b[0]], [1, 1], **flags), _tensor(0.70711, 0.70711), atol=1e-5)


def test_assembly_of_experts_measures_as_its_normaliser_says() -> None:
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    other = first + torch.diag(_tensor(0.1, -0.1))
    for normaliser, distance in (("abs", 0.141421), ("rms", 0.0707107), ("relative", 0.0258199)):
        below, above = distance * 0.999, distance * 1.001
        mean = assembly_of_experts(None, [first, other], [1, 1], threshold=below, normaliser=normaliser)
        assert torch.allclose(mean, (first + other) / 2)
        assert assembly_of_experts(None, [first, other], [1, 1], threshold=above, normaliser=normaliser) is first


def test_breadcrumbs_top_slice_may_be_empty() -> None:
    """50 elements at gamma 0.01: floor(0.5) = 0 are dropped on top, and the task vector is not lost."""
    tau = torch.arange(1.0, 51.0)
    merged = breadcrumbs(torch.zeros(50), [tau], [1.0], density=0.5, gamma=0.01)
    assert torch.equal(merged, torch.where(tau > 25, tau, 0.0))


@pytest.mark.parametrize(
    ("n", "density", "gamma", "expected"),
    [
        (10, 0.3, 0.0, (0, 3)),
        (10, 0.3, 0.2, (2, 5)),
        (10, 0.9, 0.2, (1, 10)),
        (10, 1.0, 0.5, (0, 10)),
        (3, 0.1, 0, (0, 1)),
    ],
)
def test_kept_range_reaches_the_density_before_it_drops_outliers(
    n: int, density: float, gamma: float, expected
) -> None:
    assert kept_range(n, density, gamma) == expected


def test_equal_magnitudes_are_kept_from_the_lowest_index() -> None:
    assert torch.equal(trim(_tensor(1, -2, 2, -2, 1), 0.4), _tensor(0, -2, 2, 0, 0))
    assert torch.equal(trim(_tensor(1, -2, 2, -2, 1), 0.4, gamma=0.2), _tensor(0, 0, 2, -2, 0))


def test_an_undecided_vote_counts_as_plus_also_under_decimal_weights() -> None:
    """0.3 * (3 - 1 - 1 - 1): rounding alone would decide, in float32 and in float64."""
    taus = [_tensor(3.0), _tensor(-1.0), _tensor(-1.0), _tensor(-1.0)]
    for weights in ([0.3] * 4, [0.1] * 4, [1 / 3] * 4):
        assert torch.equal(ties(torch.zeros(1), taus, weights), _tensor(3.0))
    assert torch.equal(ties(torch.zeros(1), [_tensor(1.0)] * 3, [0.1, 0.2, -0.3], normalize=True), _tensor(1.0))


def test_a_divisor_of_exactly_zero_counts_as_one() -> None:
    merged = ties(torch.zeros(1), [_tensor(2.0), _tensor(-1.0)], [0.5, -0.5])
    assert torch.allclose(merged, _tensor(1.5))


@given(st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0, -0.4, 1 / 3, 2.0, 0.125]), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_proportions_keep_the_ratios_of_the_weights(weights: list[float]) -> None:
    shares = proportions(weights)
    assert all(share == round(share) for share in shares)
    assert np.allclose(np.array(shares) * weights[0], np.array(weights) * shares[0])


def test_weights_without_small_ratios_are_left_alone() -> None:
    assert proportions([0.123456789, 0.3]) == (0.123456789, 0.3)


def test_length_one_rows_and_three_dimensions_of_della_rank_along_the_last_one() -> None:
    draws = [torch.zeros(6, dtype=torch.int32)]
    column = torch.ones(6, 1)
    merged = della_linear(torch.zeros(6, 1), [column], [1.0], draws=draws, density=0.5, epsilon=0.2)
    assert torch.allclose(merged, torch.full((6, 1), 2.0))
    cube = torch.randn(2, 3, 8)
    flat = cube.reshape(6, 8)
    bits = [torch.randint(-(2**31), 2**31, (48,), dtype=torch.int64).to(torch.int32)]
    in_cube = della(torch.zeros_like(cube), [cube], [1.0], draws=bits, density=0.5)
    assert torch.equal(in_cube.reshape(6, 8), della(torch.zeros_like(flat), [flat], [1.0], draws=bits, density=0.5))


@pytest.mark.parametrize(
    "case", [Case("dare_linear", {"density": 0.3}, 1), Case("della_linear", {"density": 0.5}, 1)], ids=str
)
def test_drop_and_rescale_are_unbiased(case: Case) -> None:
    """The mean over 3,000 seeds is the task vector, within 5 standard errors of each element."""
    from operator_cases import apply_of
    from remelt.kernels import make_program
    from remelt.kernels.program import geometry_of

    tensors = make_tensors((3, 40), ["F32", "F32"], seed=1)
    tensors = tensors._replace(base=np.zeros(120, np.float32))
    total, num_seeds = np.zeros(120), 3000
    for seed in range(num_seeds):
        program = make_program(
            apply_of(case)._replace(coefficients=(1.0,)),
            geometry_of("w", (3, 40)),
            base_dtype="F32",
            dtypes_K=("F32",),
            out_dtype="F32",
            streams_K=(0,),
            seed=seed,
            num_workers=1,
        )
        total += run_program(program, tensors, "F32", has_base=True)
    delta = tensors.models_K[0].astype(np.float64)
    keep = 0.3 if case.operator == "dare_linear" else 0.35
    error = np.abs(delta) * np.sqrt((1 - keep) / keep / num_seeds)
    assert np.all(np.abs(total / num_seeds - delta) <= 5 * error + 1e-9)


def test_della_keeps_each_rank_with_its_own_probability() -> None:
    """The kept fraction as a function of rank is a line from density - epsilon to density + epsilon."""
    length, rows = 64, 6000
    tau = torch.rand(rows, length)
    from remelt.kernels.torch_program import draw_bits

    masked, _ = drop_by_rank(tau, draw_bits(SEED, 0, "w", 0, rows * length), 0.5, 0.3)
    kept = torch.zeros(length).index_add_(0, row_ranks(tau).reshape(-1), (masked != 0).float().reshape(-1)) / rows
    expected = rank_probabilities(length, 0.5, 0.3)
    assert np.all(np.abs(kept.numpy() - expected) < 5 * np.sqrt(0.25 / rows))


def test_another_model_s_place_does_not_change_a_stream() -> None:
    """A model keeps its mask when the other is replaced."""
    tensors = make_tensors((30, 40), ["F32"] * 3)
    tensors = tensors._replace(base=np.zeros(1200, np.float32))
    case = Case("dare_linear", {"density": 0.5}, 2)
    outs = []
    for second in (tensors.models_K[1], np.zeros(1200, np.float32)):
        changed = tensors._replace(models_K=(tensors.models_K[0], second))
        outs.append(run_program(program_of(case, changed, "F32"), changed, "F32", has_base=True))
    alone = values_of(outs[1], "F32", (1200,)) != 0
    first = values_of(tensors.models_K[0], "F32", (1200,))
    assert 0.4 < alone[first != 0].mean() < 0.6


def test_options_are_declared_with_intervals_and_choices() -> None:
    options = OPERATORS["della"].options
    assert options["density"].per_model
    assert str(options["density"].interval) == "(0, 1]"
    assert options["rescale"].choices == ("keep", "l1", "none")
    assert OPERATORS["ties"].options["lambda"].default == 1.0
    assert OPERATORS["linear"].base == "none"
    for name, chosen in MERGEKIT_OPTIONS.items():
        assert chosen.keys() <= OPERATORS[name].options.keys()


def test_check_options_names_what_della_cannot_draw() -> None:
    della_ = OPERATORS["della"]
    assert della_.check_options({"density": 0.5, "epsilon": 0.15}) is None
    assert della_.check_options({"density": 1.0, "epsilon": 0.15}) is None
    problem = della_.check_options({"density": (0.5, 0.9), "epsilon": 0.15})
    assert problem is not None
    assert "0.75 to 1.05" in problem
    assert della_.check_options({"density": 0.9, "epsilon": 0.15, "window": 0.1}) is None


def test_check_options_refuses_a_global_top_k() -> None:
    assert "exclude" in (OPERATORS["ties"].check_options({"topk": "global", "granularity": "row"}) or "")


def test_weights_that_sum_to_zero_are_refused_where_they_must_be_normalised() -> None:
    with pytest.raises(OperatorError, match="sum to"):
        linear(None, [torch.ones(2), torch.ones(2)], [0.5, -0.5])
    assert OPERATORS["linear"].check_coefficients((0.5, -0.5), {"normalize": True})
    assert OPERATORS["linear"].check_coefficients((0.5, -0.5), {"normalize": False}) is None


def test_importing_operators_and_kernels_loads_neither_torch_nor_numba() -> None:
    modules = "remelt.operators, remelt.kernels, remelt.kernels.footprint, remelt.numerics"
    code = f"import {modules}, sys; print([m for m in ('torch', 'numba') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert run.stdout.strip() == "[]"


PLUGIN = """
from remelt.operators import describe
def halfway(base, tensors_K, coefficients_K, *, normalize: bool = True):
    "Mean of two."
    return (tensors_K[0].float() + tensors_K[1].float()) / 2
operator = describe(halfway, scope="element", base="none", min_models=2, max_models=2)
taken = describe(halfway, scope="element", base="none")
object.__setattr__(taken, "name", "ties")
"""


def _install(tmp_path: Path, entry: str) -> None:
    (tmp_path / "halfway_plugin.py").write_text(PLUGIN)
    info = tmp_path / "halfway-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[remelt.operators]\nhalfway = halfway_plugin:{entry}\n")


def test_a_third_party_operator_is_found_and_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remelt.kernels import make_program
    from remelt.kernels.program import geometry_of
    from remelt.treatment import Apply

    _install(tmp_path, "operator")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_operators()["halfway"].summary == "Mean of two."
    tensors = make_tensors((5, 6), ["BF16"] * 3)
    program = make_program(
        Apply("halfway", None, (0, 1), (1.0, 1.0), (("normalize", True),)),
        geometry_of("w", (5, 6)),
        base_dtype=None,
        dtypes_K=("BF16", "BF16"),
        out_dtype="F32",
        streams_K=(0, 1),
        seed=0,
        num_workers=1,
    )
    out = run_program(program, tensors, "F32", has_base=False)
    a, b = (values_of(model, "BF16", (30,)) for model in tensors.models_K)
    assert np.array_equal(out, ((a + b) / 2).astype(np.float32))


def test_a_third_party_operator_may_not_take_a_taken_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "taken")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="exists already"):
        load_operators()
