"""Every operator passes through here: against float64 references, kernels against torch, any split the same bytes.

Adding an operator is adding rows to `operator_cases.CASES`.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_operators
from operator_cases import (
    CASES,
    NAME,
    WEIGHTS,
    Case,
    apply_of,
    bits_of,
    blocks_of,
    call_torch,
    keywords,
    make_tensors,
    program_of,
    run_program,
    shapes_of,
    stored,
    values_of,
)
from remelt.dtypes import DTYPES
from remelt.kernels.program import geometry_of
from remelt.operators import OPERATORS
from remelt.operators.dropout import half_widths
from remelt.operators.quantities import per_model

REDUCES = ("slerp", "nuslerp", "model_stock", "assembly_of_experts")
EPS = 2.0**-23


def _reference(case: Case, tensors, shape):
    models = [values_of(x, d, shape) for x, d in zip(tensors.models_K, tensors.dtypes[1:], strict=True)]
    base = values_of(tensors.base, tensors.dtypes[0], shape) if case.has_base else None
    kwargs = keywords(case)
    if OPERATORS[case.operator].is_random:
        kwargs["bits_K"] = bits_of(case, shape)
    ref = reference_operators.OPERATORS[case.operator](base, models, WEIGHTS[: case.num_models], **kwargs)
    return np.asarray(ref), base, models


def _largest_weights(case: Case) -> list[float]:
    """Bounds on what can stand before each model: coefficient, rescaling and divisor together."""
    options, count = case.options, case.num_models
    weights = [abs(w) for w in WEIGHTS[:count]]
    scale = abs(options.get("lambda", 1.0))
    if OPERATORS[case.operator].options.get("normalize") and options.get(
        "normalize", OPERATORS[case.operator].options["normalize"].default
    ):
        scale /= min(abs(sum(WEIGHTS[:count])), *weights)
    factors = [1.0] * count
    if OPERATORS[case.operator].is_random and options.get("rescale", "keep") == "keep":
        density = per_model(options.get("density", 1.0), count)
        half = half_widths(options.get("epsilon", 0.15), options.get("window", 0.0), count)
        is_ranked = case.operator.startswith("della")
        factors = [1 / (d - h if is_ranked and d < 1 else d) for d, h in zip(density, half, strict=True)]
    if options.get("rescale") == "l1":
        factors = [20.0] * count
    if case.operator in ("slerp", "nuslerp", "model_stock"):
        weights, scale = [1.5] * count, 1.0
    return [w * scale * f for w, f in zip(weights, factors, strict=True)]


def _half_ulp(values, dtype):
    mantissa, lowest = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149), "F64": (53, -1074)}[dtype]
    _, exponent = np.frexp(np.abs(values))
    return np.ldexp(0.5, np.maximum(exponent - mantissa, lowest))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_matches_its_float64_reference_within_the_stated_bound(case: Case, dtype: str) -> None:
    for shape in shapes_of(case):
        tensors = make_tensors(shape, [dtype] * (case.num_models + 1))
        ref, base, models = _reference(case, tensors, shape)
        out = run_program(program_of(case, tensors, dtype), tensors, dtype, has_base=case.has_base)
        got = values_of(out, dtype, shape)
        below = 0.0 if base is None else np.abs(base)
        moved = sum(w * (np.abs(x) + below) for w, x in zip(_largest_weights(case), models, strict=True))
        bound = _half_ulp(ref, dtype) + (case.num_models + 4) * EPS * (below + moved)
        num_off = int((np.abs(got - ref) > bound).sum())
        # float32 cannot tell apart magnitudes that float64 can: each model may swap one pair at a threshold.
        allowed = 2 * case.num_models if dtype == "F32" and got.size > 100 else 0
        assert num_off <= allowed, f"{num_off} of {got.size} off, shape {shape}: {np.abs(got - ref).max()}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_gives_the_bits_of_the_torch_function(case: Case) -> None:
    for shape in shapes_of(case):
        for dtypes, out_dtype in (
            (["BF16"] * (case.num_models + 1), "BF16"),
            (["F32", "BF16", "F16", "F32", "F64", "BF16", "F32"][: case.num_models + 1], "F32"),
            (["F16"] * (case.num_models + 1), "F32"),
        ):
            tensors = make_tensors(shape, dtypes, seed=1)
            out = run_program(program_of(case, tensors, out_dtype), tensors, out_dtype, has_base=case.has_base)
            expected = call_torch(case, tensors).to(getattr(torch, DTYPES[out_dtype].torch_name))
            if case.operator in REDUCES or case.options.get("rescale") == "l1":
                # float64 sums in another order: a coefficient may round to the float32 beside it.
                close = np.isclose(values_of(out, out_dtype, shape), expected.double().numpy(), rtol=2**-7, atol=1e-7)
                assert close.all()
                continue
            exact = stored(expected.double().numpy(), out_dtype)
            assert np.array_equal(out.view(np.uint8), exact.view(np.uint8)), f"shape {shape}, {dtypes}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_and_torch_program_agree_on_blocks(case: Case) -> None:
    """The torch program sees the same draws at the same places."""
    from remelt.kernels.torch_program import TorchProgram

    tensors = make_tensors((40, 1000), ["BF16"] * (case.num_models + 1), seed=2)
    geometry = geometry_of(NAME, tensors.shape)
    torch_program = TorchProgram(
        OPERATORS[case.operator],
        apply_of(case),
        geometry,
        base_dtype="BF16" if case.has_base else None,
        dtypes_K=tensors.dtypes[1:],
        out_dtype="BF16",
        streams_K=range(case.num_models),
        seed=11,
        device="cpu",
    )
    by_torch = run_program(torch_program, tensors, "BF16", has_base=case.has_base, cuts=[1, 2])
    by_kernel = run_program(program_of(case, tensors, "BF16"), tensors, "BF16", has_base=case.has_base, cuts=[1, 2])
    if case.operator in REDUCES or case.options.get("rescale") == "l1":
        a, b = (values_of(out, "BF16", tensors.shape) for out in (by_torch, by_kernel))
        assert np.isclose(a, b, rtol=2**-7, atol=1e-7).all()
    else:
        assert np.array_equal(by_torch, by_kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
@given(data=st.data())
@settings(deadline=None, max_examples=4)
def test_any_split_order_and_worker_gives_the_same_bytes(case: Case, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(300, 157), (45, 2000), (3, 90, 301)]))
    tensors = make_tensors(shape, ["BF16"] * (case.num_models + 1), seed=3)
    cuts = data.draw(st.lists(st.integers(1, 6), max_size=4))
    shuffle = random.Random(data.draw(st.integers(0, 1000)))
    whole = run_program(program_of(case, tensors, "BF16"), tensors, "BF16", has_base=case.has_base)
    program = program_of(case, tensors, "BF16", num_workers=3)
    split = run_program(program, tensors, "BF16", has_base=case.has_base, cuts=cuts, shuffle=shuffle, num_workers=3)
    assert np.array_equal(whole, split)


@pytest.mark.parametrize("case", [case for case in CASES if case.num_models in (2, 4)], ids=str)
def test_threads_at_once_give_the_same_bytes(case: Case) -> None:
    tensors = make_tensors((200, 1030), ["BF16"] * (case.num_models + 1), seed=4)
    alone = run_program(program_of(case, tensors, "BF16"), tensors, "BF16", has_base=case.has_base)
    program = program_of(case, tensors, "BF16", num_workers=4)
    if getattr(program, "needs_whole_tensor", False):
        return
    geometry = geometry_of(NAME, tensors.shape)
    out = stored(np.zeros(geometry.num_elements), "BF16")
    blocks = blocks_of(geometry, tensors, case.has_base, range(geometry.num_leaves))
    round_ = 0
    with ThreadPoolExecutor(4) as pool:
        while round_ < program.num_rounds:
            jobs = [
                pool.submit(lambda w, r=round_: [program.measure(r, block, w) for block, _ in blocks[w::4]], worker)
                for worker in range(4)
            ]
            [job.result() for job in jobs]
            program.finish_round(round_)
            round_ += 1
        list(pool.map(lambda pair: program.apply(pair[0], out[pair[1]], 0), blocks))
    assert np.array_equal(alone, out)


@pytest.mark.parametrize("case", [case for case in CASES if case.operator != "assembly_of_experts"], ids=str)
def test_equal_models_merge_to_themselves(case: Case) -> None:
    """Where the weights sum to one and nothing is dropped."""
    options = {k: v for k, v in case.options.items() if k in ("t", "_base", "nuslerp_flatten", "nuslerp_row_wise")}
    plain = Case(case.operator, options, 2)
    tensors = make_tensors((20, 30), ["BF16"] * 3, seed=5)
    tensors = tensors._replace(models_K=(tensors.models_K[0],) * 2)
    apply = apply_of(plain)._replace(coefficients=(0.5, 0.5))
    from remelt.kernels import make_program

    program = make_program(
        apply,
        geometry_of(NAME, tensors.shape),
        base_dtype="BF16" if plain.has_base else None,
        dtypes_K=("BF16", "BF16"),
        out_dtype="BF16",
        streams_K=(0, 1),
        seed=0,
        num_workers=1,
    )
    out = run_program(program, tensors, "BF16", has_base=plain.has_base)
    near = np.abs(values_of(tensors.base, "BF16", tensors.shape)) * 2**-22 if plain.has_base else 0.0
    model = values_of(tensors.models_K[0], "BF16", tensors.shape)
    assert np.all(
        np.abs(values_of(out, "BF16", tensors.shape) - model) <= near + np.abs(model) * 2**-8 * plain.has_base
    )


@pytest.mark.parametrize("case", [case for case in CASES if "lambda" in OPERATORS[case.operator].options], ids=str)
def test_lambda_zero_gives_the_base_bit_for_bit(case: Case) -> None:
    zero = Case(case.operator, {**case.options, "lambda": 0.0}, case.num_models)
    tensors = make_tensors((20, 900), ["BF16"] * (case.num_models + 1), seed=6)
    out = run_program(program_of(zero, tensors, "BF16"), tensors, "BF16", has_base=True)
    assert np.array_equal(out, tensors.base)


@pytest.mark.parametrize("case", [case for case in CASES if case.has_base], ids=str)
def test_untouched_tensor_stays_the_base_bit_for_bit(case: Case) -> None:
    tensors = make_tensors((20, 900), ["BF16"] * (case.num_models + 1), scale=0.0)
    out = run_program(program_of(case, tensors, "BF16"), tensors, "BF16", has_base=True)
    assert np.array_equal(out, tensors.base)


SYMMETRIC = [
    case
    for case in CASES
    if case.operator not in ("slerp", "nuslerp", "assembly_of_experts")
    and not any(isinstance(value, tuple) for value in case.options.values())
    and case.num_models <= 4
]


@pytest.mark.parametrize("case", SYMMETRIC, ids=str)
def test_permuting_models_with_coefficients_and_streams_stays_within_rounding(case: Case) -> None:
    from remelt.kernels import make_program

    tensors = make_tensors((40, 700), ["F32"] * (case.num_models + 1), seed=7)
    outs = []
    for order in (range(case.num_models), range(case.num_models - 1, -1, -1)):
        apply = apply_of(case)._replace(coefficients=tuple(WEIGHTS[i] for i in order))
        program = make_program(
            apply,
            geometry_of(NAME, tensors.shape),
            base_dtype="F32" if case.has_base else None,
            dtypes_K=tensors.dtypes[1:],
            out_dtype="F32",
            streams_K=list(order),
            seed=0,
            num_workers=1,
        )
        ordered = tensors._replace(models_K=tuple(tensors.models_K[i] for i in order))
        outs.append(run_program(program, ordered, "F32", has_base=case.has_base))
    # An election whose votes all but cancel may turn; everything else moves by rounding alone.
    assert np.mean(~np.isclose(outs[0], outs[1], rtol=1e-5, atol=1e-7)) < 1e-4


SCALING = [case for case in SYMMETRIC if case.has_base]


@pytest.mark.parametrize("case", SCALING, ids=str)
def test_doubling_all_task_vectors_doubles_the_merged_one(case: Case) -> None:
    rng = np.random.default_rng(8)
    shape = (30, 600)
    base = np.zeros(shape)
    deltas = [rng.standard_normal(shape) for _ in range(case.num_models)]
    outs = []
    for factor in (1.0, 2.0):
        tensors = make_tensors(shape, ["F32"] * (case.num_models + 1))._replace(
            base=stored(base, "F32"), models_K=tuple(stored(delta * factor, "F32") for delta in deltas)
        )
        outs.append(run_program(program_of(case, tensors, "F32"), tensors, "F32", has_base=True))
    assert np.array_equal(outs[0] * 2, outs[1])
