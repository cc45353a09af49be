"""Merge from end to end: open, plan, run what is left to do, commit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from remelt.checkpoint import CheckpointIndex
from remelt.commit import MergedCheckpoint, OutputRun, Parents, check_outputs, find_finished, units_to_do
from remelt.errors import RecipeError
from remelt.executor import Executor, LocalExecutor
from remelt.fingerprints import check_unchanged
from remelt.formats import open_checkpoint
from remelt.plan import GlobalBands, MergePlan, UnitReceipt
from remelt.planner import build_plan
from remelt.receipts import write_file_durably
from remelt.recipe import Recipe
from remelt.survey import NUM_ROUNDS, SurveyResult, bands_from_json, bands_to_json, survey_bytes

SURVEY_FILE = "survey.json"


class Progress(Protocol):
    """Told of a merge as it goes, from any thread."""

    def start(self, plan: MergePlan, total_bytes: int, num_units_done: int) -> None:
        """The plan is made; `total_bytes` are still to be read and written."""
        ...

    def advance(self, num_bytes: int) -> None:
        """So many more bytes were read or written."""
        ...

    def finish_unit(self, receipt: UnitReceipt) -> None:
        """A unit is on disk."""
        ...


class _Silent:
    def start(self, plan: MergePlan, total_bytes: int, num_units_done: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def finish_unit(self, receipt: UnitReceipt) -> None:
        pass


def open_checkpoints(recipe: Recipe) -> tuple[CheckpointIndex, ...]:
    """Open every checkpoint of a recipe, from its metadata; equal sources are opened once."""
    opened: dict[str, CheckpointIndex] = {}
    for checkpoint in recipe.checkpoints:
        if checkpoint.source not in opened:
            opened[checkpoint.source] = open_checkpoint(checkpoint.source)
    return tuple(opened[checkpoint.source] for checkpoint in recipe.checkpoints)


def merge_recipe(
    recipe: Recipe,
    output: Path,
    *,
    executor: Executor | None = None,
    memory_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> MergedCheckpoint:
    """Merge a bound recipe into `output`: resumes what an earlier run left, and reads nothing where it is finished.

    Raises:
        RecipeError, CheckpointError, MismatchError, BudgetError, OutputError: before any tensor data is read.
        NonFiniteError, OperatorError, ExecutionError: from the merge; receipts written so far stay for a resume.
    """
    executor = executor or LocalExecutor(threads=threads, memory_bytes=memory_bytes)
    indexes = open_checkpoints(recipe)
    plan = build_plan(recipe, indexes, executor.budget())
    (merged,) = run_plan(plan, indexes, [output], executor, progress=progress, force=force)
    return merged


def find_bands(plan: MergePlan, work_dir: Path) -> GlobalBands | None:
    """What an earlier run's survey found, where the plan needs one and it is the same."""
    path = work_dir / SURVEY_FILE
    if plan.survey is None or not path.exists():
        return None
    return bands_from_json(path.read_text(), plan.survey)


def _take_survey(plan: MergePlan, executor: Executor, work_dir: Path, progress: Progress) -> GlobalBands:
    assert plan.survey is not None
    result = SurveyResult(plan.survey)
    for round_ in range(NUM_ROUNDS if plan.survey.cuts else 0):
        for found in executor.measure(plan, result.request(round_), progress.advance):
            result.take(found)
        result.finish_round(round_)
    bands = result.bands()
    write_file_durably(work_dir / SURVEY_FILE, bands_to_json(plan.survey.identity, bands).encode())
    return bands


def run_plan(
    plan: MergePlan,
    indexes: Sequence[CheckpointIndex],
    outputs: Sequence[Path],
    executor: Executor,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> list[MergedCheckpoint]:
    """Run a plan into one output directory for each coefficient set, and publish them."""
    progress = progress or _Silent()
    finished = [None if force else find_finished(plan, output, number) for number, output in enumerate(outputs)]
    if all(finished):
        return [merged for merged in finished if merged is not None]
    if plan.warnings:
        raise RecipeError("this plan cannot be merged: " + "; ".join(plan.warnings))
    check_outputs(plan, outputs, force=force)
    started = time.perf_counter()
    layout = indexes[plan.layout_model]
    runs = [OutputRun(plan, output, layout, number) for number, output in enumerate(outputs)]
    try:
        done = [run.begin(force=force) for run in runs]
        finished = [find_finished(plan, output, number) for number, output in enumerate(outputs)]
        if all(finished):
            # Another process finished it between the first look and the lock.
            for run in runs:
                run.clear()
            return [merged for merged in finished if merged is not None]
        todo = units_to_do(plan, done)
        total = sum(unit.read_bytes + unit.write_bytes * plan.settings.num_sets for unit in todo)
        bands = find_bands(plan, runs[0].work_dir)
        is_surveyed = plan.survey is None or bands is not None or not todo
        total += 0 if is_surveyed else survey_bytes(plan)
        progress.start(plan, total, len(plan.units) - len(todo))
        if not is_surveyed:
            bands = _take_survey(plan, executor, runs[0].work_dir, progress)
        plan = replace(plan, settings=replace(plan.settings, bands=bands))
        receipts = {unit_id: receipt for each in done for unit_id, receipt in each.items()}

        def keep(receipt: UnitReceipt) -> None:
            receipts[receipt.unit_id] = receipt
            progress.finish_unit(receipt)

        executor.run(plan, todo, [run.work_dir for run in runs], progress.advance, keep)
        for index in indexes:
            check_unchanged(index)
        ordered = [receipts[unit.unit_id] for unit in plan.units]
        parents = Parents(plan, runs[0].work_dir)
        published = [run.publish(ordered, parents, time.perf_counter() - started) for run in runs]
        for run in runs:
            run.clear()
        return published
    finally:
        for run in runs:
            run.release()
