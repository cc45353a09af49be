"""What a selection stands on: pool, base and calibration text, opened and planned before anything is merged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from remelt.checkpoint import CheckpointIndex
from remelt.errors import RecipeError
from remelt.executor import Executor
from remelt.formats import open_checkpoint
from remelt.hub import is_local
from remelt.inner_products import plan_products
from remelt.merge import open_checkpoints
from remelt.oracle import Blocks, group_tensors
from remelt.planner import build_plan
from remelt_evals.calibration import Blocks as TokenBlocks
from remelt_evals.calibration import make_blocks
from remelt_evals.loss_gradient import load_tokenizer
from remelt_jobs.candidates import checkpoint_identity, with_absolute_paths
from remelt_jobs.journal import Record
from remelt_jobs.selection_config import SelectionConfig


class Ground(NamedTuple):
    """What a selection stands on, read before it begins."""

    vertices_V: tuple[CheckpointIndex, ...]
    base: CheckpointIndex | None
    """What task vectors are taken from; None where vertices are weights."""
    layout: CheckpointIndex
    blocks: Blocks
    tokens: TokenBlocks
    held_out: TokenBlocks
    identity: Record
    notes: tuple[str, ...]


def survey_ground(config: SelectionConfig, executor: Executor) -> Ground:
    """Open, tokenise and plan: refuses in seconds what could not be merged or measured."""
    hull = config.hull
    # Every vertex takes part in this recipe, so that all of them are compared with each other.
    uniform = np.full((1, len(hull.vertices)), 1.0 / len(hull.vertices))
    recipe = with_absolute_paths(hull.recipe(uniform, None))
    indexes = open_checkpoints(recipe)
    plan = build_plan(recipe, indexes, executor.budget())
    if plan.warnings:
        raise RecipeError("this pool cannot be merged: " + "; ".join(plan.warnings))
    by_source = {ref.source: index for ref, index in zip(recipe.checkpoints, indexes, strict=True)}
    absolute = [_absolute(source) for source in hull.sources]
    vertices_V = tuple(by_source.get(source) or open_checkpoint(source) for source in absolute)
    base = None
    if config.target == "deltas" and hull.base is not None:
        source = _absolute(hull.base)
        base = by_source.get(source) or open_checkpoint(source)
    layout = indexes[recipe.layout]
    names = [tensor.name for unit in plan.units for tensor in unit.tensors if not tensor.is_copy]
    if not names:
        raise RecipeError("the rules copy every tensor; nothing is left to select")
    blocks = group_tensors(names, config.granularity)
    # The gradient does not exist yet; the layout's own tensors stand for it.
    plan_products(layout, vertices_V, base=base, names=set(names), budget=executor.budget())
    positions = layout.config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < config.calibration.block_tokens:
        raise RecipeError(
            f"calibration: blocks of {config.calibration.block_tokens} tokens were asked for, {layout.source} knows "
            f"{positions} positions; give a block_tokens of at most that"
        )
    tokenizer = load_tokenizer(Path(layout.root), trust_remote_code=config.loss.trust_remote_code)
    tokens, held_out = make_blocks(config.calibration, tokenizer, seed=config.seed)
    notes = list(plan.notes)
    if not hull.is_linear:
        notes.append(
            f"{hull.merge_method} is not linear in its coefficients: directions follow the gradient at the merge as if "
            "it were, and the duality gap is no bound; line searches see the true loss"
        )
    identity = {
        "type": "selection",
        "selection_id": config.selection_id,
        "canonical": config.canonical(),
        "inputs": {name: checkpoint_identity(index) for name, index in zip(hull.vertices, vertices_V, strict=True)},
        "layout": checkpoint_identity(layout),
        "calibration": [tokens.digest, held_out.digest],
        "numerics": plan.settings.numerics,
    }
    return Ground(vertices_V, base, layout, blocks, tokens, held_out, identity, tuple(notes))


def _absolute(source: str) -> str:
    return str(Path(source).expanduser().absolute()) if is_local(source) else source
