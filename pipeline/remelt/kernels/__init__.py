"""Kernels: what makes one tensor's operator run, on CPU by numba, elsewhere by torch; `program` holds the contract.

Importing this package imports neither numba nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from remelt.errors import OperatorError
from remelt.kernels.program import Geometry, Program
from remelt.operators import OPERATORS, load_operators
from remelt.treatment import Apply

if TYPE_CHECKING:
    from remelt.operators.spec import Operator

KERNEL_VERSION = 1
"""Raised when the same call gives other bytes; part of every numerics tag."""


def _operator(name: str) -> Operator:
    operator = OPERATORS.get(name) or load_operators().get(name)
    if operator is None:
        raise OperatorError(f"unknown operator {name!r}; there are {', '.join(sorted(OPERATORS))}")
    return operator


def make_program(
    apply: Apply,
    geometry: Geometry,
    *,
    base_dtype: str | None,
    dtypes_K: Sequence[str],
    out_dtype: str,
    streams_K: Sequence[int],
    seed: int,
    num_workers: int,
    device: str = "cpu",
    bands_K: Sequence[tuple[int, int] | None] | None = None,
) -> Program:
    """Bind an operator with its coefficients and options to one tensor.

    `streams_K` and `seed` choose the draws. On the CPU the kernels run; another device, and an operator that has no
    kernel, run the operator's torch function. `bands_K` are what a survey found for
    an operator that ranks whole models.
    """
    operator = _operator(apply.operator)
    if operator.base == "required" and base_dtype is None:
        raise OperatorError(f"{geometry.name}: {apply.operator} needs a base model")
    if problem := operator.check_coefficients(apply.coefficients, dict(apply.options)):
        raise OperatorError(f"{geometry.name}: {problem}")
    if device == "cpu" and apply.operator in OPERATORS:
        from remelt.kernels.cpu_table import make_cpu_program

        return make_cpu_program(
            apply,
            geometry,
            base_dtype=base_dtype if operator.base != "none" else None,
            dtypes_K=dtypes_K,
            out_dtype=out_dtype,
            streams_K=streams_K,
            seed=seed,
            num_workers=num_workers,
            bands_K=bands_K,
        )
    from remelt.kernels.torch_program import TorchProgram

    return TorchProgram(
        operator,
        apply,
        geometry,
        base_dtype=base_dtype,
        dtypes_K=dtypes_K,
        out_dtype=out_dtype,
        streams_K=streams_K,
        seed=seed,
        device=device,
    )


def count_nonfinite(bits: NDArray[np.generic], dtype: str) -> int:
    """NaN and Inf among stored bits of a floating dtype of 16 bits or more."""
    from remelt.kernels.codec import KINDS, nonfinite
    from remelt.kernels.cpu_sources import address_of

    flat = np.ascontiguousarray(bits).reshape(-1)
    return int(nonfinite(address_of(flat), KINDS[dtype], flat.size)) if flat.size else 0
