"""The weighted sum adds models in their order, one rounding for each product and sum, however many it takes at once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoint_files import bf16
from remelt.kernels import weighted
from remelt.kernels.codec import KINDS
from remelt.kernels.cpu_sources import address_of

COUNT = 5000


def one_after_the_other(
    models_K: list[NDArray[np.float32]], coefficients: NDArray[np.float32], base: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    total: NDArray[np.float32] | None = None
    for values, coefficient in zip(models_K, coefficients, strict=True):
        term = (values if base is None else values - base) * coefficient
        total = term if total is None else total + term
    assert total is not None
    return total if base is None else base + total


@pytest.mark.parametrize("has_base", [False, True], ids=["sum", "with base"])
@pytest.mark.parametrize("odd_one", [None, 0, 2, 5], ids=["bf16", "first f32", "third f32", "sixth f32"])
@pytest.mark.parametrize("num_models", [1, 3, 4, 5, 8, 9])
def test_bits_are_those_of_adding_one_after_the_other(num_models: int, odd_one: int | None, has_base: bool) -> None:
    rng = np.random.default_rng(num_models)
    stored, models_K = [], []
    for place in range(num_models + 1):
        values = rng.standard_normal(COUNT).astype(np.float32)
        # Signed zeros, too: a sum that starts from zero would lose their signs.
        values[:: place + 3] = -0.0
        bits = bf16(values)[1]
        models_K.append((bits.astype(np.uint32) << 16).view(np.float32))
        stored.append(bits)
    dtypes = ["BF16"] * (num_models + 1)
    if odd_one is not None and odd_one < num_models:
        stored[odd_one + 1] = models_K[odd_one + 1]
        dtypes[odd_one + 1] = "F32"
    coefficients = rng.standard_normal(num_models).astype(np.float32)
    out = np.empty(COUNT, np.float32)
    weighted.weighted_sum(
        np.array([address_of(array) for array in stored], np.uint64),
        np.array([KINDS[dtype] for dtype in dtypes], np.int64),
        coefficients,
        has_base,
        address_of(out),
        KINDS["F32"],
        COUNT,
    )
    expected = one_after_the_other(models_K[1:], coefficients, models_K[0] if has_base else None)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
