"""How CPU kernels are compiled: numba without fast-math, without the GIL, cached on disk.

The cache lies in the user's cache folder under a digest of the kernels' own sources, because numba notices a change in
the file of a function but not in the files of the functions that it calls. That folder also serves an installation that
nobody may write to; where no folder can be written, kernels compile anew in each process.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import numba
from numba.core import config

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def cache_dir() -> str:
    """Where compiled kernels of exactly these sources are kept."""
    digest = hashlib.sha256(numba.__version__.encode())
    # The constants of the draws are compiled into the kernels.
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "draws.py"):
        digest.update(path.read_bytes())
    parent = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return str(Path(parent) / "remelt" / "kernels" / digest.hexdigest()[:16])


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile for this CPU at the first call.

    fastmath off: IEEE operations in the order written, no contraction of a product and a sum.
    """
    return _jit(function, {})


def part(function: Callable[P, R]) -> Callable[P, R]:
    """As `compiled`, for a function that only kernels call: without wrappers for Python, which take time to compile."""
    return _jit(function, {"no_cpython_wrapper": True, "no_cfunc_wrapper": True})


def _jit(function: Callable[P, R], extra: dict[str, bool]) -> Callable[P, R]:
    options = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False} | extra
    before = config.CACHE_DIR
    config.CACHE_DIR = before or cache_dir()
    try:
        kernel: Callable[P, R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba's words for "no folder to cache in"
        kernel = numba.njit(cache=False, **options)(function)
    finally:
        config.CACHE_DIR = before
    return kernel
