"""CPU programs of operators that are a weighted sum, once their coefficients are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from remelt.kernels import weighted
from remelt.kernels.codec import copy_bytes
from remelt.kernels.cpu_sources import Sources, address_of
from remelt.kernels.program import Block
from remelt.operators.quantities import difference_norms

Solve = Callable[[NDArray[np.float64], int], NDArray[np.float64] | NDArray[np.float32]]
"""Coefficients (..., K) from Gram matrices (..., K, K); the second argument is the first row they belong to."""


def square(pairs: NDArray[np.float64], num_models: int) -> NDArray[np.float64]:
    """Symmetric matrices (..., K, K) from their upper triangles (..., K (K + 1) / 2)."""
    gram = np.empty((*pairs.shape[:-1], num_models, num_models))
    rows, columns = np.triu_indices(num_models)
    gram[..., rows, columns] = pairs
    gram[..., columns, rows] = pairs
    return gram


def add_leaves(leaves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the first axis in index order, one after the other."""
    total = np.zeros(leaves.shape[1:])
    for leaf in leaves:
        total += leaf
    return total


class FixedSum:
    """A weighted sum whose coefficients are known beforehand."""

    num_rounds = 0

    def __init__(self, sources: Sources, coefficients_K: Sequence[float]) -> None:
        self._sources = sources
        self._coefficients = np.array(coefficients_K, np.float32)

    def measure(self, round_: int, block: Block, worker: int) -> None:
        raise AssertionError("nothing to measure")

    def finish_round(self, round_: int) -> None:
        raise AssertionError("nothing to measure")

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        sources = self._sources
        weighted.weighted_sum(
            sources.addresses(block),
            sources.kinds,
            self._coefficients,
            sources.has_base,
            address_of(out),
            sources.out_kind,
            sources.num_elements(block),
        )


class GramSum(FixedSum):
    """A weighted sum whose coefficients come from the Gram matrix of the whole tensor."""

    num_rounds = 1

    def __init__(self, sources: Sources, solve: Solve) -> None:
        super().__init__(sources, ())
        self._solve = solve
        num_pairs = sources.num_models * (sources.num_models + 1) // 2
        self._leaves = np.zeros((sources.geometry.num_leaves, num_pairs))

    def measure(self, round_: int, block: Block, worker: int) -> None:
        sources = self._sources
        weighted.gram_of_leaves(
            sources.addresses(block),
            sources.kinds,
            sources.has_base,
            sources.leaf_elements,
            sources.num_elements(block),
            self._leaves[block.first_leaf : block.first_leaf + sources.num_leaves(block)],
        )

    def finish_round(self, round_: int) -> None:
        gram = square(add_leaves(self._leaves), self._sources.num_models)
        self._coefficients = np.asarray(self._solve(gram, 0), np.float32)


class RowGramSum(FixedSum):
    """A weighted sum whose coefficients come from the Gram matrix of each row."""

    def __init__(self, sources: Sources, solve: Solve) -> None:
        super().__init__(sources, ())
        self._solve = solve

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        sources = self._sources
        num_models, addresses = sources.num_models, sources.addresses(block)
        row_length, count = sources.geometry.row_length, sources.num_elements(block)
        pairs = np.zeros((block.num_rows, num_models * (num_models + 1) // 2))
        weighted.gram_of_leaves(addresses, sources.kinds, sources.has_base, row_length, count, pairs)
        weighted.weighted_rows(
            addresses,
            sources.kinds,
            np.ascontiguousarray(self._solve(square(pairs, num_models), block.first_row), np.float32),
            sources.has_base,
            row_length,
            False,
            address_of(out),
            sources.out_kind,
            block.num_rows,
        )


class ColumnGramSum(FixedSum):
    """A weighted sum whose coefficients come from the Gram matrix of each column; takes the tensor as one block."""

    needs_whole_tensor = True

    def __init__(self, sources: Sources, solve: Solve) -> None:
        super().__init__(sources, ())
        self._solve = solve

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        sources = self._sources
        num_models, addresses = sources.num_models, sources.addresses(block)
        row_length = sources.geometry.row_length
        pairs = np.zeros((num_models * (num_models + 1) // 2, row_length))
        weighted.gram_of_columns(addresses, sources.kinds, sources.has_base, row_length, block.num_rows, pairs)
        weighted.weighted_rows(
            addresses,
            sources.kinds,
            np.ascontiguousarray(self._solve(square(pairs.T, num_models), 0).T, np.float32),
            sources.has_base,
            row_length,
            True,
            address_of(out),
            sources.out_kind,
            block.num_rows,
        )


class ThresholdSum(FixedSum):
    """Assembly of Experts: a weighted sum where the models differ enough, else the first model's bits."""

    num_rounds = 1

    def __init__(self, sources: Sources, coefficients_K: Sequence[float], threshold: float, normaliser: str) -> None:
        super().__init__(sources, coefficients_K)
        self._threshold, self._normaliser = threshold, normaliser
        self._num_others = sources.num_models - 1
        leaves = sources.geometry.num_leaves
        self._differences = np.zeros((leaves, self._num_others))
        self._first = np.zeros((leaves, 1))
        self._is_kept = False

    def measure(self, round_: int, block: Block, worker: int) -> None:
        sources = self._sources
        addresses, count = sources.addresses(block), sources.num_elements(block)
        leaves = slice(block.first_leaf, block.first_leaf + sources.num_leaves(block))
        for other in range(self._num_others):
            pair, kinds = addresses[[1, other + 2]], sources.kinds[[1, other + 2]]
            sums = np.zeros((sources.num_leaves(block), 1))
            weighted.gram_of_leaves(pair, kinds, True, sources.leaf_elements, count, sums)
            self._differences[leaves, other] = sums[:, 0]
        if self._normaliser == "relative":
            weighted.gram_of_leaves(
                addresses[:2], sources.kinds[:2], False, sources.leaf_elements, count, self._first[leaves]
            )

    def finish_round(self, round_: int) -> None:
        distances_K = difference_norms(
            add_leaves(self._differences).tolist(),
            float(add_leaves(self._first)[0]),
            self._sources.geometry.num_elements,
            self._normaliser,
        )
        self._is_kept = not max(distances_K, default=0.0) > self._threshold

    def apply(self, block: Block, out: NDArray[np.generic], worker: int) -> None:
        sources = self._sources
        if not self._is_kept:
            super().apply(block, out, worker)
        elif sources.dtypes_K[0] == sources.out_dtype:
            copy_bytes(address_of(block.tensors_K[0]), address_of(out), out.nbytes)
        else:
            weighted.weighted_sum(
                sources.addresses(block)[:2],
                sources.kinds[:2],
                np.ones(1, np.float32),
                False,
                address_of(out),
                sources.out_kind,
                sources.num_elements(block),
            )
