"""What programs hold and how often they see their tensor, known before one is made: for the planner's projection.

Plain arithmetic: imports neither numba nor torch.
"""

from __future__ import annotations

from remelt.kernels.program import Geometry
from remelt.operators.quantities import kept_range, per_model
from remelt.operators.spec import OptionValue
from remelt.treatment import Apply

CHUNK_ELEMENTS = 2048
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16
TABLES = 4
"""Interleaved counters for each bin: the same bin again would otherwise wait for its own last store."""
CANDIDATE_LIMIT = 1 << 22
"""Members of a threshold's bin that are gathered at most (8 MiB); more are counted in further rounds instead."""
RADIX_BYTES = 2048 * 4
LANE_BYTES = 64 * 8


def _densities(apply: Apply, options: dict[str, OptionValue]) -> tuple[float, ...]:
    return per_model(options.get("density", 1.0), len(apply.models))  # type: ignore[arg-type]


def _is_banded(apply: Apply, options: dict[str, OptionValue]) -> bool:
    return apply.operator in ("ties", "breadcrumbs", "breadcrumbs_ties") and options.get("granularity") != "row"


def num_rounds(apply: Apply) -> int:
    """Measuring rounds at most; a program may do with fewer."""
    options = dict(apply.options)
    if apply.operator in ("slerp", "assembly_of_experts"):
        return 1
    if apply.operator == "nuslerp":
        return int(bool(options.get("nuslerp_flatten", True)))
    if apply.operator == "model_stock":
        return int(not options.get("filter_wise", False))
    if all(density >= 1 for density in _densities(apply, options)):
        return 0
    selection = 1 if options.get("topk") == "global" else 3 * _is_banded(apply, options)
    return selection + (options.get("rescale") == "l1")


def needs_whole_tensor(apply: Apply) -> bool:
    """Whether a program on CPU takes its tensor as one block."""
    options = dict(apply.options)
    return (
        apply.operator == "nuslerp"
        and not options.get("nuslerp_flatten", True)
        and bool(options.get("nuslerp_row_wise", False))
    )


def program_bytes(apply: Apply, geometry: Geometry, num_workers: int, block_elements: int) -> int:
    """Bytes that a program holds at most, over all its rounds and workers; sources and output are not counted."""
    options = dict(apply.options)
    num_models, leaves, row_length = len(apply.models), geometry.num_leaves, geometry.row_length
    num_pairs = num_models * (num_models + 1) // 2
    scratch = (num_models + 5) * CHUNK_ELEMENTS * 4 + (num_pairs + 2 * num_models) * LANE_BYTES
    if apply.operator in ("linear", "task_arithmetic"):
        return num_workers * scratch
    if apply.operator in ("slerp", "nuslerp", "model_stock", "assembly_of_experts"):
        rows = max(block_elements, row_length) // max(1, row_length)
        per_row = num_pairs + num_models**2 + 4 * num_models + 8
        if needs_whole_tensor(apply):
            return num_workers * (scratch + row_length * per_row * 8)
        if num_rounds(apply):
            return num_workers * scratch + leaves * (num_pairs + 1) * 8
        return num_workers * (scratch + rows * per_row * 8)
    norms = leaves * 2 * num_models * 8 if options.get("rescale") == "l1" else 0
    if _is_banded(apply, options):
        return num_workers * scratch + norms + _selection_bytes(apply, options, geometry, num_workers, block_elements)
    if apply.operator in ("dare_linear", "dare_ties"):
        return num_workers * scratch + norms
    row_scratch = (num_models + 1) * max(CHUNK_ELEMENTS, row_length) * 4 + row_length * (4 + 8 + 16) + RADIX_BYTES
    return num_workers * (scratch + row_scratch) + num_models * row_length * 8 + norms


def _selection_bytes(
    apply: Apply, options: dict[str, OptionValue], geometry: Geometry, num_workers: int, block_elements: int
) -> int:
    num_models, leaves, n = len(apply.models), geometry.num_leaves, geometry.num_elements
    gammas = per_model(options.get("gamma", 0.0), num_models)  # type: ignore[arg-type]
    pairs = zip(_densities(apply, options), gammas, strict=True)
    num_cuts = sum(0 < rank < n for pair in pairs if n for rank in kept_range(n, *pair))
    leaf_bytes = leaves * (num_models * (2 * 4 + 2 * 8) + num_cuts * 3 * 8)
    upper = num_workers * num_models * UPPER_BINS * TABLES * 4 + num_models * UPPER_BINS * 8 * 2
    limit = min(CANDIDATE_LIMIT, n // 16)
    # Gathered members, and each worker's buffer for one block.
    gathered = num_cuts * limit * 2 + LOWER_BINS * 8 + num_workers * num_cuts * (min(limit, block_elements) + 1) * 2
    lower = (num_workers + 2) * num_cuts * LOWER_BINS * 8
    return leaf_bytes + max(upper, gathered, lower)
