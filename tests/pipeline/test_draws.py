"""Draws: one function in three forms, and nothing in it that a mask could be seen through."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.draws import draw_bits, draw_keys, keep_threshold
from remelt.kernels import masks
from remelt.kernels.torch_program import draw_bits as torch_draw_bits

# Parts of kernels have no wrapper for Python of their own.
_draw_run = numba.njit(masks.draw_run.py_func)
_drop_chunk = numba.njit(masks.drop_chunk.py_func)


def _by_kernel(seed: int, stream: int, name: str, start: int, count: int) -> np.ndarray:
    highs = range(((start + count) >> 32) + 1)
    keys = np.array([draw_keys(seed, stream, name, high) for high in highs], np.uint32)
    out = np.empty(count, np.uint32)
    _draw_run(keys, start, count, out)
    return out


@given(
    seed=st.integers(0, 2**63),
    stream=st.integers(0, 40),
    name=st.text(min_size=1, max_size=20),
    start=st.sampled_from([0, 1, 977, 2**31 - 5, 2**32 - 7, 2**32, 3 * 2**32 - 2]),
    count=st.integers(1, 40),
)
@settings(deadline=None, max_examples=60)
def test_numpy_numba_and_torch_draw_the_same_bits(seed: int, stream: int, name: str, start: int, count: int) -> None:
    bits = draw_bits(seed, stream, name, start, count)
    assert np.array_equal(bits, _by_kernel(seed, stream, name, start, count))
    assert np.array_equal(bits, torch_draw_bits(seed, stream, name, start, count).numpy().view(np.uint32))


def test_draws_do_not_depend_on_where_a_tensor_is_cut() -> None:
    whole = draw_bits(3, 1, "w", 0, 5000)
    parts = [draw_bits(3, 1, "w", start, 1250) for start in range(0, 5000, 1250)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_known_draws_never_change() -> None:
    """Golden: a change of these numbers changes every published mask, and needs another numerics tag."""
    assert draw_bits(0, 0, "w", 0, 4).tolist() == [1989577419, 4207801382, 655284102, 2983340409]
    assert draw_bits(2**40, 7, "model.norm.weight", 2**32 - 1, 2).tolist() == [1910081171, 3883464410]


def test_bits_are_uniform_over_many_seeds() -> None:
    """Chi-square of the top and of the lowest byte over 200 seeds of 4,096 draws: 255 degrees of freedom."""
    bits = np.concatenate([draw_bits(seed, 0, "w", 0, 4096) for seed in range(200)])
    for shift in (0, 8, 16, 24):
        counts = np.bincount((bits >> np.uint32(shift)) & np.uint32(255), minlength=256)
        expected = bits.size / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255), shift


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_kept_fraction_is_the_density_for_every_seed(density: float) -> None:
    n = 20_000
    for seed in range(50):
        kept = int((draw_bits(seed, seed % 3, "layer", 0, n) < keep_threshold(density)).sum())
        assert abs(kept / n - density) < 5 * np.sqrt(density * (1 - density) / n)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 0, "w"), (1, 0, "w")), ((0, 0, "w"), (0, 1, "w")), ((5, 2, "layers.1.w"), (5, 2, "layers.2.w"))],
)
def test_neighbouring_keys_give_uncorrelated_masks(one: tuple, other: tuple) -> None:
    n = 100_000
    a, b = (draw_bits(*key, 0, n).astype(np.float64) for key in (one, other))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    # Nor is one mask the other one shifted, or taken under an exclusive or.
    left, right = a[:4096] < 2**31, b[:4096] < 2**31
    shifted = np.correlate(np.tile(left - 0.5, 2), right - 0.5, "valid") / 4096 * 4
    assert np.abs(shifted).max() < 6 / np.sqrt(4096)
    places = np.arange(4096)
    for flip in (1, 2, 3, 64, 255, 1024, 4095):
        assert abs(np.mean(left[places ^ flip] == right) - 0.5) < 5 * 0.5 / np.sqrt(4096)


@pytest.mark.parametrize("row_length", [1, 64, 1000, 1024, 4096])
def test_rows_of_a_mask_are_uncorrelated(row_length: int) -> None:
    n = 100_000
    bits = draw_bits(9, 0, "w", 0, n + row_length).astype(np.float64)
    assert abs(np.corrcoef(bits[:n], bits[row_length:])[0, 1]) < 5 / np.sqrt(n)


def test_drop_keeps_exactly_the_draws_below_the_threshold_across_a_span() -> None:
    start, count = 2**32 - 1000, 2000
    keys = np.array([draw_keys(1, 2, "w", high) for high in (0, 1)], np.uint32)
    values = np.ones(count, np.float32)
    _drop_chunk(values, count, keys, start, np.uint32(keep_threshold(0.25)))
    assert np.array_equal(values == 1, draw_bits(1, 2, "w", start, count) < keep_threshold(0.25))
