"""What the linear minimisation oracle sees: sums of inner products over blocks of tensors.

One pass over the pool (`remelt.inner_products`) gives a number for each tensor and vertex; layers and the whole model
are sums of them. Shape suffixes: B blocks, V vertices, T tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from remelt.tensor_classes import classify

Matrix: TypeAlias = NDArray[np.float64]
Granularity: TypeAlias = Literal["model", "layer", "tensor"]
Oracle: TypeAlias = Literal["inner", "cosine"]

GRANULARITIES: tuple[Granularity, ...] = ("model", "layer", "tensor")
ORACLES: tuple[Oracle, ...] = ("inner", "cosine")


class Blocks(NamedTuple):
    """Which tensors share a row of coefficients."""

    granularity: Granularity
    names_T: tuple[str, ...]
    labels_B: tuple[str, ...]
    """`model`; `layer 3` and, outside the layers, the tensor class; or the tensor's name."""
    of_T: tuple[int, ...]
    """The block of each tensor."""

    @property
    def num_blocks(self) -> int:
        return len(self.labels_B)


def group_tensors(names: Sequence[str], granularity: Granularity, num_hidden_layers: int | None = None) -> Blocks:
    """Cut tensors into blocks; blocks are in the order in which they are first met."""

    def label(name: str) -> str:
        if granularity == "model":
            return "model"
        found = classify(name, num_hidden_layers)
        return name if granularity == "tensor" else found.kind if found.layer is None else f"layer {found.layer}"

    labels_T = [label(name) for name in names]
    places = {each: place for place, each in enumerate(dict.fromkeys(labels_T))}
    return Blocks(granularity, tuple(names), tuple(places), tuple(places[each] for each in labels_T))


class TensorProducts(NamedTuple):
    """What one pass over the pool found, for each tensor that the gradient has."""

    names_T: tuple[str, ...]
    products_TV: Matrix
    """Inner products of the gradient with the vertices: task vectors, or the weights themselves."""
    squares_TV: Matrix
    """Of the vertices; zeros where they were not asked for."""
    gradient_squares_T: Matrix

    def with_squares_of(self, other: TensorProducts) -> TensorProducts:
        """These products with the squares of an earlier pass: the pool does not change, its norms need one reading."""
        assert self.names_T == other.names_T
        return self._replace(squares_TV=other.squares_TV)


def block_products(found: TensorProducts, blocks: Blocks) -> Matrix:
    """Inner products (B, V), tensors added in their order."""
    return _sum_blocks(found.names_T, found.products_TV, blocks)


def oracle_scores(found: TensorProducts, blocks: Blocks, oracle: Oracle) -> Matrix:
    """What the linear minimisation oracle minimises, (B, V).

    `inner` is Frank-Wolfe's own. `cosine` is what the code of FW-Merging computes: the sum over the block's tensors of
    the cosine between gradient and vertex; a tensor or a gradient of zeros counts as 0.
    """
    if oracle == "inner":
        return block_products(found, blocks)
    norms_TV = np.sqrt(found.gradient_squares_T)[:, None] * np.sqrt(found.squares_TV)
    cosines_TV = np.divide(found.products_TV, norms_TV, out=np.zeros_like(found.products_TV), where=norms_TV > 0)
    return _sum_blocks(found.names_T, cosines_TV, blocks)


def _sum_blocks(names: Sequence[str], values_TV: Matrix, blocks: Blocks) -> Matrix:
    of_name = dict(zip(blocks.names_T, blocks.of_T, strict=True))
    sums_BV = np.zeros((blocks.num_blocks, values_TV.shape[1]))
    for name, values_V in zip(names, values_TV, strict=True):
        sums_BV[of_name[name]] += values_V
    return sums_BV
