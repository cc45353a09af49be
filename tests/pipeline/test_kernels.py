"""The CPU kernels by themselves: conversions, arithmetic without contraction, selection, ranks, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operator_cases import CASES, NAME, Case, apply_of, blocks_of, make_tensors, program_of, run_program, stored
from remelt.errors import OperatorError
from remelt.kernels import codec, count_nonfinite, cpu_thinned, ranks
from remelt.kernels.cpu_sources import address_of
from remelt.kernels.footprint import needs_whole_tensor, num_rounds, program_bytes
from remelt.kernels.program import geometry_of
from remelt.numerics import numerics_tag

_decode = numba.njit(lambda address, kind, count, out: codec.decode(address, kind, 0, count, out))
_encode = numba.njit(lambda values, address, kind, count: codec.encode(values, address, kind, 0, count))
_deal = numba.njit(
    lambda x, down, ranks_, keys, work, n, out: ranks.deal_by_rank(x, len(x), down, ranks_, keys, work, n, out)
)
_radix = numba.njit(
    lambda x, down, ranks_, keys, work, n, out: ranks.radix_deal(x, len(x), down, ranks_, keys, work, n, out)
)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_decoding_matches_torch_on_all_65536_codes(name: str, dtype: torch.dtype) -> None:
    codes = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    _decode(address_of(codes), codec.KINDS[name], 65536, out)
    expected = torch.from_numpy(codes.view(np.int16)).view(dtype).float().numpy()
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(out), is_nan)
    assert np.array_equal(out.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_encoding_rounds_to_nearest_even_as_torch_does(name: str, dtype: torch.dtype) -> None:
    """Every 16-bit value, every midpoint between neighbours, the float32 on both sides of each, and random bits."""
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    finite = np.unique(np.abs(codes[np.isfinite(codes)])).astype(np.float64)
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    beyond = np.float32([65504, 65519.996, 65520, 65536, 3.3895314e38, 3.3961775e38, np.inf, 1e-8, 1e-45, 0.0])
    near = [
        np.nextafter(x, np.float32(sign)) for x in (middles, codes[np.isfinite(codes)]) for sign in (-np.inf, np.inf)
    ]
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([codes, middles, beyond, *near, bits]).astype(np.float32)
    values = np.concatenate([values, -values])
    out = np.empty(values.size, np.uint16)
    _encode(values, address_of(out), codec.KINDS[name], values.size)
    expected = torch.from_numpy(values).to(dtype)
    is_nan = np.isnan(values)
    assert np.array_equal(out[~is_nan], expected.view(torch.int16).numpy().view(np.uint16)[~is_nan])
    assert torch.from_numpy(out.view(np.int16)).view(dtype).isnan().numpy()[is_nan].all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nonfinite_values_are_counted(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal(40_003)
    values[[0, 17, 5000, 40_002]] = [np.nan, np.inf, -np.inf, -np.nan]
    assert count_nonfinite(stored(values, dtype), dtype) == 4
    assert count_nonfinite(stored(np.full(70_001, np.inf), dtype), dtype) == 70_001
    assert count_nonfinite(stored(np.zeros(0), dtype), dtype) == 0


def test_no_product_and_sum_are_fused() -> None:
    """On values where a fused multiply-add gives other bits than a rounded product and a rounded sum."""
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal(50_000).astype(np.float32) for _ in range(2))
    a, b = np.float32(0.3), np.float32(0.7)
    tensors = make_tensors((50_000,), ["F32"] * 3)._replace(models_K=(x, y))
    from remelt.kernels.cpu_sources import Sources
    from remelt.kernels.cpu_weighted import FixedSum

    sources = Sources(geometry_of(NAME, (50_000,)), None, ("F32", "F32"), "F32", 1)
    out = run_program(FixedSum(sources, (a, b)), tensors, "F32", has_base=False)
    separate = x * a + y * b
    fused = (x.astype(np.float64) * np.float64(a) + (y * b).astype(np.float64)).astype(np.float32)
    assert (separate != fused).sum() > 1000
    assert np.array_equal(out, separate)


def _row(kind: str, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "bf16 differences":
        base = rng.standard_normal(size) * 0.02
        pair = [torch.from_numpy(base + rng.standard_normal(size) * s).bfloat16().float() for s in (0, 0.002)]
        return (pair[1] - pair[0]).numpy()
    if kind == "float32":
        return rng.standard_normal(size).astype(np.float32)
    if kind == "few values":
        return rng.choice(np.float32([0, 1e-3, -1e-3, 2.5, 1e-30]), size)
    if kind == "one giant":
        return np.concatenate([rng.standard_normal(size - 1) * 1e-9, [1e20]]).astype(np.float32)
    if kind == "all bits":
        values = rng.integers(0, 2**31, size).astype(np.uint32).view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(0))
    return np.zeros(size, np.float32)


@pytest.mark.parametrize("sort", [_deal, _radix], ids=["deal_by_rank", "radix_deal"])
@pytest.mark.parametrize("kind", ["bf16 differences", "float32", "few values", "one giant", "all bits", "zeros"])
def test_row_ranks_are_those_of_a_stable_sort(kind: str, sort) -> None:
    for size in (1, 2, 7, 1024, 5000, 40_000):
        values = _row(kind, size, size)
        for descending in (False, True):
            work, counts = np.empty((2, size), np.uint64), np.empty(1 << ranks.DIGIT_BITS, np.uint32)
            out = np.empty(size, np.uint64)
            sort(values, descending, np.arange(size, dtype=np.uint64), np.empty(size, np.uint32), work, counts, out)
            order = np.argsort(-np.abs(values) if descending else np.abs(values), kind="stable")
            assert np.array_equal(out[order], np.arange(size))


SELECTIONS = [
    Case("ties", {"density": 0.4}),
    Case("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    Case("ties", {"density": (0.001, 0.5, 0.999, 0.3), "rescale": "l1"}),
]


@pytest.mark.parametrize("case", SELECTIONS, ids=str)
@pytest.mark.parametrize("num_values", [1, 2, 50, None])
def test_gathering_and_counting_select_the_same_elements(
    case: Case, num_values: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `num_values` distinct magnitudes nearly everything ties at the threshold, in many leaves."""
    tensors = make_tensors((140, 1000), ["BF16"] * 5, seed=9)
    if num_values is not None:
        rng = np.random.default_rng(num_values)
        steps = (rng.integers(1, num_values + 1, (4, 140_000)) * rng.choice([-1, 1], (4, 140_000))) * 2.0**-7
        tensors = tensors._replace(
            base=stored(np.ones(140_000), "F32"),
            dtypes=("F32",) * 5,
            models_K=tuple(stored(1 + s, "F32") for s in steps),
        )
    dtype = tensors.dtypes[0]
    from operator_cases import call_torch

    expected = stored(call_torch(case, tensors).double().numpy(), dtype)
    outs = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(cpu_thinned.Banded.__init__, "__kwdefaults__", {"candidate_limit": limit})
        outs.append(run_program(program_of(case, tensors, dtype), tensors, dtype, has_base=True, cuts=[2, 3, 7]))
    assert np.array_equal(outs[0], outs[1])
    if "rescale" not in case.options:
        assert np.array_equal(outs[0], expected)


@given(density=st.floats(1e-6, 1.0), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_ties_keeps_exactly_k_elements(density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40_000))
    delta = rng.integers(-3, 4, n) * 2.0**-5
    tensors = make_tensors((n,), ["F32"] * 2)._replace(
        base=stored(np.zeros(n), "F32"), models_K=(stored(delta, "F32"),)
    )
    out = run_program(program_of(Case("ties", {"density": density}, 1), tensors, "F32"), tensors, "F32", has_base=True)
    kept = max(1, int(density * n))
    largest = np.argsort(-np.abs(delta), kind="stable")[:kept]
    expected = np.zeros(n, np.float32)
    expected[largest] = delta[largest]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_program_holds_no_more_than_its_footprint_says(case: Case) -> None:
    tensors = make_tensors((600, 1024), ["BF16"] * (case.num_models + 1), seed=10)
    geometry = geometry_of(NAME, tensors.shape)
    run_program(program_of(case, tensors, "BF16"), tensors, "BF16", has_base=case.has_base)  # compiles
    block_leaves = 8
    blocks = blocks_of(geometry, tensors, case.has_base, range(0, geometry.num_leaves, block_leaves))
    if needs_whole_tensor(apply_of(case)):
        blocks = blocks_of(geometry, tensors, case.has_base, ())
    out = stored(np.zeros(geometry.num_elements), "BF16")
    tracemalloc.start()
    program = program_of(case, tensors, "BF16")
    assert program.num_rounds <= num_rounds(apply_of(case))
    round_ = 0
    while round_ <= program.num_rounds:
        for block, span in blocks:
            if round_ < program.num_rounds:
                program.measure(round_, block, 0)
            else:
                program.apply(block, out[span], 0)
        if round_ < program.num_rounds:
            program.finish_round(round_)
        round_ += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    projected = program_bytes(apply_of(case), geometry, 1, block_leaves * geometry.leaf_rows * geometry.row_length)
    assert peak <= projected + 64_000, f"{peak} measured, {projected} projected"


@pytest.mark.parametrize("granularity", [{}, {"filter_wise": True}])
def test_model_stock_refuses_its_pole_by_name(granularity: dict) -> None:
    tensors = make_tensors((4, 50), ["F32"] * 3)
    zero, delta = np.zeros(200), np.random.default_rng(0).standard_normal(200)
    tensors = tensors._replace(base=stored(zero, "F32"), models_K=(stored(delta, "F32"), stored(-delta, "F32")))
    with pytest.raises(OperatorError, match=NAME):
        run_program(program_of(Case("model_stock", granularity, 2), tensors, "F32"), tensors, "F32", has_base=True)


def test_assembly_of_experts_keeps_every_bit_of_the_first_model() -> None:
    """NaN payloads, minus zero and float64 included."""
    for dtype in ("BF16", "F64"):
        tensors = make_tensors((10, 20), [dtype] * 3, seed=12)
        first = tensors.models_K[0].copy()
        if dtype == "BF16":
            first[:3] = [0x8000, 0x0001, 0x7F7F]
        tensors = tensors._replace(models_K=(first, first.copy()))
        case = Case("assembly_of_experts", {}, 2)
        out = run_program(program_of(case, tensors, dtype), tensors, dtype, has_base=False)
        assert np.array_equal(out.view(np.uint8), first.view(np.uint8))


def test_numerics_tag_names_device_and_kernel_version() -> None:
    assert numerics_tag("cpu") == "cpu-1"
    assert numerics_tag("cuda:3") == "cuda-1"


GENERIC = """
import sys, hashlib
sys.path[:0] = {paths!r}
from operator_cases import CASES, make_tensors, program_of, run_program
digest = hashlib.sha256()
for case in CASES:
    if case.operator in ("linear", "dare_ties", "model_stock") and not case.options.get("rescale"):
        tensors = make_tensors((50, 500), ["BF16"] * (case.num_models + 1))
        digest.update(run_program(program_of(case, tensors, "BF16"), tensors, "BF16", has_base=case.has_base).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_kernels_compiled_for_a_plain_x86_processor_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent.parent), *sys.path]
    digests = set()
    for cpu in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        env = os.environ | cpu | {"XDG_CACHE_HOME": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "-c", GENERIC.format(paths=paths)], env=env, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1
