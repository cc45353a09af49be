"""Merge from end to end: open, plan, run what is left to do, commit.

Several bound recipes that differ in numbers alone, a generation of candidates, are merged in one pass: each block of
the parents is read once and makes a block of every output. An output is the same, to its manifest, whether it was made
alone or in company; so one merged in a generation is found finished by a merge of its recipe, and the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from remelt.checkpoint import CheckpointIndex
from remelt.commit import MergedCheckpoint, OutputRun, Parents, check_outputs, find_finished, units_to_do
from remelt.errors import OutputError, RecipeError
from remelt.executor import Executor, LocalExecutor
from remelt.fingerprints import check_unchanged
from remelt.formats import open_checkpoint
from remelt.plan import GlobalBands, MergePlan, Unit, UnitReceipt
from remelt.planner import build_plan
from remelt.receipts import write_file_durably
from remelt.recipe import Recipe
from remelt.survey import bands_from_json, bands_to_json, survey_bytes, take_survey

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
    recheck: bool = False,
) -> MergedCheckpoint:
    """Merge a bound recipe into `output`: resumes what an earlier run left, and reads nothing where it is finished.

    With `recheck`, what an earlier run left is hashed before it is trusted; a shard that fails is merged again.

    Raises:
        RecipeError, CheckpointError, MismatchError, BudgetError, OutputError: before any tensor data is read.
        NonFiniteError, OperatorError, ExecutionError: from the merge; receipts written so far stay for a resume.
    """
    (merged,) = merge_recipes(
        [recipe],
        [output],
        executor=executor,
        memory_bytes=memory_bytes,
        threads=threads,
        progress=progress,
        force=force,
        recheck=recheck,
    )
    return merged


def merge_recipes(
    recipes: Sequence[Recipe],
    outputs: Sequence[Path],
    *,
    executor: Executor | None = None,
    memory_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    recheck: bool = False,
) -> list[MergedCheckpoint]:
    """Merge bound recipes that differ in their parameters alone, each into its output, in one pass over the parents.

    Bytes, digests and manifests are those of merging each alone. What an earlier run left is resumed, whether it merged
    them together or not; where some are further than others, those are brought level first, by a pass of their own.

    Raises:
        RecipeError, CheckpointError, MismatchError, BudgetError, OutputError: before any tensor data is read.
        NonFiniteError, OperatorError, ExecutionError: from the merge; receipts written so far stay for a resume, and
            none of the outputs is published.
    """
    if len(recipes) != len(outputs) or not recipes:
        raise OutputError(f"{len(recipes)} recipes and {len(outputs)} outputs: each recipe needs one of its own")
    executor = executor or LocalExecutor(threads=threads, memory_bytes=memory_bytes)
    indexes = open_checkpoints(recipes[0])
    plan = build_plan(recipes, indexes, executor.budget())
    return run_plan(plan, indexes, outputs, executor, progress=progress, force=force, recheck=recheck)


def find_bands(plan: MergePlan, work_dir: Path) -> GlobalBands | None:
    """What an earlier run's survey found, where the plan needs one and it is the same."""
    path = work_dir / SURVEY_FILE
    if plan.survey is None or not path.exists():
        return None
    return bands_from_json(path.read_text(), plan.survey)


def _take_survey(plan: MergePlan, executor: Executor, work_dir: Path, progress: Progress) -> GlobalBands:
    assert plan.survey is not None
    bands = take_survey(plan.survey, lambda request: executor.measure(plan, request, progress.advance))
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
    recheck: bool = False,
) -> list[MergedCheckpoint]:
    """Run a plan into one output directory for each coefficient set, and publish them."""
    progress = progress or _Silent()
    merged = {} if force else _finished(plan, outputs, range(len(outputs)), recheck=recheck)
    if len(merged) == len(outputs):
        return [merged[number] for number in range(len(outputs))]
    if plan.warnings:
        raise RecipeError("this plan cannot be merged: " + "; ".join(plan.warnings))
    check_outputs(plan, outputs, force=force)
    started = time.perf_counter()
    with ExitStack() as stack:
        runs = {}
        for number, output in enumerate(outputs):
            if number not in merged:
                runs[number] = OutputRun(plan, output, indexes[plan.layout_model], number)
                stack.callback(runs[number].release)
        receipts = {number: run.begin(force=force, recheck=recheck) for number, run in runs.items()}
        # Another process may have finished some between the first look and the lock.
        for number, found in _finished(plan, outputs, list(runs)).items():
            merged[number] = found
            runs.pop(number).clear()
            del receipts[number]
        if runs:
            _run_units(plan, runs, receipts, executor, progress)
            for index in indexes:
                check_unchanged(index)
            first = next(iter(runs))
            parents = Parents(plan, runs[first].work_dir, first)
            for number, run in runs.items():
                ordered = [receipts[number][unit.set_ids[number]] for unit in plan.units]
                merged[number] = run.publish(ordered, parents, time.perf_counter() - started)
                run.clear()
    return [merged[number] for number in range(len(outputs))]


def _finished(
    plan: MergePlan, outputs: Sequence[Path], numbers: Sequence[int], *, recheck: bool = False
) -> dict[int, MergedCheckpoint]:
    """Those of the outputs that are finished."""
    found = {number: find_finished(plan, outputs[number], number, recheck=recheck) for number in numbers}
    return {number: merged for number, merged in found.items() if merged is not None}


def _run_units(
    plan: MergePlan,
    runs: Mapping[int, OutputRun],
    receipts: Mapping[int, dict[str, UnitReceipt]],
    executor: Executor,
    progress: Progress,
) -> None:
    """Work what the receipts lack, and add to them."""
    todo = units_to_do(plan, receipts)
    total = sum(unit.read_bytes + unit.write_bytes * len(numbers) for numbers, units in todo.items() for unit in units)
    work_dir = next(iter(runs.values())).work_dir
    bands = find_bands(plan, work_dir)
    is_surveyed = plan.survey is None or bands is not None or not todo
    progress.start(
        plan,
        total + (0 if is_surveyed else survey_bytes(plan)),
        len(plan.units) - sum(len(units) for units in todo.values()),
    )
    if not is_surveyed:
        bands = _take_survey(plan, executor, work_dir, progress)
    plan = replace(plan, settings=replace(plan.settings, bands=bands))
    for numbers, units in todo.items():
        _run_sets(plan.of_sets(numbers), numbers, units, runs, receipts, executor, progress)


def _run_sets(
    plan: MergePlan,
    numbers: Sequence[int],
    units: Sequence[Unit],
    runs: Mapping[int, OutputRun],
    receipts: Mapping[int, dict[str, UnitReceipt]],
    executor: Executor,
    progress: Progress,
) -> None:
    """Work units for the coefficient sets `numbers`, which are all that `plan` has."""
    own_units = {plan.units[unit.index].unit_id: plan.units[unit.index] for unit in units}

    def keep(receipt: UnitReceipt) -> None:
        for number, own in zip(numbers, receipt.split(own_units[receipt.unit_id].set_ids), strict=True):
            receipts[number][own.unit_id] = own
        progress.finish_unit(receipt)

    work_dirs = [runs[number].work_dir for number in numbers]
    executor.run(plan, list(own_units.values()), work_dirs, progress.advance, keep)
