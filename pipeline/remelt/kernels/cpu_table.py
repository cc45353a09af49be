"""The explicit table of CPU programs: which one runs an operator, and with what numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from remelt.errors import OperatorError
from remelt.kernels.cpu_sources import Sources
from remelt.kernels.cpu_thinned import Banded, Drawn, GivenBand, Merge, Ranked
from remelt.kernels.cpu_weighted import ColumnGramSum, FixedSum, GramSum, RowGramSum, Solve, ThresholdSum
from remelt.kernels.program import Geometry, Program
from remelt.operators.dropout import half_widths
from remelt.operators.quantities import (
    folded,
    normalized,
    nuslerp_coefficients,
    nuslerp_t,
    per_model,
    slerp_coefficients,
    stock_ratio,
)
from remelt.treatment import Apply

Options = Mapping[str, Any]


class Binding:
    """What a builder is given: the tensor's sources, the operator's numbers, and where its draws come from."""

    def __init__(
        self,
        sources: Sources,
        apply: Apply,
        streams_K: Sequence[int],
        seed: int,
        bands_K: Sequence[tuple[int, int] | None] | None,
    ) -> None:
        self.sources, self.coefficients_K = sources, apply.coefficients
        self.options: Options = dict(apply.options)
        self.streams_K, self.seed, self.bands_K = streams_K, seed, bands_K

    def per_model(self, option: str, default: float) -> tuple[float, ...]:
        return per_model(self.options.get(option, default), self.sources.num_models)

    def merge(self, *, elect: bool, normalize: bool, rescale: str) -> Merge:
        """The tail of a thinning operator, its defaults given."""
        options = self.options
        return Merge(
            tuple(self.coefficients_K),
            options.get("elect", "weighted") if elect else None,
            options.get("normalize", normalize),
            options.get("lambda", 1.0),
            options.get("rescale", rescale),
            options.get("norm_floor", 0.0),
        )


def _linear(binding: Binding) -> Program:
    normalize = binding.options.get("normalize", True)
    return FixedSum(binding.sources, normalized(binding.coefficients_K, normalize, binding.sources.geometry.name))


def _task_arithmetic(binding: Binding) -> Program:
    options = binding.options
    coefficients = folded(binding.coefficients_K, options.get("lambda", 1.0), options.get("normalize", False))
    return FixedSum(binding.sources, coefficients)


def _slerp(binding: Binding) -> Program:
    t = binding.options.get("t", 0.5)
    return GramSum(binding.sources, lambda gram, _: np.array(slerp_coefficients(gram, t)))


def _nuslerp(binding: Binding) -> Program:
    t = nuslerp_t(binding.coefficients_K)

    def solve(gram: Any, _: int) -> Any:
        return nuslerp_coefficients(gram, t)

    if binding.options.get("nuslerp_flatten", True):
        return GramSum(binding.sources, solve)
    if binding.options.get("nuslerp_row_wise", False) and binding.sources.geometry.num_rows > 1:
        return ColumnGramSum(binding.sources, solve)
    return RowGramSum(binding.sources, solve)


def _model_stock(binding: Binding) -> Program:
    options, name, count = binding.options, binding.sources.geometry.name, binding.sources.num_models

    def solve(gram: Any, first_row: int) -> Any:
        ratio = stock_ratio(
            gram,
            clamp=options.get("clamp", False),
            norm_floor=options.get("norm_floor", 0.0),
            name=name,
            first_row=first_row,
        )
        return np.repeat((np.asarray(ratio) / count)[..., None], count, axis=-1)

    solver: Solve = solve
    return (RowGramSum if options.get("filter_wise", False) else GramSum)(binding.sources, solver)


def _assembly_of_experts(binding: Binding) -> Program:
    options = binding.options
    return ThresholdSum(
        binding.sources,
        normalized(binding.coefficients_K, options.get("normalize", True), binding.sources.geometry.name),
        options.get("threshold", 0.0),
        options.get("normaliser", "rms"),
    )


def _by_magnitude(*, elect: bool, normalize: bool, gamma: float) -> Callable[[Binding], Program]:
    def build(binding: Binding) -> Program:
        merge = binding.merge(elect=elect, normalize=normalize, rescale="none")
        if binding.options.get("topk") == "global":
            if binding.bands_K is None:
                raise OperatorError(
                    f"{binding.sources.geometry.name}: `topk: global` needs a survey of the whole model"
                )
            return GivenBand(binding.sources, merge, binding.bands_K)
        density_K, gamma_K = binding.per_model("density", 1.0), binding.per_model("gamma", gamma)
        if binding.options.get("granularity", "tensor") == "row":
            return Ranked.by_rank(binding.sources, merge, density_K, gamma_K)
        return Banded(binding.sources, merge, density_K, gamma_K)

    return build


def _dare(*, elect: bool) -> Callable[[Binding], Program]:
    def build(binding: Binding) -> Program:
        merge = binding.merge(elect=elect, normalize=False, rescale="keep")
        density_K = binding.per_model("density", 1.0)
        return Drawn(binding.sources, merge, density_K, binding.seed, binding.streams_K)

    return build


def _della(*, elect: bool) -> Callable[[Binding], Program]:
    def build(binding: Binding) -> Program:
        merge = binding.merge(elect=elect, normalize=elect, rescale="keep")
        epsilon, window = binding.options.get("epsilon", 0.15), binding.options.get("window", 0.0)
        return Ranked.by_draws(
            binding.sources,
            merge,
            binding.per_model("density", 1.0),
            half_widths(epsilon, window, binding.sources.num_models),
            binding.seed,
            binding.streams_K,
        )

    return build


CPU_PROGRAMS: Mapping[str, Callable[[Binding], Program]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "ties": _by_magnitude(elect=True, normalize=True, gamma=0.0),
    "dare_linear": _dare(elect=False),
    "dare_ties": _dare(elect=True),
    "della": _della(elect=True),
    "della_linear": _della(elect=False),
    "breadcrumbs": _by_magnitude(elect=False, normalize=False, gamma=0.01),
    "breadcrumbs_ties": _by_magnitude(elect=True, normalize=False, gamma=0.01),
    "model_stock": _model_stock,
    "assembly_of_experts": _assembly_of_experts,
}


def make_cpu_program(
    apply: Apply,
    geometry: Geometry,
    *,
    base_dtype: str | None,
    dtypes_K: Sequence[str],
    out_dtype: str,
    streams_K: Sequence[int],
    seed: int,
    num_workers: int,
    bands_K: Sequence[tuple[int, int] | None] | None = None,
) -> Program:
    """Make the CPU program of an operator of this package."""
    sources = Sources(geometry, base_dtype, dtypes_K, out_dtype, num_workers)
    return CPU_PROGRAMS[apply.operator](Binding(sources, apply, streams_K, seed, bands_K))
