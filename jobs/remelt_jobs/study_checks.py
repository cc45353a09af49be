"""What is refused before a study begins or goes on: another's directory, another study, other weights, no plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from remelt.checkpoint import CheckpointIndex
from remelt.commit import MANIFEST_FILE, WORK_DIR
from remelt.errors import NumericsError, RecipeError, StudyError
from remelt.merge import open_checkpoints
from remelt.planner import Budget, build_plan
from remelt_jobs.candidates import checkpoint_identity, starting_candidates
from remelt_jobs.journal import Record
from remelt_jobs.study_config import Evaluators, StudyConfig
from remelt_jobs.study_result import BEST, EVALUATIONS, RESULT_FILE
from remelt_jobs.study_state import StudyState


def refuse_foreign(output: Path) -> None:
    """Refuse a directory that is no study's but holds something by a name that a study writes."""
    if (output / "journal").is_dir():
        return
    taken = [
        name
        for name in (BEST, EVALUATIONS, RESULT_FILE, "lease", "journal", MANIFEST_FILE, WORK_DIR)
        if (output / name).exists()
    ]
    if taken:
        raise StudyError(f"{output} holds {', '.join(taken)}, and no study of ours; choose another --output")


def check_identity(config: StudyConfig, state: StudyState, output: Path) -> None:
    if state.identity is not None and state.identity["study_id"] != config.study_id:
        known, asked = state.identity["canonical"], config.canonical()
        changed = ", ".join(key for key in asked if asked[key] != known.get(key)) or "its form"
        raise StudyError(
            f"{output} holds another study ({state.identity['study_id'][:12]}, this one is {config.study_id[:12]}; "
            f"they differ in: {changed}); choose another --output"
        )


def check_inputs(identity: Record, state: StudyState, output: Path) -> None:
    """Refuse to go on with other weights, or with arithmetic that may give other bytes."""
    known = state.identity
    if known is None:
        return
    changed = [name for name, digest in identity["inputs"].items() if known["inputs"].get(name) != digest]
    if changed:
        raise StudyError(
            f"{', '.join(changed)} changed since the study in {output} began, so its scores no longer hold; "
            "put the old weights back, or choose another --output"
        )
    if known["numerics"] != identity["numerics"]:
        raise NumericsError(
            f"{output} was begun with numerics {known['numerics']}, this host computes with "
            f"{identity['numerics']}; go on where it was begun, or choose another --output"
        )


def check_cluster(kind: str, evaluators: Evaluators) -> None:
    """Refuse evaluators that a cluster started on the spot can never hold; one that is joined may still grow."""
    import ray

    total = ray.cluster_resources()
    if kind == "started" and evaluators.gpus > total.get("GPU", 0):
        raise StudyError(
            f"each evaluator asks for {evaluators.gpus:g} GPUs, this machine has {total.get('GPU', 0):g}; ask for less "
            "under `evaluators:`, or set RAY_ADDRESS to a cluster that has them"
        )


def _check_memory(
    config: StudyConfig, values: Mapping[str, float], indexes: Sequence[CheckpointIndex], size: int
) -> None:
    """Refuse candidates that an evaluator could not merge together within the memory that it asks for.

    Raises:
        BudgetError: their plan is above half of it, which is what a merge may hold.
        StudyError: the plan and the models of all of them are above it.
    """
    evaluators = config.evaluators
    if evaluators.memory_bytes is None:
        return
    budget = Budget(memory_bytes=evaluators.memory_bytes // 2, threads=max(1, int(evaluators.cpus)))
    plan = build_plan([config.recipe.bind(values)] * evaluators.together, indexes, budget)
    needed = plan.projection.total_bytes + evaluators.together * size
    if evaluators.together > 1 and evaluators.resident and needed > evaluators.memory_bytes:
        raise StudyError(
            f"evaluators: {evaluators.together} candidates together take {needed / 1e9:.2f} GB (a model of "
            f"{size / 1e9:.2f} GB each, and the merge), above `memory: {evaluators.memory_bytes / 1e9:.2f} GB`; give "
            "more, take fewer together, or send them by disk with `resident: false`"
        )


def plan_ahead(config: StudyConfig) -> Record:
    """Refuse in seconds what could not be merged; returns the study's first record."""
    indexes = open_checkpoints(config.recipe)
    uniform = starting_candidates(config.recipe, config.space)[0]
    plan = build_plan(config.recipe.bind(uniform.values), indexes)
    if plan.warnings:
        raise RecipeError("this recipe cannot be searched: " + "; ".join(plan.warnings))
    evaluators, size = config.evaluators, plan.write_bytes
    num_candidates = evaluators.count * evaluators.together
    if evaluators.disk_bytes is not None and size * num_candidates > evaluators.disk_bytes:
        raise StudyError(
            f"{num_candidates} candidates of {size / 1e9:.2f} GB lie on disk at one time, above the "
            f"{evaluators.disk_bytes / 1e9:.2f} GB of `evaluators: disk`; give more, or have fewer evaluators"
        )
    _check_memory(config, uniform.values, indexes, size)
    return {
        "type": "study",
        "study_id": config.study_id,
        "canonical": config.canonical(),
        "weights": list(config.scoring[1]),
        "inputs": {
            ref.name: checkpoint_identity(index) for ref, index in zip(config.recipe.checkpoints, indexes, strict=True)
        },
        "numerics": plan.settings.numerics,
    }
