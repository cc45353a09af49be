"""Shared by the tests of operators and kernels: tensors as stored bits, and a small stand-in for the unit runner."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from remelt.draws import draw_bits
from remelt.dtypes import DTYPES
from remelt.kernels import make_program
from remelt.kernels.program import Block, Geometry, Program, geometry_of
from remelt.operators import OPERATORS
from remelt.treatment import Apply

torch.set_num_threads(1)  # the tensors are small; threads of several test runs would only wait for each other

Bits = NDArray[np.generic]

SHAPES: tuple[tuple[int, ...], ...] = (
    (3, 5, 14),
    (300, 157),
    (33,),
    (40000,),
    (1, 7),
    (9, 1),
    (1,),
    (),
    (0,),
    (3, 0),
)
SEED, NAME = 11, "model.layers.0.mlp.up_proj.weight"


class Case(NamedTuple):
    """An operator with options as recipes write them."""

    operator: str
    options: Mapping[str, Any]
    num_models: int = 4

    def __str__(self) -> str:
        return "-".join([self.operator, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def has_base(self) -> bool:
        return OPERATORS[self.operator].base == "required" or bool(self.options.get("_base"))


CASES = (
    Case("linear", {}),
    Case("linear", {"normalize": False}, 6),
    Case("task_arithmetic", {"lambda": 0.7}),
    Case("task_arithmetic", {"normalize": True}, 1),
    Case("slerp", {"t": 0.3}, 2),
    Case("nuslerp", {}, 2),
    Case("nuslerp", {"_base": True}, 2),
    Case("nuslerp", {"nuslerp_flatten": False}, 2),
    Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    Case("ties", {"density": 0.4}),
    Case("ties", {"density": 1.0, "lambda": 0.5}, 6),
    Case("ties", {"density": (0.1, 0.9, 1.0), "elect": "unweighted", "normalize": False}, 3),
    Case("ties", {"density": 0.4, "granularity": "row"}),
    Case("ties", {"density": 0.4, "rescale": "l1"}),
    Case("dare_linear", {"density": 0.3}),
    Case("dare_linear", {"density": 0.3, "rescale": "l1", "normalize": True}),
    Case("dare_ties", {"density": 0.3}),
    Case("dare_ties", {"density": (0.3, 1.0, 0.7, 0.1, 0.5), "normalize": True, "elect": "unweighted"}, 5),
    Case("dare_ties", {"density": 0.3, "rescale": "none"}, 2),
    Case("della", {"density": 0.5}),
    Case("della", {"density": 0.5, "window": 0.6, "elect": "unweighted"}, 6),
    Case("della", {"density": 1.0}),
    Case("della", {"density": (0.5, 0.4), "epsilon": (0.1, 0.39), "rescale": "l1"}, 2),
    Case("della_linear", {"density": 0.5}),
    Case("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    Case("breadcrumbs", {"density": 0.9, "gamma": 0.0}),
    Case("breadcrumbs", {"density": 0.6, "gamma": 0.1, "granularity": "row"}),
    Case("breadcrumbs_ties", {"density": 0.95, "gamma": (0.1, 0.0, 0.02, 0.3), "normalize": True}),
    Case("breadcrumbs_ties", {"density": 0.5, "rescale": "l1", "elect": "unweighted"}),
    Case("model_stock", {}),
    Case("model_stock", {"clamp": True}, 2),
    Case("model_stock", {"filter_wise": True}, 3),
    Case("assembly_of_experts", {}, 3),
    Case("assembly_of_experts", {"threshold": 1e9, "normaliser": "abs"}, 3),
    Case("assembly_of_experts", {"threshold": 0.01, "normaliser": "relative"}, 2),
)
WEIGHTS = (0.4, 0.3, 0.5, -0.2, 0.25, 0.35)


def shapes_of(case: Case) -> tuple[tuple[int, ...], ...]:
    """All shapes; but task vectors of one or two elements point against each other often, Model Stock's pole."""
    if case.operator == "model_stock":
        return tuple(shape for shape in SHAPES if np.prod(shape) > 30 or 0 in shape)
    return SHAPES


def stored(values: NDArray[np.float64], dtype: str) -> Bits:
    """Flat stored bits of a tensor."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, DTYPES[dtype].torch_name)).reshape(-1)
    return tensor.view(torch.int16).numpy().view(np.uint16) if DTYPES[dtype].item_bits == 16 else tensor.numpy()


def tensor_of(bits: Bits, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    plain = torch.from_numpy(bits.view(np.int16) if bits.dtype == np.uint16 else bits)
    return plain.view(getattr(torch, DTYPES[dtype].torch_name)).reshape(shape)


def values_of(bits: Bits, dtype: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Stored bits as float64, which is exact."""
    return tensor_of(bits, dtype, shape).double().numpy()


class Tensors(NamedTuple):
    """A base and K models of one shape, as stored bits."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """Of the base, then of each model."""
    base: Bits
    models_K: tuple[Bits, ...]


def make_tensors(shape: tuple[int, ...], dtypes: Sequence[str], seed: int = 0, scale: float = 0.1) -> Tensors:
    """Normal weights of 0.02, task vectors a tenth of that; some elements are left as they were."""
    rng = np.random.default_rng([seed, *shape])
    base = rng.standard_normal(shape) * 0.02
    models = []
    for dtype in dtypes[1:]:
        delta = rng.standard_normal(shape) * 0.02 * scale * (rng.random(shape) < 0.95)
        models.append(stored(values_of(stored(base, dtypes[0]), dtypes[0], shape) + delta, dtype))
    return Tensors(shape, tuple(dtypes), stored(base, dtypes[0]), tuple(models))


def apply_of(case: Case) -> Apply:
    options = {key: value for key, value in case.options.items() if not key.startswith("_")}
    declared = OPERATORS[case.operator].options
    full = {name: options.get(name, option.default) for name, option in declared.items()}
    assert options.keys() <= declared.keys()
    return Apply(
        case.operator,
        0 if case.has_base else None,
        tuple(range(1, case.num_models + 1)),
        WEIGHTS[: case.num_models],
        tuple(sorted(full.items())),
    )


def program_of(case: Case, tensors: Tensors, out_dtype: str, num_workers: int = 1, **kwargs: Any) -> Program:
    return make_program(
        apply_of(case),
        geometry_of(NAME, tensors.shape),
        base_dtype=tensors.dtypes[0] if case.has_base else None,
        dtypes_K=tensors.dtypes[1:],
        out_dtype=out_dtype,
        streams_K=range(case.num_models),
        seed=SEED,
        num_workers=num_workers,
        **kwargs,
    )


def blocks_of(geometry: Geometry, tensors: Tensors, has_base: bool, cuts: Sequence[int]) -> list[tuple[Block, slice]]:
    """Blocks of whole leaves that begin at the leaf numbers `cuts` and at leaf 0."""
    starts = sorted({0, *(cut for cut in cuts if 0 < cut < geometry.num_leaves)})
    blocks = []
    for first_leaf, stop_leaf in zip(starts, [*starts[1:], max(1, geometry.num_leaves)], strict=True):
        first = first_leaf * geometry.leaf_rows
        stop = min(geometry.num_rows, stop_leaf * geometry.leaf_rows)
        span = slice(first * geometry.row_length, stop * geometry.row_length)
        base = tensors.base[span] if has_base else None
        models = tuple(model[span] for model in tensors.models_K)
        blocks.append((Block(first_leaf, first, stop - first, base, models), span))
    return blocks


def run_program(
    program: Program,
    tensors: Tensors,
    out_dtype: str,
    *,
    has_base: bool,
    cuts: Sequence[int] = (),
    shuffle: random.Random | None = None,
    num_workers: int = 1,
) -> Bits:
    """Drive a program over blocks, in any order and by any worker where `shuffle` is given."""
    geometry = geometry_of(NAME, tensors.shape)
    if getattr(program, "needs_whole_tensor", False):
        cuts = ()
    out = stored(np.full(geometry.num_elements, 7.0), out_dtype)
    round_ = 0
    while True:
        blocks = blocks_of(geometry, tensors, has_base, cuts)
        if shuffle is not None:
            shuffle.shuffle(blocks)
        for block, span in blocks:
            worker = shuffle.randrange(num_workers) if shuffle is not None else 0
            if round_ < program.num_rounds:
                program.measure(round_, block, worker)
            else:
                program.apply(block, out[span], worker)
        if round_ >= program.num_rounds:
            return out
        program.finish_round(round_)
        round_ += 1


def bits_of(case: Case, shape: tuple[int, ...]) -> list[NDArray[np.uint32]]:
    """The draws that a program of this case uses, (K, N)."""
    num = int(np.prod(shape))
    return [draw_bits(SEED, stream, NAME, 0, num) for stream in range(case.num_models)]


def keywords(case: Case) -> dict[str, Any]:
    """The case's options as keywords of the operator's function."""
    operator = OPERATORS[case.operator]
    return {operator.keyword(key): value for key, value in case.options.items() if not key.startswith("_")}


def call_torch(case: Case, tensors: Tensors) -> torch.Tensor:
    """The pure function on the whole tensor."""
    operator = OPERATORS[case.operator]
    models = [tensor_of(x, d, tensors.shape) for x, d in zip(tensors.models_K, tensors.dtypes[1:], strict=True)]
    base = tensor_of(tensors.base, tensors.dtypes[0], tensors.shape) if case.has_base else None
    kwargs = keywords(case)
    if operator.is_random:
        kwargs["draws"] = [torch.from_numpy(bits.view(np.int32)) for bits in bits_of(case, tensors.shape)]
    result: torch.Tensor = operator.function(base, models, WEIGHTS[: case.num_models], **kwargs)
    return result
