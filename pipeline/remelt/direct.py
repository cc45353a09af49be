"""Merge into sinks of the caller's: no output directory and no commit, for candidates that are scored and forgotten.

The plan, the operators and the unit runner are those of a merge to disk, so bits and digests are the same. What a
commit would prove (receipts, files' hashes, the parents' digests) is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from remelt.checkpoint import CheckpointIndex
from remelt.errors import RecipeError
from remelt.fingerprints import check_unchanged, checkpoint_digest
from remelt.plan import GlobalBands, MergePlan, OutputRecord, Unit
from remelt.planner import plan_sizes
from remelt.range_reader import MappedReader, RangeReader
from remelt.sinks import Sink
from remelt.survey import SurveyRequest, UnitCounts, measure_unit, take_survey
from remelt.unit_runner import UnitRun

MakeSink = Callable[[Unit, int], Sink]
"""(unit, coefficient set) -> what takes its output."""


class DirectMerge(NamedTuple):
    """One coefficient set, merged."""

    digest: str
    """The checkpoint digest, as a merge to disk has it."""
    candidate_id: str
    num_nonfinite: int
    read_bytes: int
    """Of the pass, which made all coefficient sets."""
    seconds: float


class ParentReaders:
    """Open parents that merge after merge reads, mapped into memory as far as an allowance goes.

    What was read once, found finite, is not checked again while the files stay as they were indexed; `merge_into` looks
    at their sizes and times before and after each merge, as every merge does.
    """

    def __init__(self, indexes: Sequence[CheckpointIndex], allowed_bytes: int) -> None:
        """Map checkpoints in their order while all that is mapped stays within `allowed_bytes`."""
        self.indexes = tuple(indexes)
        self.checked: set[tuple[int, str]] = set()
        """(place of the checkpoint, tensor) of what was found finite."""
        self.readers: list[RangeReader] = []
        opened: dict[str, RangeReader] = {}
        for index in indexes:
            if index.root not in opened:
                size = sum(file.size for file in index.files)
                is_mapped = size <= allowed_bytes
                allowed_bytes -= size if is_mapped else 0
                opened[index.root] = MappedReader(index) if is_mapped else RangeReader(index)
            self.readers.append(opened[index.root])

    @property
    def is_mapped(self) -> bool:
        """Whether all of them are in memory."""
        return all(isinstance(reader, MappedReader) for reader in self.readers)

    def close(self) -> None:
        """Let go of files and mappings."""
        for reader in self.readers:
            reader.close()


def merge_into(plan: MergePlan, parents: ParentReaders, make_sink: MakeSink) -> list[DirectMerge]:
    """Run a whole plan into sinks, in this process, with the plan's threads and within its memory.

    Raises:
        RecipeError: the plan holds arithmetic that is not supported.
        CheckpointError: a parent changed since it was indexed.
        NonFiniteError, OperatorError: from the merge. The sinks then hold a part of it.
    """
    if plan.warnings:
        raise RecipeError("this plan cannot be merged: " + "; ".join(plan.warnings))
    started = time.perf_counter()
    for index in parents.indexes:
        check_unchanged(index)
    if plan.survey is not None:
        plan = replace(plan, settings=replace(plan.settings, bands=_survey(plan, parents.readers)))
    records: list[list[OutputRecord]] = [[] for _ in range(plan.settings.num_sets)]
    read_bytes = 0
    read = {(place, tensor.name) for unit in plan.units for tensor in unit.tensors for place, _ in tensor.sources}
    sizes = plan_sizes(plan)
    if parents.is_mapped:
        # Nothing needs to be kept between rounds: it is in memory as it is.
        sizes = sizes._replace(arena_bytes=0)
    for unit in plan.units:
        sinks = [make_sink(unit, number) for number in range(plan.settings.num_sets)]
        run = UnitRun(unit, plan.settings, sizes, parents.readers, sinks, are_parents_known=read <= parents.checked)
        run.work()
        receipt = run.finish()
        read_bytes += receipt.read_bytes
        for own, output in zip(records, receipt.outputs, strict=True):
            own.append(output)
    for index in parents.indexes:
        check_unchanged(index)
    if not plan.settings.allow_nonfinite:
        parents.checked |= read
    seconds = time.perf_counter() - started
    return [
        _direct_merge(own, candidate_id, read_bytes, seconds)
        for own, candidate_id in zip(records, plan.candidate_ids, strict=True)
    ]


def _direct_merge(outputs: Sequence[OutputRecord], candidate_id: str, read_bytes: int, seconds: float) -> DirectMerge:
    tensors = [tensor for output in outputs for tensor in output.tensors]
    return DirectMerge(
        checkpoint_digest({tensor.name: (tensor.dtype, tensor.shape, tensor.digest) for tensor in tensors}),
        candidate_id,
        sum(tensor.num_nonfinite for tensor in tensors),
        read_bytes,
        seconds,
    )


def _survey(plan: MergePlan, readers: Sequence[RangeReader]) -> GlobalBands:
    assert plan.survey is not None
    sizes = plan_sizes(plan)

    def measure(request: SurveyRequest) -> Iterator[UnitCounts]:
        for unit in plan.units:
            yield measure_unit(unit, plan.settings, sizes, readers, request)

    return take_survey(plan.survey, measure)
